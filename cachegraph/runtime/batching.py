"""One run of a prologue for several steps at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.graph.step_graph import StepGraph, copy_graph
from cachegraph.spec import TensorSpec


def over_steps(module: fx.GraphModule, clock: int) -> Callable[..., tuple[Tensor, ...]]:
    """A function as the graph's, but its timestep and results have steps as first dimension.

    Args:
        module: computes known values from the model's inputs.
        clock: index of the timestep among these.
    """
    return _over_steps(_for_vmap(module), len(_inputs(module)), clock)


def batching_problem(step: StepGraph, clock: int | None, symbols: Mapping[str, int]) -> str:
    """Why a variant's prologue cannot run for several steps at once; empty where it can.

    It is tried on shapes alone: torch knows a way for almost every operator, and no list of those
    that it knows none for.

    Args:
        step: lowered graph.
        clock: index of the timestep among the model's inputs.
        symbols: a size for every shape symbol.
    """
    if step.prologue is None or clock is None:
        return ""
    module = _for_vmap(step.prologue)
    inputs = _inputs(module)
    shapes = _Shapes(module, symbols)
    function = _over_steps(shapes.run, len(inputs), clock)
    with inputs[0].meta["val"].fake_mode, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that torch takes one step after another inside
        given = [shapes.empty(node) for node in inputs]
        given[clock] = torch.stack([given[clock]] * 2)
        try:
            function(*given)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            return str(error).partition("\n")[0].partition(". ")[0]
    return ""


class _Shapes(fx.Interpreter):
    """Runs a graph with tensors of its shapes in place of the weights."""

    def __init__(self, module: fx.GraphModule, symbols: Mapping[str, int]) -> None:
        super().__init__(module)
        self._symbols = symbols

    def run_node(self, n: fx.Node) -> Any:
        return self.empty(n) if n.op == "get_attr" else super().run_node(n)

    def empty(self, node: fx.Node) -> Tensor:
        value = node.meta["val"]
        sizes = TensorSpec.of(value).sizes(self._symbols)
        return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _over_steps(
    function: Callable[..., tuple[Tensor, ...]], count: int, clock: int
) -> Callable[..., tuple[Tensor, ...]]:
    return torch.vmap(function, in_dims=tuple(0 if i == clock else None for i in range(count)))


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _for_vmap(module: fx.GraphModule) -> fx.GraphModule:
    """The same, as vmap takes it.

    It has no rule for the operator that takes a size, and attention lays its result out otherwise
    there, so that it cannot be viewed as it was.
    """
    aten = torch.ops.aten
    attention = aten.scaled_dot_product_attention.default
    if not any(n.target in (aten.sym_size.int, attention) for n in module.graph.nodes):
        return module
    graph = copy_graph(module.graph)
    for node in graph.nodes:
        if node.target is aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target is aten.view.default:
            node.target = aten.reshape.default
    return fx.GraphModule(module, graph)
