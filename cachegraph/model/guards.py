"""What torch.export found that sizes must fulfil for a trace to be the model."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from sympy import And, Basic, Integer, Not, Or, Symbol
from sympy.core.relational import Relational
from torch.export import ExportedProgram
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .conditions import failed, parse, symbols_of
from .lines import is_models

_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def branches() -> Iterator[dict[Basic, str]]:
    """Listen to what the model's own code asks about sizes, as it then held, and where.

    Torch takes a symbol to be 2 or more, so it knows the answer to ``batch == 1`` and makes no
    guard of it; it does so for its own purposes, too, where a batch of one is as right.

    Of the guards that torch makes, the line of the model is noted, not that inside of torch.
    """
    found: dict[Basic, str] = {}
    plain, passed_over = torch.SymBool.__bool__, symbolic_shapes.uninteresting_files

    def listen(asked: torch.SymBool) -> bool:
        question = asked.node.expr  # the answer may make a number of it
        answer = plain(asked)
        frame = sys._getframe(1)
        if not (file := frame.f_code.co_filename).startswith(_TORCH):
            held = question if answer else Not(question)
            found[held] = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        return answer

    torch.SymBool.__bool__ = listen  # type: ignore[method-assign]
    symbolic_shapes.uninteresting_files = _NoModels  # type: ignore[assignment]
    try:
        yield found
    finally:
        torch.SymBool.__bool__ = plain  # type: ignore[method-assign]
        symbolic_shapes.uninteresting_files = passed_over


class _NoModels(Container[str]):
    """All files but a model's own."""

    def __contains__(self, file: object) -> bool:
        return not is_models(str(file))


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


def line_that_fixes(program: ExportedProgram, place: str, axis: int) -> str | None:
    """Where a model fixes a size: ``model.py:12 in forward``; empty where nobody knows the line.

    A size is fixed where something holds for it, but for neither twice nor half of it, whichever of
    the sizes that it is compared with are changed likewise: ``height // 2 == 16`` fixes,
    ``height % 8 == 0`` and ``height == width`` do not.

    Args:
        program: the trace, made while :func:`branches` listened.
        place: of an input in the call, as pytree writes it.
        axis: of the input.

    Returns:
        None where the size varies.
    """
    environment = _environment(program)
    if environment is None:
        return None
    source = f"L{place}.size()[{axis}]"
    asked = {s for s, of in environment.var_to_sources.items() if source in {o.name for o in of}}
    tied = dict(environment.replacements)
    for _ in tied:  # what is the same size as these, directly or not
        asked |= {s for s, value in tied.items() if value in asked}
        asked |= {value for s, value in tied.items() if s in asked and isinstance(value, Symbol)}
    sizes = environment.backed_var_to_val
    for guard in environment.guards:
        if _fixes(guard.expr, asked, sizes):
            frame = guard.sloc.framework_loc
            if not isinstance(frame, traceback.FrameSummary):
                return ""
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return None


def _fixes(condition: Basic, asked: set[Any], sizes: Mapping[Any, Any]) -> bool:
    known = {s: Integer(int(sizes[s])) for s in condition.free_symbols if s in sizes}
    mine = asked & known.keys()
    rest = sorted(known.keys() - mine, key=str)
    subsets = chain.from_iterable(combinations(rest, n) for n in range(len(rest) + 1))
    for others in subsets if mine else ():
        changed = mine | {*others}
        twice = known | {s: 2 * known[s] for s in changed}
        half = known | {s: known[s] // 2 for s in changed}
        small = min(known[s] for s in changed) < 4  # torch takes symbols to be 2 or more
        for given in (twice,) if small else (twice, half):
            if condition.xreplace(given) != False:  # noqa: E712
                return False
    return bool(mine)


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
