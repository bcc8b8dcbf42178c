"""Graphs of partial steps without the choice of tokens, to time what choosing costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .backends import AheadOfTime, get_backend
from .graph import CONSTANT, StepGraph, copy_module
from .known import StepFunction
from .slot import ConstantKind
from .spec import TensorSpec

aten = torch.ops.aten


def without_choice(step: StepGraph, backend: str) -> StepFunction | None:
    """The step with as many tokens as it recomputes, taken as they lie.

    It recomputes the first k tokens, a slice, and hands their new values out as they are. So what
    it spends less is what is spent on scores, orders, picking, gathering and scattering; and a step
    that computes all tokens makes no orders for the steps behind it.

    Args:
        step: the lowered graph of a variant.
        backend: that runs it.

    Returns:
        A function called as the variant's; None where the variant has to do with no choice, or the
        backend compiles ahead of time.
    """
    module = copy_module(step.module)
    tokens = {
        node.name
        for node in step.inputs
        if CONSTANT in node.meta and node.meta[CONSTANT].kind is ConstantKind.TOKENS
    }
    extras = sum(map(len, step.variant.extras))
    if not tokens and not extras:
        return None
    outputs = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    count = len(outputs)
    fresh = _take_first(module.graph, tokens)
    kept = [fresh.get(node, node) for node in outputs[: count - extras]]
    # What later choices go by stands behind all else; in its place stands anything.
    outputs = [*kept, *kept[:1] * extras, *(node for node in fresh.values() if node not in kept)]
    module.graph.output_node().args = (tuple(outputs),)
    module.graph.eliminate_dead_code()
    module.recompile()
    specs = [TensorSpec.of(n.meta["val"]) for n in step.inputs]
    chosen = get_backend(backend)
    if isinstance(chosen, AheadOfTime):
        return None  # compiling a graph that nobody will run takes minutes
    run = chosen.load(module, specs)

    def call(*given: Tensor) -> Sequence[Tensor]:
        return run(*given)[:count]

    return call


def _take_first(graph: fx.Graph, tokens: set[str]) -> dict[fx.Node, fx.Node]:
    """Slices in place of gathers, nothing in place of scatters; scatter -> what it scattered."""
    fresh = {}
    for node in list(graph.nodes):
        if node.target not in (aten.gather.default, aten.scatter.src, aten.sym_size.int):
            continue
        picked = node.args[0] if node.target is aten.sym_size.int else node.args[2]
        counter = _counter(picked, tokens)
        if counter is None:
            continue
        with graph.inserting_before(node):
            if node.target is aten.scatter.src:
                if node.meta["val"].ndim == 3:  # a site's value; ages and scores are not kept
                    fresh[node] = node.args[3]
                node.replace_all_uses_with(node.args[0])
                continue
            count = graph.call_function(aten.sym_size.int, (counter, 0))
            if node.target is aten.sym_size.int:
                node.replace_all_uses_with(count)
            else:
                first = graph.call_function(aten.slice.Tensor, (node.args[0], 1, 0, count))
                node.replace_all_uses_with(first)
    return fresh


def _counter(picked: object, tokens: set[str]) -> fx.Node | None:
    """The input whose length says how many tokens are picked."""
    while isinstance(picked, fx.Node) and picked.op == "call_function":
        if picked.target is aten.index_select.default:
            counter = picked.args[2]
            return counter if isinstance(counter, fx.Node) and counter.name in tokens else None
        picked = picked.args[0] if picked.args else None
    return None
