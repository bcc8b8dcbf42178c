"""What is done to the part of a tensor that a mask picks, as a choice over the whole tensor.

``x[mask] = f(x[mask])`` has as many rows in the middle as the mask says, which no trace can know.
Where ``f`` treats each of them alone, ``torch.where(mask, f(x), x)`` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .shapes import make_node

aten = torch.ops.aten

_PUTS = {aten.index_put.default, aten._unsafe_index_put.default}
_CASTS = {aten._to_copy.default, aten.clone.default, aten.alias.default}


def without_masks(module: fx.GraphModule, checks: set[Any]) -> None:
    """Rewrite every write through a mask whose values come from reads through the same mask.

    Args:
        module: functional; changed.
        checks: operations without a result.
    """
    graph = module.graph
    puts = [n for n in graph.nodes if n.target in _PUTS and _is_unknown(n.args[2])]
    done = [put for put in puts if _rewrite(graph, put)]
    if not done:
        return
    for node in reversed(list(graph.nodes)):
        if node.target in checks and not node.users:
            graph.erase_node(node)
    kept = {"placeholder", "get_attr", "output"}
    graph.eliminate_dead_code(lambda node: node.op in kept)


def _rewrite(graph: fx.Graph, put: fx.Node) -> bool:
    target: Any = put.args[0]
    found = _mask(put.args[1])
    if found is None or (len(put.args) > 3 and put.args[3]):
        return False
    mask, axis = found
    with graph.inserting_before(put):
        whole = _whole(graph, put.args[2], mask, axis, {})
        if whole is None:
            return False
        rank = target.meta["val"].ndim
        choice = mask
        for _ in range(rank - axis - mask.meta["val"].ndim):
            choice = make_node(graph, aten.unsqueeze.default, (choice, -1), put)
        chosen = make_node(graph, aten.where.self, (choice, whole, target), put)
    put.replace_all_uses_with(chosen)
    graph.erase_node(put)
    return True


def _whole(
    graph: fx.Graph, node: Any, mask: fx.Node, axis: int, made: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """A value for the rows that a mask picks, for all rows; None where there is no such."""
    if node in made:
        return made[node]
    if node.target is aten.index.Tensor:
        return node.args[0] if _mask(node.args[1]) == (mask, axis) else None
    if not _is_rowwise(node):
        return None
    inputs: dict[fx.Node, Any] = {}
    for source in node.all_input_nodes:
        if _is_unknown(source):
            inputs[source] = _whole(graph, source, mask, axis, made)
        elif source.meta["val"].ndim <= node.meta["val"].ndim - axis - 1:
            inputs[source] = source  # reaches columns only
    if len(inputs) < len(node.all_input_nodes) or None in inputs.values():
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
    made[node] = make_node(graph, node.target, args, node, kwargs)
    return made[node]


def _is_rowwise(node: fx.Node) -> bool:
    target: Any = node.target
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags or target in _CASTS


def _mask(given: Any) -> tuple[fx.Node, int] | None:
    """The mask of ``x[mask]`` or ``x[:, mask]``, and the axis that it begins at."""
    indices: Sequence[Any] = list(given)
    if [i for i in indices if i is not None] != indices[-1:]:
        return None
    mask = indices[-1]
    return (mask, len(indices) - 1) if mask.meta["val"].dtype is torch.bool else None


def _is_unknown(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))
