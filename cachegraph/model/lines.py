"""Which line of a model torch.export failed at; and its own words about that, kept to itself."""

from __future__ import annotations

import io
import linecache
import logging
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cachegraph.errors import TraceError

_TORCH = f"{Path(torch.__file__).parent}/"
_HERE = f"{Path(__file__).parent}/"
_PYTHON = f"{sysconfig.get_path('stdlib')}/"
_INSTALLED = f"{sysconfig.get_path('purelib')}/"  # may lie in Python's own folder
_IN_STACK = re.compile(r'File "(.+)", line (\d+), in ')


def line_of(error: BaseException) -> str:
    """The innermost line of the model on the way to an error: ``model.py:12: x = x.item()``.

    Empty where there is none.
    """
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    return _shown(frames)


def line_of_node(node: fx.Node) -> str:
    """The line of the model that a traced operation comes from; empty where it is not known."""
    stack = str(node.meta.get("stack_trace") or "")
    return _shown([(file, int(line)) for file, line in _IN_STACK.findall(stack)])


def _shown(frames: list[tuple[str, int]]) -> str:
    own = (frame for frame in reversed(frames) if is_models(frame[0]))
    for file, line in own:
        if code := linecache.getline(file, line).strip():
            return f"{file}:{line}: {code}"
    return ""


def is_models(file: str) -> bool:
    """Whether a file is neither torch's, nor Python's, nor of this folder."""
    if file.startswith((_TORCH, _HERE, "<")):
        return False
    return file.startswith(_INSTALLED) or not file.startswith(_PYTHON)


def untraceable(model: nn.Module, inputs: Sequence[Tensor], error: Exception) -> TraceError:
    """The error of a model that torch.export cannot follow."""
    text = str(error).strip()
    remedy = "see the chained error for all that led there"
    given, own = _dtypes(inputs), _dtypes(model.parameters())
    if isinstance(error, GuardOnDataDependentSymNode):
        remedy = "choose by values with torch.where, not with if"
    elif given.isdisjoint(own) and len(own) == 1:
        remedy = f"the model is in {own.pop()}: give example inputs in that dtype"
    return TraceError(
        f"torch.export cannot follow {type(model).__name__}",
        place=line_of(error),
        found=f"{type(error).__name__}: {text.partition(chr(10))[0]}",
        remedy=remedy,
    )


def _dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch.export logs and prints about a failure off the screen; the error says it."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
