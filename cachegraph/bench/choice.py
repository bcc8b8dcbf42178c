"""Graphs of partial steps without the choice of tokens, to time what choosing costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import fx

from cachegraph.artifact.artifact import Artifact
from cachegraph.backends import AheadOfTime, get_backend
from cachegraph.backends.aoti.backend import Aoti
from cachegraph.backends.named import named_graphs
from cachegraph.errors import BackendError
from cachegraph.graph.step_graph import CONSTANT, StepGraph, copy_module
from cachegraph.plan.slot import ConstantKind
from cachegraph.runtime.known import StepFunction

aten = torch.ops.aten


def without_choice(artifact: Artifact, graphs: Sequence[StepGraph]) -> list[StepFunction | None]:
    """The steps with as many tokens as they recompute, taken as they lie.

    They recompute the first k tokens, a slice, and hand their new values out as they are. So what
    they spend less is what is spent on scores, orders, picking, gathering and scattering; and a
    step that computes all tokens makes no orders for the steps behind it.

    Args:
        artifact: whose backend runs them.
        graphs: the lowered graph of each variant.

    Returns:
        A function a variant, called as the variant's; None where it has to do with no choice.

    Raises:
        BackendError: the backend takes graphs of named outputs, as ONNX does.
    """
    chosen = get_backend(artifact.backend)
    bare = {g.variant.name: module for g in graphs if (module := _bare(g)) is not None}
    if not isinstance(chosen, AheadOfTime):
        inputs = {v.name: [p.spec for p in v.interface.inputs] for v in artifact.program.variants}
        loaded = {name: chosen.load(module, inputs[name]) for name, module in bare.items()}
    elif bare:
        loaded = _compiled(chosen, artifact, bare)
    else:
        loaded = {}
    return [
        _first(loaded[g.variant.name], len(g.outputs)) if g.variant.name in loaded else None
        for g in graphs
    ]


def _compiled(
    backend: AheadOfTime, artifact: Artifact, bare: Mapping[str, fx.GraphModule]
) -> dict[str, StepFunction]:
    """Compiled side by side, and cached as other graphs are."""
    if not isinstance(backend, Aoti):
        raise BackendError(
            "steps cannot be timed without their choice of tokens",
            place=f"--backend {backend.name}",
            expected="eager, inductor or aoti",
            remedy="leave out --choice",
        )
    named = named_graphs(artifact.program, artifact.graphs)
    graphs = {name: replace(named[name], module=module) for name, module in bare.items()}
    with TemporaryDirectory(prefix="cachegraph-") as folder:
        backend.emit(graphs, artifact.weights, Path(folder), lambda _: None)
        opened = backend.open(graphs, artifact.weights, Path(folder), artifact.device)
    return dict(zip(graphs, opened, strict=True))


def _first(run: StepFunction, count: int) -> StepFunction:
    return lambda *given: run(*given)[:count]


def _bare(step: StepGraph) -> fx.GraphModule | None:
    """The graph without choice; behind its outputs stand others, which keep their work alive."""
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
    fresh = _take_first(module.graph, tokens)
    kept = [fresh.get(node, node) for node in outputs[: len(outputs) - extras]]
    # What later choices go by stands behind all else; in its place stands anything.
    outputs = [*kept, *kept[:1] * extras, *(node for node in fresh.values() if node not in kept)]
    module.graph.output_node().args = (tuple(outputs),)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


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
