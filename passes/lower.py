"""Turn cache operations into plain inputs, outputs and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachegraph import ops
from cachegraph.graph import ORIGIN, Origin, Stage, StepGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Lower:
    """Replace ``cache.read`` by the slot, ``cache.write`` by its value, a forecast by its sum.

    Before::

        %slot_attn_0 = slot "attn#0"
        %read_attn_0 = cache.read(%slot_attn_0)
        %add_1 = aten.add.Tensor(%x, %read_attn_0)
        %write_mlp_0 = cache.write(%linear_5, slot="mlp#0")
        return %add_2, %write_mlp_0

    After::

        %slot_attn_0 = slot "attn#0"
        %add_1 = aten.add.Tensor(%x, %slot_attn_0)
        return %add_2, %linear_5

    What is left is a pure function of tensors that any backend can take. Left alone: everything
    else.
    """

    name: ClassVar[str] = "lower"

    def apply(self, step: StepGraph) -> int:
        """Lower every cache operation; returns how many."""
        lowered = 0
        for node in list(step.graph.nodes):
            if node.target not in ops.CACHE_OPS:
                continue
            if node.target is ops.forecast:
                with step.graph.inserting_before(node):
                    result = _weighted_sum(step.graph, node)
            else:
                result = node.args[0]
            node.replace_all_uses_with(result, propagate_meta=False)
            step.graph.erase_node(node)
            lowered += 1
        step.stage = Stage.LOWERED
        return lowered


def _weighted_sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    values: Any = node.args[0]
    coefficients = node.args[1]
    total: fx.Node | None = None
    for i, value in enumerate(values):
        weight = graph.call_function(aten.select.int, (coefficients, 0, i))
        term = graph.call_function(aten.mul.Tensor, (value, weight))
        made = [weight, term]
        if total is not None:
            term = graph.call_function(aten.add.Tensor, (total, term))
            made.append(term)
        total = term
        for new in made:
            new.meta[ORIGIN] = Origin(Lower.name, node.meta[ORIGIN].site)
    if total is None:
        raise ValueError("a forecast without values")
    return total
