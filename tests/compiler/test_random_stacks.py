"""Any stack under any forecast: the compiled graphs agree with hooks that do the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import SiteError
from cachegraph.methods.bases import BASES
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Compute, Forecast, Reuse
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from tests.compiler.test_random_plans import TwoStreams, compiled, inputs
from tests.models import compile_traced, dit_steps, fill_random, play, relative_error, tiny_dit
from tests.tiny import WIDTH, Block, call

DEPTH = 4


class Chain(nn.Module):
    """Four blocks, each adding to the stream that the one before hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fill_random(Chain()).eval()


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> TracedModel:
    return trace(model, call(0), dynamic_batch=False)


# --- schedules


@st.composite
def policies(draw: st.DrawFn, steps: int) -> dict[str, Any]:
    """A forecast of any basis, or a policy that reuses, with a correction now and then."""
    others = st.sets(st.integers(1, steps - 1), min_size=1, max_size=3)
    full = [0, *sorted(draw(others))]
    if draw(st.integers(0, 5)) == 0:
        reused = sorted(set(range(steps)) - set(full))
        policy = {"method": "table", "reuse_steps": reused}
        correction = {"method": "goc", "weight": 0.5, "steps": [s for s in reused if s > 1][-1:]}
        corrected = correction["steps"] and draw(st.booleans())
        return {"policy": policy, **({"correction": correction} if corrected else {})}
    basis = draw(st.sampled_from(sorted(BASES)))
    keys = {"method": "forecast", "basis": basis, "full_steps": full}
    if BASES[basis].order is not None:
        keys["order"] = draw(st.integers(0, min(2, len(full) - 1)))
    return {"policy": keys}


@st.composite
def filters(draw: st.DrawFn) -> dict[str, Any]:
    """The whole stack, or ranges of blocks beside each other, and other sites with them or not."""
    kinds, keys = ["stack"], {}
    if draw(st.booleans()):
        keys["relative"] = draw(st.booleans())
    if draw(st.integers(0, 2)):
        cuts = sorted(draw(st.sets(st.integers(0, DEPTH), min_size=2, max_size=4)))
        pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
        ranges = draw(st.permutations([f"blocks[{a}:{b}]" for a, b in pairs]))
        ranges = [r.replace("[0:", "[:").replace(f":{DEPTH}]", ":]") for r in ranges]
        keys["include"] = list(ranges)
        if draw(st.booleans()):
            kinds += draw(st.sampled_from([["attn"], ["mlp"], ["attn", "mlp"]]))
            keys["include"].append("blocks.*")
    elif draw(st.booleans()):
        kinds.append("attn")
    return {"sites": {"kinds": kinds, **keys}}


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(3, 7))
    return {"cachegraph": 1, "steps": steps, **draw(policies(steps)), **draw(filters())}


def check(model: nn.Module, traced: TracedModel, keys: dict[str, Any], verified: bool) -> None:
    schedule = load_schedule(keys)
    plan = plan_of(schedule, traced)
    run = compiled(traced, plan, verified=verified, varying=())
    reference = cg.ReferenceRunner.of_plan(model, traced, plan, schedule)
    kept = plan.cache_bytes({})
    for step in range(plan.steps):
        given = call(step)
        assert relative_error(run(*given), reference(*given)) <= 1e-5, (step, keys)
        assert run.cache_bytes() == kept[step], (step, keys)


@pytest.mark.parametrize(("cases", "verified"), [(200, False), (8, True)])
def test_compiled_graphs_agree_with_the_reference(
    model: nn.Module, traced: TracedModel, cases: int, verified: bool
) -> None:
    seen: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        suppress_health_check=tuple(hypothesis.HealthCheck),
    )
    @hypothesis.given(schedules())
    def every_schedule(keys: dict[str, Any]) -> None:
        check(model, traced, keys, verified)
        seen[keys["policy"].get("basis", "table")] += 1
        seen["ranges"] += "include" in keys["sites"]
        seen["values"] += keys["sites"].get("relative") is False

    every_schedule()
    if cases > 100:
        assert min(seen[name] for name in (*BASES, "table", "values")) > 10, seen
        assert seen["ranges"] > 50


# --- what the words mean


def asked(sites: dict[str, Any], **policy: Any) -> dict[str, Any]:
    keys = policy or {"method": "fora", "interval": 3, "count": "up"}
    return {"cachegraph": 1, "steps": 7, "policy": keys, "sites": sites}


@torch.no_grad()
def test_a_range_is_what_a_plain_loop_does(model: Chain, traced: TracedModel) -> None:
    """Blocks 1 and 2 at steps 0, 3 and 6; else what they added there is added again."""
    schedule = load_schedule(asked({"kinds": ["stack"], "include": ["blocks[1:3]"]}))
    plan = plan_of(schedule, traced)
    run = compiled(traced, plan, verified=True, varying=())
    added = torch.zeros(())
    for step in range(7):
        x, t = call(step)
        c = model.time(t.view(-1, 1, 1))
        before = model.blocks[0](x, c)
        if step % 3 == 0:
            added = model.blocks[2](model.blocks[1](before, c), c) - before
        wanted = model.head(model.blocks[3](before + added, c))
        assert relative_error(run(x, t), wanted) <= 1e-5, f"step {step}"


def test_one_slot_for_all_blocks(traced: TracedModel) -> None:
    """Whatever else the policy rules, sites inside of a skipped stack keep nothing."""
    whole = plan_of(load_schedule(asked({"kinds": ["stack"]})), traced)
    both = plan_of(load_schedule(asked({"kinds": ["stack", "attn", "mlp"]})), traced)
    assert whole.cache_bytes({}) == both.cache_bytes({})
    modules = plan_of(load_schedule(asked({"kinds": ["attn", "mlp"]})), traced)
    assert max(modules.cache_bytes({})) == 2 * DEPTH * max(whole.cache_bytes({}))
    assert all(whole.is_skipped(whole.rows[1], site) for site in range(2 * DEPTH))
    assert not any(whole.is_skipped(whole.rows[3], site) for site in range(2 * DEPTH))
    assert [type(row[-1]) for row in whole.rows[:4]] == [Compute, Reuse, Reuse, Compute]


def test_the_residual_and_the_value_differ(model: nn.Module, traced: TracedModel) -> None:
    results = []
    for relative in (True, False):
        schedule = load_schedule(asked({"kinds": ["stack"], "relative": relative}))
        run = compiled(traced, plan_of(schedule, traced), verified=True, varying=())
        results.append([run(*call(step)) for step in range(2)])
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[0][1], results[1][1]) > 0.01


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (["blocks[0:2]", "blocks[1:3]"], "blocks[0:2] and blocks[1:3] have blocks in common"),
        (["blocks[7:9]"], "the model has no site for blocks[7:9] together"),
        (["layers[0:2]"], "the model has no site for layers[0:2] together"),
        (["blocks.0.*"], "the model has no site of kind stack"),
    ],
)
def test_stacks_that_cannot_be(traced: TracedModel, include: list[str], message: str) -> None:
    with pytest.raises(SiteError) as caught:
        plan_of(load_schedule(asked({"kinds": ["stack"], "include": include})), traced)
    assert message in str(caught.value)


def test_streams_that_are_no_chain_are_refused() -> None:
    found = trace(fill_random(TwoStreams()), inputs(0), dynamic_batch=False)
    with pytest.raises(SiteError, match="no site for all blocks together"):
        plan_of(load_schedule(asked({"kinds": ["stack"]})), found)


# --- every backend


ONNX = pytest.param("onnx", marks=pytest.mark.onnx)


EVERY_BASIS = [
    pytest.param(basis, marks=[] if basis == "lagrange" else pytest.mark.slow)
    for basis in sorted(BASES)
]


@pytest.mark.parametrize("basis", EVERY_BASIS)
@pytest.mark.parametrize("backend", ["inductor", "aoti", ONNX])
def test_a_stack_forecast_on_every_backend(backend: str, basis: str, tmp_path: Path) -> None:
    model, calls = tiny_dit(), dit_steps(7)
    sites = {"kinds": ["stack", "mlp"], "include": ["blocks[1:]", "blocks.0.*"]}
    policy = {"method": "forecast", "basis": basis, "full_steps": [0, 1, 4]}
    if BASES[basis].order is not None:
        policy["order"] = 1
    keys = asked(sites, **policy)
    found = trace(model, calls[0])
    artifact = compile_traced(model, found, keys, backend=backend, out=tmp_path / "a.cgraph")
    run, reference = cg.load(artifact), cg.ReferenceRunner(model, keys)
    assert any(isinstance(row[-1], Forecast) for row in artifact.program.rows)
    for got, wanted in zip(play(run, calls), play(reference, calls), strict=True):
        assert relative_error(got, wanted) <= 1e-5
