"""Whether a prologue can run for several steps at once, tried on shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.graph.step_graph import StepGraph
from cachegraph.runtime.batching import for_vmap, stepwise
from cachegraph.spec import TensorSpec


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
    module = for_vmap(step.prologue)
    inputs = list(module.graph.find_nodes(op="placeholder"))
    shapes = _Shapes(module, symbols)
    function = stepwise(shapes.run, len(inputs), clock)
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
