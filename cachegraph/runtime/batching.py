"""One run of a prologue for several steps at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx


def over_steps(module: fx.GraphModule, clock: int) -> Callable[..., tuple[Tensor, ...]]:
    """A function as the graph's, but its timestep and results have steps as first dimension.

    Args:
        module: computes known values from the model's inputs.
        clock: index of the timestep among these.
    """
    return stepwise(for_vmap(module), len(module.graph.find_nodes(op="placeholder")), clock)


def stepwise(
    function: Callable[..., tuple[Tensor, ...]], count: int, clock: int
) -> Callable[..., tuple[Tensor, ...]]:
    """A function over several steps at once: of its ``count`` inputs only the timestep differs."""
    return torch.vmap(function, in_dims=tuple(0 if i == clock else None for i in range(count)))


def for_vmap(module: fx.GraphModule) -> fx.GraphModule:
    """The same, as vmap takes it.

    It has no rule for the operator that takes a size, and attention lays its result out otherwise
    there, so that it cannot be viewed as it was.
    """
    aten = torch.ops.aten
    attention = aten.scaled_dot_product_attention.default
    if not any(n.target in (aten.sym_size.int, attention) for n in module.graph.nodes):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target is aten.view.default:
            node.target = aten.reshape.default
    return fx.GraphModule(module, graph)
