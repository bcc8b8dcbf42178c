"""Compiled step graphs are whole graphs: torch.compile and torch.export take them as they are."""
# ruff: noqa: TID251 - what torch.compile did is told by its private counters only

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

import cachegraph as cg
from cachegraph.runtime.known import Prologues
from cachegraph.spec import TensorSpec
from tests.models import (
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    relative_error,
    shared_dit,
)

STEPS = 6
VARIANTS = ("compute", "reuse")


@pytest.fixture(scope="module")
def artifact() -> cg.Artifact:
    made = compile_traced(*shared_dit(depth=1), fora(STEPS, 3), backend="inductor")
    assert len(made.graphs) == len(VARIANTS)
    return made


@pytest.fixture
def fresh() -> None:
    """Nothing is compiled yet."""
    torch.compiler.reset()
    counters.clear()


def runner_of(artifact: cg.Artifact, functions: list[Callable[..., Any]]) -> cg.Runner:
    before = Prologues.of(artifact.program, artifact.prologues, batched=False)
    return cg.Runner(artifact.program, functions, artifact.weights, prologues=before)


def calls_of_variants(artifact: cg.Artifact, batch: int) -> list[list[Tensor]]:
    """What each variant's graph is called with in a trajectory, at the first of its steps."""
    seen: dict[int, list[Tensor]] = {}

    def spy(index: int, graph: fx.GraphModule) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            seen.setdefault(index, list(tensors))
            return graph(*tensors)

        return call

    functions = [spy(i, graph) for i, graph in enumerate(artifact.graphs)]
    run = runner_of(artifact, functions)
    for call in dit_steps(STEPS, batch=batch):
        run(*call)
    return [seen[i] for i in range(len(functions))]


def play(run: cg.Runner, batch: int) -> list[Tensor]:
    return [run(*call) for call in dit_steps(STEPS, batch=batch, seed=batch)]


def eager(artifact: cg.Artifact, batch: int) -> list[Tensor]:
    return play(cg.load(artifact, backend="eager"), batch)


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
def test_a_variant_is_one_graph(artifact: cg.Artifact, fresh: None, variant: int) -> None:
    inputs = calls_of_variants(artifact, 2)[variant]
    compiled = torch.compile(artifact.graphs[variant], fullgraph=True, backend="eager")
    with torch.no_grad():
        found, wanted = compiled(*inputs), artifact.graphs[variant](*inputs)
    assert all(map(torch.equal, found, wanted))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    torch.compiler.reset()
    explained = torch._dynamo.explain(artifact.graphs[variant])(*inputs)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_inductor_compiles_each_variant_once(artifact: cg.Artifact, fresh: None) -> None:
    run = cg.load(artifact)
    assert worst(play(run, 2), eager(artifact, 2)) <= 1e-5
    assert counters["stats"]["unique_graphs"] == len(VARIANTS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            for _ in range(2):
                assert worst(play(run, batch), eager(artifact, batch)) <= 1e-5
        assert worst(play(cg.load(artifact), 4), eager(artifact, 4)) <= 1e-5
    assert counters["stats"]["unique_graphs"] == len(VARIANTS)

    assert worst(play(run, 1), eager(artifact, 1)) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 2 * len(VARIANTS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 1, 5):
            assert worst(play(run, batch), eager(artifact, batch)) <= 1e-5
    assert not counters["graph_break"]


def test_inductor_may_begin_with_a_batch_of_one(artifact: cg.Artifact, fresh: None) -> None:
    run = cg.load(artifact)
    for batch in (1, 2):
        play(run, batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 1, 2):
            assert worst(play(run, batch), eager(artifact, batch)) <= 1e-5


def test_inductor_leaves_no_mark_on_the_sampler_s_tensors(
    artifact: cg.Artifact, fresh: None
) -> None:
    """A mark for dynamic sizes would bind what else the sampler compiles."""
    run = cg.load(artifact)
    for call in dit_steps(STEPS, batch=3):
        run(*call)
        assert [vars(tensor) for tensor in call] == [{}, {}, {}]


def test_no_graph_is_built_while_a_trajectory_runs(artifact: cg.Artifact, fresh: None) -> None:
    """One call of the sampler launches one graph: the counts of graphs and of steps agree."""
    launched: list[int] = []

    def counted(index: int, graph: fx.GraphModule) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            launched.append(index)
            return graph(*tensors)

        return call

    functions = [counted(i, graph) for i, graph in enumerate(artifact.graphs)]
    play(runner_of(artifact, functions), 2)
    assert launched == [step.variant for step in artifact.program.steps]
    assert len(launched) == STEPS


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
def test_a_lowered_graph_can_be_exported_again(artifact: cg.Artifact, variant: int) -> None:
    graph = artifact.graphs[variant]
    specs = [port.spec for port in artifact.program.variants[variant].interface.inputs]
    inputs = calls_of_variants(artifact, 2)[variant]
    assert [TensorSpec.of(t).dtype for t in inputs] == [spec.dtype for spec in specs]
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = [
        {dim: batch for dim, size in enumerate(spec.shape) if not isinstance(size, int)}
        for spec in specs
    ]
    program = torch.export.export(graph, tuple(inputs), dynamic_shapes=tuple(shapes))
    for size in (2, 5):
        again = calls_of_variants(artifact, size)[variant]
        with torch.no_grad():
            found, wanted = program.module()(*again), graph(*again)
        assert all(map(torch.equal, found, wanted))
        assert len(found) == len(wanted)


def test_weights_are_shared_over_variants(artifact: cg.Artifact) -> None:
    model_weights = {t.data_ptr() for t in artifact.weights.values()}
    used = []
    for graph in artifact.graphs:
        names = [str(node.target) for node in graph.graph.find_nodes(op="get_attr")]
        tensors = [operand(graph, name) for name in names]
        used.append({name: t.data_ptr() for name, t in zip(names, tensors, strict=True)})
        assert set(used[-1].values()) <= model_weights
    for one, other in pairwise(used):
        both = set(one) & set(other)
        assert both
        assert [one[name] for name in both] == [other[name] for name in both]


def operand(graph: fx.GraphModule, name: str) -> Tensor:
    holder, _, leaf = name.rpartition(".")
    return getattr(graph.get_submodule(holder), leaf)
