"""Conditions on sizes under which a traced graph is the model.

A model may branch on a size (``if x.shape[0] > 3``), or an operator on its way may; the trace then
holds on one side only. The conditions travel as text, ``s0 <= 3``, and are read as arithmetic and
never as code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache

from cachegraph.spec import evaluate

_LONGEST = 1000  # characters of a condition
_COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def failed(conditions: Iterable[str], sizes: Mapping[str, int]) -> str | None:
    """The first condition that does not hold.

    Args:
        conditions: as :func:`parse` takes them.
        sizes: a number for every shape symbol.

    Raises:
        ValueError: one is no condition.
        KeyError: a symbol without a size.
    """
    return next((text for text in conditions if not _holds(parse(text), sizes)), None)


@cache
def parse(text: str) -> ast.expr:
    """A condition such as ``s0 % 2 == 0 and s0 < 8``.

    Raises:
        ValueError: not comparisons of arithmetic on symbols and whole numbers, joined by
            ``and``, ``or`` and ``not``.
    """
    try:
        condition = ast.parse(text, mode="eval").body if len(text) <= _LONGEST else None
    except SyntaxError:
        condition = None
    if condition is None:
        raise ValueError(f"not a condition: {text[:80]!r}")
    with suppress(ZeroDivisionError):  # arithmetic, if not for these sizes
        _holds(condition, dict.fromkeys(symbols_of(condition), 1))
    return condition


def symbols_of(condition: ast.expr) -> set[str]:
    """Names of the symbols in a condition."""
    functions = {id(n.func) for n in ast.walk(condition) if isinstance(n, ast.Call)}
    names = (n for n in ast.walk(condition) if isinstance(n, ast.Name))
    return {n.id for n in names if id(n) not in functions}


def _holds(node: ast.expr, sizes: Mapping[str, int]) -> bool:
    match node:
        case ast.BoolOp(op, values):
            each = [_holds(value, sizes) for value in values]  # all, so that all are looked at
            return all(each) if isinstance(op, ast.And) else any(each)
        case ast.UnaryOp(ast.Not(), operand):
            return not _holds(operand, sizes)
        case ast.Compare(left, [op], [right]) if type(op) in _COMPARE:
            a, b = (evaluate(ast.unparse(side), sizes) for side in (left, right))
            return _COMPARE[type(op)](a, b)
    raise ValueError(f"not a condition: {ast.unparse(node)!r}")
