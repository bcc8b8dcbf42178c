"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cachegraph.graph.step_graph import CONSTANT, SLOT, StepGraph


@dataclass(frozen=True)
class DropDead:
    """Remove nodes without users, and the slots and step constants that nothing reads any more.

    Before, where ``blocks.0.attn`` is reused::

        %linear_0 = aten.linear(%x, @attn.qkv.weight)
        %sdpa_0 = aten.scaled_dot_product_attention(...)
        %add_1 = aten.add.Tensor(%x, %read_blocks_0_attn_0)
        return %add_1

    After::

        %add_1 = aten.add.Tensor(%x, %read_blocks_0_attn_0)
        return %add_1

    Left alone: the model's inputs, so that every variant is called alike. Every operation in a
    traced graph is functional, so one without users has no effect.
    """

    name: ClassVar[str] = "drop-dead"

    def apply(self, step: StepGraph) -> int:
        """Remove dead nodes; returns how many."""
        removed = 0
        for node in reversed(list(step.graph.nodes)):
            ours = SLOT in node.meta or CONSTANT in node.meta
            if node.users or node.op == "output" or (node.op == "placeholder" and not ours):
                continue
            step.graph.erase_node(node)
            removed += 1
        return removed
