"""Move what is known before a step runs out of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from cachegraph.graph.binding import Binding, Known, Roofline, hints, is_size, worth_hoisting
from cachegraph.graph.step_graph import KNOWN, ORIGIN, Origin, StepGraph
from cachegraph.spec import TensorSpec


@dataclass(frozen=True)
class HoistKnown:
    """Compute what does not depend on the image when a trajectory begins, for all steps at once.

    Before::

        %linear_2 = aten.linear(%silu_1, @ada.weight, @ada.bias)         f32[s0, 32]
        %unsqueeze_1 = aten.unsqueeze(%linear_2, 1)                      f32[s0, 1, 32]
        %mul_3 = aten.mul.Tensor(%unsqueeze_1, %slot_blocks_0_attn_0)    f32[s0, 16, 32]

    After::

        %known_linear_2 = known "linear_2" per step                      f32[s0, 32]
        %unsqueeze_1 = aten.unsqueeze(%known_linear_2, 1)                f32[s0, 1, 32]
        %mul_3 = aten.mul.Tensor(%unsqueeze_1, %slot_blocks_0_attn_0)    f32[s0, 16, 32]

    and in the prologue::

        %linear_2 = aten.linear(%silu_1, @ada.weight, @ada.bias)         f32[s0, 32]
        return %linear_2

    What is known follows from the inputs (``graph.binding.Binding``); which of it is worth keeping
    is a minimum cut. Left alone: outputs of the model, and cheap operations on what
    is kept.

    Attributes:
        costs: of computing and of keeping.
    """

    name: ClassVar[str] = "hoist-known"
    costs: Roofline = field(default_factory=Roofline)

    def apply(self, step: StepGraph) -> int:
        """Hoist; returns how many values became inputs."""
        times = step.binding_times()
        hoisted = worth_hoisting(step.graph, times, len(step.variant.steps), self.costs)
        kept = [n for n in step.graph.nodes if n in hoisted and set(n.users) - hoisted]
        kept = [_in_order(step, node, times, hoisted) for node in kept]
        by_step = [n for n in kept if times[n] is Binding.STEP]
        by_request = [n for n in kept if times[n] is not Binding.STEP]
        step.request, by_request_dense = _prologue(step, by_request)
        step.prologue, by_step_dense = _prologue(step, by_step)
        dense = by_request_dense | by_step_dense
        for node in kept:
            value = _input(step, node, dense[node], max(times[node], Binding.REQUEST))
            node.replace_all_uses_with(value, lambda u: u not in hoisted, propagate_meta=False)
        for node in reversed(list(step.graph.nodes)):
            if not node.users and (node in hoisted or node.op == "get_attr" or is_size(node)):
                step.graph.erase_node(node)
        return len(kept)


def _in_order(
    step: StepGraph, node: fx.Node, times: dict[fx.Node, Binding], hoisted: set[fx.Node]
) -> fx.Node:
    """What is handed over for a value: where its dimensions are permuted in memory, undo that.

    Values are handed over dense and in order, but operations behind them count on their strides,
    such as a view of heads that are next to each other. So the step permutes them back.
    """
    order = _order_in_memory(node.meta["val"])
    if order == sorted(order):
        return node
    inverse = [order.index(i) for i in range(len(order))]
    made = [node]
    for name, dims in (("in_order", order), ("as_was", inverse)):
        with step.graph.inserting_after(made[-1]):
            view = step.graph.create_node(
                "call_function",
                torch.ops.aten.permute.default,
                (made[-1], dims),
                name=f"{node.name}_{name}",
            )
        view.meta = {"val": step.shapes.evaluate(view), ORIGIN: Origin(HoistKnown.name)}
        times[view] = times[node]
        made.append(view)
    _, handed, restored = made
    node.replace_all_uses_with(
        restored, lambda u: u not in hoisted and u is not handed, propagate_meta=False
    )
    hoisted.add(handed)
    return handed


def _order_in_memory(value: Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost; as they are where memory has gaps."""
    sizes, strides = map(hints, (value.shape, value.stride()))
    order = sorted(range(value.ndim), key=lambda d: -strides[d])
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return list(range(value.ndim))
        expected *= sizes[dim]
    return order


def _input(step: StepGraph, node: fx.Node, dense: Tensor, binding: Binding) -> fx.Node:
    """An input behind all others that takes a hoisted value, laid out densely."""
    with step.graph.inserting_after(step.inputs[-1]):
        made = step.graph.create_node("placeholder", node.name, name=f"known_{node.name}")
    made.target = made.name
    known = Known(node.name, binding, TensorSpec.of(dense))
    made.meta = {KNOWN: known, "val": dense, ORIGIN: Origin(HoistKnown.name)}
    return made


def _prologue(
    step: StepGraph, values: Sequence[fx.Node]
) -> tuple[fx.GraphModule | None, dict[fx.Node, Tensor]]:
    """A graph from the model's inputs to the values, laid out densely, and what they look like."""
    if not values:
        return None, {}
    needed, queue = set(values), list(values)
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in needed]
        needed.update(new)
        queue += new
    needed.update(step.inputs[: step.model_inputs])
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in step.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    outputs = []
    for node in values:
        dense = graph.create_node(
            "call_function",
            torch.ops.aten.clone.default,
            (copied[node],),
            {"memory_format": torch.contiguous_format},
            name=f"{node.name}_dense",
        )
        dense.meta["val"] = step.shapes.evaluate(dense)
        outputs.append(dense)
    graph.output(tuple(outputs))
    found = dict(zip(values, (dense.meta["val"] for dense in outputs), strict=True))
    return fx.GraphModule(step.module, graph), found
