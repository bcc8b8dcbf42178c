"""hoist-known: golden difference, equal results, what is found, the cut, broken prologues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cachegraph as cg
from cachegraph.compiler.compile import build
from cachegraph.compiler.pipeline import PassReport, rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph.binding import Binding, Roofline, binding_times, worth_hoisting
from cachegraph.graph.step_graph import Pass, StepGraph
from cachegraph.graph.text import difference, graph_text
from cachegraph.model.trace import TracedModel
from cachegraph.passes import PIPELINE
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from cachegraph.zoo import PixArt
from tests.models import fill_random, fora, shared_dit, tiny_dit
from tests.tiny import Edit, check_golden

linear = torch.ops.aten.linear.default


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return shared_dit(depth=1)[1]


def test_golden(traced: TracedModel, update_golden: bool) -> None:
    texts: dict[str, str] = {}

    def look(step: StepGraph, report: PassReport) -> None:
        if step.variant.name == "variant1":
            texts[report.pass_name] = graph_text(step)

    rewrite(traced, plan_of(load_schedule(fora(6, 3)), traced), on_pass=look)
    change = difference(texts["slice-columns"], texts["hoist-known"], ("before", "after"))
    check_golden("hoist_known", {"a reused block": change}, update_golden)


def tiny_pixart() -> PixArt:
    model = PixArt(
        input_size=8, hidden_size=32, depth=2, num_heads=2, caption_channels=8, model_max_length=5
    )
    fill_random(model)
    return model


def trajectory(model: nn.Module, steps: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    (x, t, *rest), kwargs = model.example_inputs(4)  # type: ignore[operator]
    rest += kwargs.values()
    return [
        (torch.randn(x.shape, generator=generator), torch.full_like(t, 950 - 90 * step), *rest)
        for step in range(steps)
    ]


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
def test_equal_bit_for_bit_and_close_where_products_are_batched(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    args, kwargs = model.example_inputs(4)  # type: ignore[operator]
    calls = trajectory(model, 6)
    schedule = fora(6, 3)
    off = ["hoist-known", "slice-columns"]
    plain = cg.compile(model, schedule, args, kwargs, backend="eager", disable=off)
    hoisted = cg.compile(model, schedule, args, kwargs, backend="eager")
    assert not plain.prologues
    assert hoisted.prologues
    reference, exact = cg.load(plain), cg.load(hoisted)
    wanted = [reference(*call) for call in calls]
    assert all(torch.equal(exact(*call), w) for call, w in zip(calls, wanted, strict=True))
    batched = cg.load(hoisted)
    batched._prologues = type(batched._prologues).of(
        hoisted.program, hoisted.prologues, batched=True
    )
    batched.reset()
    for _ in range(2):  # the second time all timesteps are known
        found = [batched(*call) for call in calls]
    for here, there in zip(found, wanted, strict=True):
        assert (here - there).norm() <= 1e-6 * there.norm()


def test_modulation_and_timestep_embedding_leave_the_steps_of_dit(traced: TracedModel) -> None:
    plan = plan_of(load_schedule(fora(6, 3)), traced)
    full, reused = rewrite(traced, plan)
    layers = [str(n.args[1]) for n in full.graph.find_nodes(op="call_function", target=linear)]
    assert [name for name in layers if "ada" in name or "embedder" in name] == []
    assert len(layers) == 5  # qkv, proj, fc1, fc2 and the final one
    assert len(reused.graph.find_nodes(op="call_function", target=linear)) == 1
    assert {known.binding for known in full.known} == {Binding.STEP}
    assert len(full.known) == 8  # 6 chunks of the block, 2 of the final layer
    assert len(reused.known) == 4  # its 2 gates, and the final layer's


def test_keys_and_values_of_the_text_are_computed_once_a_request() -> None:
    model = tiny_pixart()
    args, kwargs = model.example_inputs(2)
    built = build(model, fora(6, 3), args, kwargs)
    full, _ = built.graphs
    by_request = [known for known in full.known if known.binding is Binding.REQUEST]
    assert len([k for k in by_request if k.spec.shape[1] == 5 or 5 in k.spec.shape]) >= 2
    assert full.request is not None
    names = {str(n.target) for n in full.request.graph.find_nodes(op="get_attr")}
    assert {n for n in names if "kv_linear.weight" in n} == {
        f"blocks.{i}.cross_attn.kv_linear.weight" for i in range(2)
    }
    left = {str(n.target) for n in full.graph.find_nodes(op="get_attr")}
    assert not [n for n in left if "kv_linear" in n or "t_block" in n or "y_embedder" in n]
    # What is known per request is computed once, not at every step.
    uncached = build(model, {**fora(6, 3), "policy": {"method": "full"}}, args, kwargs)
    assert uncached.cost.flops[1] < uncached.cost.full_flops == uncached.cost.flops[0]


# --- the minimum cut


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> fx.Graph:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(64, 64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return function(x, t, self.w)

    program = torch.export.export(Model(), inputs).run_decompositions({})
    module: Any = program.module(check_guards=False)
    return module.graph


def hoisted_names(function: Callable[..., Tensor], *inputs: Tensor, steps: int = 10) -> set[str]:
    graph = graph_of(function, *inputs)
    times = binding_times(graph, {"t": Binding.STEP})
    found = worth_hoisting(graph, times, steps, Roofline())
    return {str(node.target) for node in found}


def test_products_are_hoisted_and_what_makes_them_large_is_not() -> None:
    """A row of 64 numbers is kept, not the 4096 copies of it that the step needs."""
    x, t = torch.zeros(4096, 64), torch.zeros(1, 64)
    found = hoisted_names(lambda x, t, w: x * (t @ w).expand(4096, 64).exp(), x, t)
    assert "aten.matmul.default" in found or "aten.mm.default" in found
    assert "aten.exp.default" not in found


def test_what_is_cheap_to_compute_and_large_to_keep_is_not_hoisted() -> None:
    x, t = torch.zeros(4096, 64), torch.zeros(4096, 64)
    assert hoisted_names(lambda x, t, w: x + t.sin(), x, t) == set()


def test_what_a_model_returns_stays_in_the_step() -> None:
    x, t = torch.zeros(4, 64), torch.zeros(4, 64)
    assert hoisted_names(lambda x, t, w: t @ w, x, t) == set()


def test_random_numbers_are_never_known() -> None:
    x, t = torch.zeros(4, 64), torch.zeros(4, 64)
    found = hoisted_names(lambda x, t, w: x + torch.rand_like(t) @ w, x, t)
    assert found == set()


# --- prologues that a broken pass leaves behind


def forgets_prologue(step: StepGraph) -> None:
    step.prologue = None


def returns_other_order(step: StepGraph) -> None:
    assert step.prologue is not None
    output = step.prologue.graph.output_node()
    [values] = output.args
    output.args = (tuple(reversed(values)),)  # type: ignore[arg-type, call-overload]


def loses_value(step: StepGraph) -> None:
    assert step.prologue is not None
    output = step.prologue.graph.output_node()
    [values] = output.args
    output.args = (tuple(values)[1:],)  # type: ignore[arg-type, call-overload]


def reads_the_class_too_early(step: StepGraph) -> None:
    step.bindings = (Binding.DYNAMIC, Binding.STEP, Binding.DYNAMIC)


def records_wrong_shape(step: StepGraph) -> None:
    assert step.prologue is not None
    node = step.prologue.graph.find_nodes(op="call_function", target=linear)[0]
    node.meta["val"] = node.all_input_nodes[0].meta["val"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (forgets_prologue, "no prologue computes"),
        (returns_other_order, "in place of"),
        (loses_value, "a prologue returns 7 values instead of 8"),
        (reads_the_class_too_early, "is known too late for a prologue"),
        (records_wrong_shape, "recomputes to"),
    ],
)
def test_broken_prologue_is_caught(
    traced: TracedModel, edit: Callable[[StepGraph], None], says: str
) -> None:
    plan = plan_of(load_schedule(fora(6, 3)), traced)
    passes: tuple[Pass, ...] = (*PIPELINE, Edit(edit, "variant0", 1))
    with pytest.raises(VerifyError, match=rf"pass edit, variant0, .*prologues agree: .*({says})"):
        rewrite(traced, plan, passes=passes)
