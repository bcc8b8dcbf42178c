"""What must hold of one node of a graph."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.graph import ops
from cachegraph.model.shapes import Shapes

_IN_PLACE = {
    operator.setitem,
    operator.delitem,
    *(function for name, function in vars(operator).items() if name.startswith("__i")),
}


def recompute(node: fx.Node, shapes: Shapes, agreed: set[tuple[int, int]]) -> str:
    """What is wrong with the recorded value of a node; nothing where it computes again.

    Args:
        node: of a graph.
        shapes: what is known of shapes.
        agreed: pairs of specs, recorded and recomputed, that were found to agree; grows.
    """
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        # The body of a higher-order operator was checked where it was traced.
        return "" if "val" in node.meta else "no recorded shape"
    try:
        again = shapes.evaluate(node)
    except Exception as error:  # noqa: BLE001 - an operator may refuse its arguments in any way
        return f"it cannot be computed: {type(error).__name__}: {str(error).splitlines()[:1]}"
    if "val" not in node.meta:
        return "no recorded shape"
    recorded = node.meta["val"]
    pair = shapes.spec(recorded), shapes.spec(again)
    if pair in agreed:
        return ""
    if shapes.text(again) != shapes.text(recorded):
        return f"{shapes.text(recorded)} recomputes to {shapes.text(again)}"
    if _device(again) != _device(recorded):
        return f"{_device(recorded)} recomputes to {_device(again)}"
    agreed.add(pair)
    return ""


def _device(value: Any) -> Any:
    return value.device if isinstance(value, Tensor) else None


@cache
def not_functional(target: Any) -> str:
    """Why a graph may not call the target; nothing where it may."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return f"{target} changes its inputs" if schema.is_mutable else ""
    if target in _IN_PLACE:
        return f"{target} changes its inputs"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    on_sizes = module in ("_operator", "math") or (module == "torch" and name.startswith("sym_"))
    known = target in ops.CACHE_OPS or isinstance(target, torch._ops.HigherOrderOperator)
    return "" if on_sizes or known else f"{target} is no operator"
