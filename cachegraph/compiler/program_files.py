"""``.pt2`` files, looked at before torch opens them.

torch evaluates some of the texts in such an archive as Python and unpickles what it says is
pickled. Neither is needed for a program of tensors, so an archive that does it is refused.
"""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cachegraph.errors import ModelError
from cachegraph.zoo.checkpoint import refuse_mistaken

_LARGEST = 2**28  # bytes of a JSON file: the graph of a very large model has a tenth of that
_EXPRESSION = (ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load, ast.UnaryOp, ast.USub)


def refuse_code(path: Path) -> None:
    """Refuse an archive that makes torch run something that it brings along.

    Args:
        path: of a ``.pt2`` file.

    Raises:
        ModelError: the file is no archive, or holds pickles or expressions that are no arithmetic.
    """
    refuse_mistaken(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".json") and entry.file_size <= _LARGEST:
                    for problem in _problems(json.loads(archive.read(entry))):
                        raise ModelError(
                            "the program is refused: torch would run code that it brings along",
                            place=f"{path}, {entry.filename}",
                            found=problem,
                            remedy="export the model again on a machine of yours",
                        )
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise ModelError(
            "not a readable torch.export program",
            place=str(path),
            found=f"{type(error).__name__}: {error}",
        ) from error


def _problems(data: Any) -> Iterator[str]:
    if isinstance(data, list):
        for item in data:
            yield from _problems(item)
    elif isinstance(data, dict):
        if data.get("use_pickle"):
            yield "a tensor that is pickled"
        expression = data.get("expr_str")
        if isinstance(expression, str) and not _is_arithmetic(expression):
            yield f"the expression {expression[:60]!r}"
        for item in data.values():
            yield from _problems(item)


def _is_arithmetic(text: str) -> bool:
    """True for calls of sympy's classes on numbers and names: ``Mul(Integer(2), Symbol('s0'))``."""
    try:
        body = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    nodes = list(ast.walk(body))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    return all(isinstance(node, _EXPRESSION) for node in nodes) and all(
        isinstance(function, ast.Name) and function.id[0].isupper() for function in called
    )
