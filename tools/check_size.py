"""Fails where a file, a function or the whole product grew past what one reads at a sitting.

Raising a number is a commit of its own, with a reason.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 400
MAX_FUNCTION = 50
MAX_PRODUCT = 20_400  # cachegraph and passes together

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


def check(root: Path) -> tuple[list[str], int]:
    """Gives the complaints about a checkout, and how many lines the product has."""
    complaints: list[str] = []
    product = 0
    for folder in FOLDERS:
        for path in python_files(root / folder):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            complaints += check_file(path, path.relative_to(root), lines)
            if folder in PRODUCT:
                product += lines
    if product > MAX_PRODUCT:
        complaints.append(f"{' + '.join(PRODUCT)}: {product} lines; at most {MAX_PRODUCT}")
    return complaints, product


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    complaints, product = check(root)
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    print(f"{' + '.join(PRODUCT)}: {product} of {MAX_PRODUCT} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
