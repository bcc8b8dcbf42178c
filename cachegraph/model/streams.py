"""Inside the attention of a site: the tokens of each stream, and what a fused site keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from cachegraph.spec import TensorSpec

from .site import Inner
from .structure import CASTS, VIEWS, Dependence, aten, cut, strip


def tokens_of(
    dependence: Dependence, cores: Sequence[fx.Node], value: fx.Node
) -> tuple[int, int] | None:
    """From which to which token of an attention a stream's value is: a joint one is cut.

    None where there is no such attention, or its tokens are no number.
    """
    if len(cores) != 1:
        return None
    [core] = cores
    tokens = core.meta["val"].shape[-2]
    if not isinstance(tokens, int):
        return None
    for node in dependence.between(core, value):
        piece, whole, start = cut(node)
        if start is not None and whole == tokens and isinstance(piece, int):
            return start, start + piece
    return 0, tokens


def inner_of(
    dependence: Dependence, cores: Sequence[fx.Node], linears: Sequence[fx.Node]
) -> list[Inner | None]:
    """The attention where the last projection takes it and another branch of the block together.

    Empty where none does so; None where the two are not joined channel by channel.
    """
    for linear in linears if cores else ():
        joined = strip(linear.all_input_nodes[0], VIEWS | CASTS)
        if joined.target is not aten.cat.default:
            continue
        parts = joined.all_input_nodes
        with_core = [any(dependence.depends(p, core) for core in cores) for p in parts]
        if any(with_core) and not all(with_core):
            return [_part(linear, joined, with_core)]
    return []


def _part(linear: fx.Node, joined: fx.Node, with_core: Sequence[bool]) -> Inner | None:
    value = joined.meta["val"]
    dim: Any = joined.args[1] if len(joined.args) > 1 else 0
    parts: Any = joined.args[0]
    widths = [part.meta["val"].shape[-1] for part in parts]
    if linear.args[0] is not joined or dim % value.ndim != value.ndim - 1:
        return None
    if value.ndim != 3 or sum(with_core) != 1 or not all(isinstance(w, int) for w in widths):
        return None
    at = list(with_core).index(True)
    start = sum(widths[:at])
    spec = TensorSpec.of(parts[at].meta["val"])
    return Inner(parts[at].name, spec, (start, start + widths[at]))
