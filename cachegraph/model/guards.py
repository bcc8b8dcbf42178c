"""What torch.export found that sizes must fulfil for a trace to be the model."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sympy import And, Basic, Eq, Integer, Not, Or
from sympy.core.relational import Relational
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .conditions import failed, parse, symbols_of

_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def branches() -> Iterator[dict[Basic, str]]:
    """Listen to what the model's own code asks about sizes, as it then held, and where.

    Torch takes a symbol to be 2 or more, so it knows the answer to ``batch == 1`` and makes no
    guard of it; it does so for its own purposes, too, where a batch of one is as right.
    """
    found: dict[Basic, str] = {}
    plain = torch.SymBool.__bool__

    def listen(asked: torch.SymBool) -> bool:
        question = asked.node.expr  # the answer may make a number of it
        answer = plain(asked)
        frame = sys._getframe(1)
        if not (file := frame.f_code.co_filename).startswith(_TORCH):
            held = question if answer else Not(question)
            found[held] = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        return answer

    torch.SymBool.__bool__ = listen  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.SymBool.__bool__ = plain  # type: ignore[method-assign]


def conditions_of(
    program: ExportedProgram, asked: Iterable[Basic], symbols: Iterable[str]
) -> tuple[str, ...]:
    """What torch.export found that sizes must fulfil, beside the shapes of the inputs.

    Args:
        program: the trace.
        asked: what :func:`branches` heard.
        symbols: that the shapes of its inputs tell.

    Raises:
        ValueError: a condition that is no arithmetic on these symbols.
    """
    known, found = set(symbols), dict[str, None]()
    environment = _environment(program)
    replaced = _replacements(environment)
    for guard in environment.guards if environment else ():
        text = _text(guard.expr.xreplace(replaced))
        if text and not symbols_of(parse(text)) <= known:
            raise ValueError(f"not about sizes of inputs: {text!r}")
        found |= dict.fromkeys([text] if text else [])
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for name, bounds in ranges.items():
        if name in known and bounds.upper.is_Integer:
            text, outside = f"{name} <= {bounds.upper}", {name: int(bounds.upper) + 1}
            if all(symbols_of(parse(t)) != {name} or failed([t], outside) is None for t in found):
                found[text] = None
    for condition in {one.xreplace(replaced): None for one in asked}:
        sizes = condition.free_symbols
        holds = condition.xreplace(dict.fromkeys(sizes, Integer(1)))
        if len(sizes) == 1 and {str(s) for s in sizes} <= known and holds != True:  # noqa: E712
            found[_text(condition)] = None
    return tuple(found)


def line_that_fixes(program: ExportedProgram, asked: Mapping[Basic, str]) -> str:
    """Where a size became a number: ``model.py:12 in forward``; empty where nobody knows."""
    environment = _environment(program)
    for guard in reversed(environment.guards if environment else ()):
        if isinstance(guard.expr, Eq) and guard.expr in asked:
            return asked[guard.expr]
        frame = guard.sloc.framework_loc
        inside = isinstance(frame, traceback.FrameSummary) and not frame.filename.startswith(_TORCH)
        if inside and isinstance(guard.expr, Eq):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return ""


def _environment(program: ExportedProgram) -> ShapeEnv | None:
    values = (node.meta.get("val") for node in program.graph.find_nodes(op="placeholder"))
    modes = (value.fake_mode for value in values if hasattr(value, "fake_mode"))
    return next((mode.shape_env for mode in modes), None)


def _replacements(environment: ShapeEnv | None) -> dict[Any, Any]:
    """Symbol -> what it turned out to be, said in symbols that are still there."""
    found = dict(environment.replacements) if environment else {}
    for _ in found:
        found = {symbol: value.xreplace(found) for symbol, value in found.items()}
    return found


def _text(condition: Basic) -> str:
    """A condition as text; empty where it always holds.

    Raises:
        ValueError: it has no such form.
    """
    if condition == True:  # noqa: E712 - sympy's own true, too
        return ""
    match condition:
        case And() | Or():
            word = " and " if isinstance(condition, And) else " or "
            return word.join(f"({_text(part)})" for part in condition.args)
        case Not():
            return f"not ({_text(condition.args[0])})"
        case Relational():
            left, right = condition.args
            return f"{left} {condition.rel_op} {right}"
    raise ValueError(f"not a condition on sizes: {str(condition)!r}")
