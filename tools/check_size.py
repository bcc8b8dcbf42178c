"""Fails where a file, a function, a folder or the product grew past what one reads at a sitting.

Raising a number is a commit of its own, with a reason.
"""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 400
MAX_FUNCTION = 50
MAX_PRODUCT = 37_300  # cachegraph and passes together
# What each folder of the product may have, in lines; files beside them count for "cachegraph".
BUDGETS = {
    "cachegraph": 960,
    "zoo": 2_510,
    "model": 4_660,
    "config": 690,
    "plan": 820,
    "methods": 2_400,
    "schedule": 570,
    "graph": 2_420,
    "passes": 1_160,
    "runtime": 2_160,
    "backends": 2_290,
    "artifact": 1_680,
    "compiler": 2_060,
    "oracle": 790,
    "diffusion": 200,
    "show": 1_510,
    "calibrate": 790,
    "pipelines": 1_420,
    "bench": 1_210,
    "train": 1_490,
    "images": 1_150,
    "search": 1_820,
    "report": 620,
    "cli": 2_090,
}
# From a model to what runs it.
ENGINE = tuple(list(BUDGETS)[2:13])
MAX_ENGINE = 20_800

PRODUCT = ("cachegraph", "passes")
FOLDERS = (*PRODUCT, "schedules", "tests", "tools")


def python_files(folder: Path) -> Iterator[Path]:
    # Links are not followed: cachegraph/passes would be counted twice.
    for parent, _, names in os.walk(folder, followlinks=False):
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(parent, name)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def check_file(path: Path, shown: Path, lines: int) -> Iterator[str]:
    if lines > MAX_FILE:
        yield f"{shown}:{MAX_FILE + 1}: file of {lines} lines; at most {MAX_FILE}, split it"
    for function in functions(ast.parse(path.read_bytes(), filename=str(shown))):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        first = function.body[0]
        if ast.get_docstring(function) is not None:  # it is read apart from the code
            length -= (first.end_lineno or first.lineno) - first.lineno + 1
        if length > MAX_FUNCTION:
            yield (
                f"{shown}:{function.lineno}: function {function.name} of {length} lines; "
                f"at most {MAX_FUNCTION}, split it"
            )


def folder_of(path: Path) -> str:
    """The budget that a file of the product counts for."""
    parts = path.parts[:-1]
    return parts[1] if len(parts) > 1 else parts[0]


def check_folders(sizes: Counter[str]) -> Iterator[str]:
    limits = BUDGETS | {"engine": MAX_ENGINE, "product": MAX_PRODUCT}
    engine = sum(sizes[name] for name in ENGINE)
    found = {**sizes, "engine": engine, "product": sizes.total()}
    for name, lines in found.items():
        if name not in limits:
            yield f"{name}: a folder without a budget; give it one in {Path(__file__).name}"
        elif lines > limits[name]:
            yield f"{name}: {lines} lines; at most {limits[name]}"


def check(root: Path) -> tuple[list[str], Counter[str]]:
    """Gives the complaints about a checkout, and how many lines each folder of the product has."""
    complaints: list[str] = []
    sizes = Counter[str]()
    for folder in FOLDERS:
        for path in python_files(root / folder):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            shown = path.relative_to(root)
            complaints += check_file(path, shown, lines)
            if folder in PRODUCT:
                sizes[folder_of(shown)] += lines
    return [*complaints, *check_folders(sizes)], sizes


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    complaints, sizes = check(root)
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    engine = sum(sizes[name] for name in ENGINE)
    print(f"product: {sizes.total()} of {MAX_PRODUCT} lines, engine {engine} of {MAX_ENGINE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
