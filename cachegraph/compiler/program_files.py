"""``.pt2`` files, looked at before torch opens them.

torch evaluates some of the texts in such an archive as Python, calls whatever of torch the nodes
name, unpickles objects and example inputs that are more than tensors, and opens libraries. None of
that is needed for a program of tensors, so an archive that does it is refused.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cachegraph.errors import ModelError
from cachegraph.graph.serialise import FUNCTIONS
from cachegraph.zoo.checkpoint import DAMAGED, refuse_mistaken

_LARGEST = 2**28  # bytes: the graph of a very large model has a tenth of that
_PICKLED = ("custom_obj_", "opaque_obj_")  # torch's names of files, whatever else is said of them
_OPERATOR = re.compile(r"torch\.ops(\.(?!__)\w+){2,3}|torch\._?sym_\w+")
_EXPRESSION = (ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load, ast.UnaryOp, ast.USub)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Let torch open a program that was looked at first.

    Raises:
        ModelError: it is refused, or cannot be read.
    """
    refuse_code(path)
    try:
        with quiet("torch.export"):
            yield
    except Exception as error:
        raise ModelError(
            "not a readable torch.export program",
            place=str(path),
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
        ) from error


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
                for problem in _problems_of(archive, entry):
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


def _problems_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[str]:
    name = entry.filename
    if "/aotinductor/" in f"/{name}":
        yield "compiled code"
    elif name.endswith((".json", ".pt")) and entry.file_size > _LARGEST:
        yield f"a text or pickle of {entry.file_size} bytes, which no program has"
    elif name.endswith(".json"):
        yield from _problems(json.loads(archive.read(entry)))
    elif name.endswith(".pt") and entry.file_size and not _is_tensors(archive.read(entry)):
        yield "a pickle of more than tensors"


def _is_tensors(content: bytes) -> bool:
    """Whether torch reads what was pickled without running it."""
    try:
        torch.load(io.BytesIO(content), map_location="meta", weights_only=True)
    except DAMAGED:
        return False
    return True


def _problems(data: Any) -> Iterator[str]:
    if isinstance(data, list):
        for item in data:
            yield from _problems(item)
    elif isinstance(data, dict):
        if data.get("use_pickle"):
            yield "a tensor that is pickled"
        if str(data.get("path_name", "")).startswith(_PICKLED):
            yield f"the object {data['path_name'][:60]!r}, which is pickled"
        target = data.get("target")
        if isinstance(target, str) and not _is_operator(target):
            yield f"the call of {target[:60]!r}"
        expression = data.get("expr_str")
        if isinstance(expression, str) and not _is_arithmetic(expression):
            yield f"the expression {expression[:60]!r}"
        for item in data.values():
            yield from _problems(item)


def _is_operator(name: str) -> bool:
    """True for operators of torch and arithmetic on sizes: no other function is called."""
    module, _, function = name.partition(".")
    sizes = FUNCTIONS.get(module.removeprefix("_"), ())
    return function in sizes or _OPERATOR.fullmatch(name) is not None


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


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Silence a library's log: what goes wrong is said once, in the error."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # disabling it would leave its children loud
    try:
        yield
    finally:
        logger.setLevel(before)
