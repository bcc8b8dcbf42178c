"""Binding times: when the value of a node is known, and what of it is worth keeping.

A value that depends on weights alone is constant; one that depends on inputs which stay for a whole
trajectory (class, text) is known per request; one that depends on the timestep too is known per
step, for a sampler's timesteps are fixed before it starts; all else is dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from cachegraph.errors import InputError, nearest
from cachegraph.spec import TensorSpec


class Binding(IntEnum):
    """When a value is known, the earliest first."""

    CONSTANT = 0  # when the model is compiled
    REQUEST = 1  # when a trajectory begins
    STEP = 2  # when a trajectory begins, and differs from step to step
    DYNAMIC = 3  # when the step runs


@dataclass(frozen=True)
class Known:
    """A value that a prologue computes and a step's graph takes as an input.

    Attributes:
        name: of the node that made it; the same in all variants that use the value.
        binding: REQUEST or STEP.
        spec: shape and dtype, for one step.
    """

    name: str
    binding: Binding
    spec: TensorSpec


@dataclass(frozen=True)
class Roofline:
    """What decides whether a value is kept or computed again, in bytes of memory traffic.

    Attributes:
        flops_per_byte: arithmetic that takes as long as moving one byte. About 10 on CPUs; GPUs
            have more, but what is worth hoisting there is bound by reading weights anyway.
        launch: bytes that could be moved in the time that it takes to start an operation.
    """

    flops_per_byte: float = 10.0
    launch: float = 4096.0

    def compute(self, node: fx.Node, calls: int) -> float:
        """Cost of an operation for each of ``calls`` steps that are computed in one go."""
        if is_view(node):
            return 0.0
        moved = self.launch + sum(_nbytes(n) for n in node.all_input_nodes if n.op == "get_attr")
        return _flops(node) / self.flops_per_byte + moved / calls

    def keep(self, node: fx.Node, binding: Binding, steps: int) -> float:
        """Cost of writing a value once and reading it at every step."""
        if not isinstance(node.meta["val"], Tensor):
            return math.inf  # the pieces of a split can be kept, their tuple cannot
        written = 1.0 if binding is Binding.STEP else 1.0 / steps
        return _nbytes(node) * (1.0 + written)


def binding_times(graph: fx.Graph, given: Mapping[str, Binding]) -> dict[fx.Node, Binding]:
    """When the value of each node is known.

    Args:
        graph: of one step.
        given: input -> when it is known; inputs that are not named are dynamic. The sizes of named
            inputs are known always: every call has them.
    """
    times: dict[fx.Node, Binding] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            times[node] = given.get(node.name, Binding.DYNAMIC)
        elif is_size(node) and all(n.name in given for n in node.all_input_nodes):
            times[node] = Binding.CONSTANT
        elif node.op == "output" or _is_random(node):
            times[node] = Binding.DYNAMIC
        else:
            inputs = (times[n] for n in node.all_input_nodes)
            times[node] = max(inputs, default=Binding.CONSTANT)
    return times


def worth_hoisting(
    graph: fx.Graph, times: Mapping[fx.Node, Binding], steps: int, costs: Roofline
) -> set[fx.Node]:
    """The nodes that a prologue computes: a minimum cut.

    Every known node is put on one of two sides, hoisted or computed at every step. Hoisting pays
    for computing once, its counterpart for computing at every step; a hoisted value with a user on
    the other side is kept, and pays for that. What a hoisted node uses is hoisted too. The cheapest
    such assignment is a minimum cut between both sides (project selection; Picard 1976).

    Args:
        graph: of one step.
        times: from :func:`binding_times`.
        steps: that share the graph.
        costs: of computing and of keeping.
    """
    known = [n for n in graph.nodes if n.op == "call_function" and times[n] < Binding.DYNAMIC]
    known = [n for n in known if not is_size(n)]
    flow: networkx.DiGraph[Any] = networkx.DiGraph()
    flow.add_nodes_from(("hoisted", "body"))
    returned = set(graph.output_node().all_input_nodes)
    for node in known:
        once = steps if times[node] < Binding.STEP else 1
        flow.add_edge("hoisted", node, capacity=_exact(costs.compute(node, 1)))
        # A batch of all steps reads a weight once; what no step changes is computed once at all.
        hoisted = costs.compute(node, steps) / once
        flow.add_edge(node, "body", capacity=math.inf if node in returned else _exact(hoisted))
        flow.add_edges_from((node, n) for n in node.all_input_nodes if n in flow)
        kept = ("kept", node)
        flow.add_edge(node, kept, capacity=_exact(costs.keep(node, times[node], steps)))
        for user in node.users:
            in_step = times[user] is Binding.DYNAMIC
            flow.add_edge(kept, "body" if in_step else user)
    _, (side, _) = networkx.minimum_cut(flow, "hoisted", "body")
    return {n for n in known if n in side}


def _exact(cost: float) -> float:
    """A cost in whole 1024ths of a byte: what is equally good must not be told apart by rounding.

    Sums of floats depend on their order, which differs from run to run.
    """
    return cost if cost == math.inf else round(cost * 1024)


def is_size(node: fx.Node) -> bool:
    """True where the node is a number, such as the batch."""
    return node.op == "call_function" and isinstance(
        node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool
    )


def model_bindings(
    inputs: Sequence[str], timestep: str | None, varying: Sequence[str] = ()
) -> tuple[Binding, ...]:
    """When each of a model's inputs is known.

    Args:
        inputs: names; the first that is not the timestep is what is denoised.
        timestep: name of the timestep. Without one, nothing is taken for known: some input that
            differs from step to step goes by a name that was not recognised.
        varying: further inputs that differ from step to step.

    Raises:
        InputError: the model has no such input.
    """
    if isinstance(varying, str):
        raise InputError(
            "varying: a text instead of a list", expected=f"names in a list: [{varying!r}]"
        )
    for name in varying:
        if name not in inputs:
            raise InputError(
                f"varying: unknown input {name!r}",
                expected=f"one of {', '.join(inputs)}",
                remedy=nearest(name, inputs),
            )
    if timestep is None:
        return (Binding.DYNAMIC,) * len(inputs)
    latent = next((name for name in inputs if name != timestep), timestep)
    dynamic = {latent, *varying}
    return tuple(
        Binding.DYNAMIC if n in dynamic else Binding.STEP if n == timestep else Binding.REQUEST
        for n in inputs
    )


def hints(sizes: Sequence[int | torch.SymInt]) -> list[int]:
    """Sizes or strides, with those of the example inputs in place of symbols."""
    return [d if isinstance(d, int) else d.node.hint for d in sizes]


def _is_random(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropout != 0.0)
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def is_view(node: fx.Node) -> bool:
    """True where the result is, or may be, another view of the first operand."""
    target: Any = node.target
    if not hasattr(target, "_schema"):
        return True  # operator.getitem, arithmetic on sizes
    return bool(target.is_view) or target is torch.ops.aten._unsafe_view.default


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return _numel(value) * value.dtype.itemsize if isinstance(value, Tensor) else 0


def _numel(value: Any) -> int:
    """Elements, with the sizes of the example inputs in place of symbols."""
    if isinstance(value, list | tuple):
        return sum(map(_numel, value))
    if not isinstance(value, Tensor):
        return 0
    return math.prod(hints(value.shape))


def _flops(node: fx.Node) -> int:
    """Multiply-adds count twice; what is no product counts one an element."""
    inner = {
        torch.ops.aten.linear.default: (1, -1),
        torch.ops.aten.mm.default: (1, 0),
        torch.ops.aten.bmm.default: (1, -2),
        torch.ops.aten.addmm.default: (2, 0),
        torch.ops.aten.matmul.default: (1, -2),
    }
    value = node.meta["val"]
    if node.target not in inner:
        return _numel(value)
    position, axis = inner[node.target]
    operand: Any = node.args[position]
    return 2 * _numel(value) * hints(operand.meta["val"].shape)[axis]
