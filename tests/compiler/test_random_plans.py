"""Any plan that is legal: the compiled graphs agree with the plan carried out by hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.compiler import pipeline
from cachegraph.compiler.cost import PlanCost
from cachegraph.compiler.pipeline import module_weights, rewrite
from cachegraph.compiler.program import make_program, named_prologues
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Action, Compute, Forecast, Reuse, Row, makes_value
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.schedule import load_schedule
from tests.models import fill_random, full, one_thread, relative_error  # noqa: F401

WIDTH = 8
SITES = 6  # of the model below
NO_COST = PlanCost({}, (), 0, (), (), 0)


class Joint(nn.Module):
    """Attention of two streams together: a site with two values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([self.qkv[0](x), self.qkv[1](y)], dim=1)
        found = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return self.out[0](found[:, : x.shape[1]]), self.out[1](found[:, x.shape[1] :])


class Block(nn.Module):
    """Joint attention, then one mlp that serves both streams: sites attn, mlp, mlp@1."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)
        self.attn = Joint()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gate1, gate2 = self.gates(c).chunk(2, dim=-1)
        from_x, from_y = self.attn(normal(x), normal(y))
        x, y = x + gate1 * from_x, y + from_y
        return x + gate2 * self.mlp(normal(x)), y + self.mlp(normal(y))


class TwoStreams(nn.Module):
    """Two blocks; ``x (B, 4, C)``, ``y (B, 3, C)`` and ``t (B,)`` to ``(B, 4, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        c = self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x, y = block(x, y, c)
        return x + y.mean(1, keepdim=True)


def normal(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn((2, 4, WIDTH), generator=generator)
    y = torch.randn((2, 3, WIDTH), generator=generator)
    return x, y, torch.full((2,), 1 - step / 10)


# --- plans


@st.composite
def actions(draw: st.DrawFn, made: Sequence[int], kind: str) -> Action:
    """What a site may do, given the steps that have made a value of it so far."""
    if kind == "any":
        kind = draw(st.sampled_from(["compute", "reuse", "forecast"]))
    if kind == "compute" or not made:
        return Compute()
    if kind == "reuse":
        return Reuse(draw(st.sampled_from(made)))
    most = min(4, len(made))
    count = most - draw(st.integers(0, most - 1))
    chosen = draw(st.permutations(made))[:count]
    coefficients = tuple(draw(st.floats(-2, 2, width=32)) for _ in chosen)
    return Forecast(tuple(sorted(chosen, reverse=True)), coefficients, draw(st.booleans()))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Row, ...]:
    """A legal table of 3 to 6 steps, some of which do the same at every site."""
    made: list[list[int]] = [[] for _ in range(SITES)]
    rows: list[Row] = []
    for step in range(draw(st.sampled_from([3, 4, 5, 6, 6]))):
        kind = draw(st.sampled_from(["any", "any", "compute", "compute", "reuse", "forecast"]))
        row = tuple(draw(actions(steps, kind)) for steps in made)
        for steps, action in zip(made, row, strict=True):
            if makes_value(action):
                steps.append(step)
        rows.append(row)
    return tuple(rows)


# --- both ways to carry them out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fill_random(TwoStreams())


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> TracedModel:
    traced = trace(model, inputs(0), dynamic_batch=False)
    assert [site.name.partition(".")[2] for site in traced.sites] == [
        f"{block}.{site}" for block in (0, 1) for site in ("attn", "mlp", "mlp@1")
    ]
    return traced


def compiled(
    traced: TracedModel, plan: Plan, *, verified: bool, varying: Sequence[str] = ("y",)
) -> Runner:
    with nullcontext() if verified else mock.patch.object(pipeline, "verify"):
        graphs = rewrite(traced, plan, varying=varying)
    schedule = load_schedule(full(plan.steps))
    program = make_program(traced, schedule, plan, graphs, NO_COST)
    before = Prologues.of(program, named_prologues(graphs), batched=False)
    functions = [graph.module for graph in graphs]
    return Runner(program, functions, module_weights(traced), prologues=before)


def check(model: nn.Module, traced: TracedModel, rows: tuple[Row, ...], verified: bool) -> None:
    plan = make_plan(traced.sites, rows)
    run = compiled(traced, plan, verified=verified)
    schedule = load_schedule(full(plan.steps))
    reference = cg.ReferenceRunner.of_plan(model, traced, plan, schedule)
    kept = plan.cache_bytes({})
    for step in range(plan.steps):
        call = inputs(step)
        assert relative_error(run(*call), reference(*call)) <= 1e-5, f"step {step}"
        assert run.cache_bytes() == kept[step], f"step {step}"


@pytest.mark.parametrize(("cases", "verified"), [(200, False), (8, True)])
def test_compiled_graphs_agree_with_the_reference(
    model: nn.Module, traced: TracedModel, cases: int, verified: bool
) -> None:
    seen: Counter[str] = Counter()

    # Verifying takes most of the time, so few cases do it.
    @hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        suppress_health_check=tuple(hypothesis.HealthCheck),
    )
    @hypothesis.given(tables())
    def every_table(rows: tuple[Row, ...]) -> None:
        check(model, traced, rows, verified)
        seen.update(describe(rows))

    every_table()
    assert seen["tables"] >= cases
    if cases > 100:  # what a table may hold was in many of them
        assert min(seen[f"forecast of {n}"] for n in (1, 2, 3, 4)) > 5
        assert min(seen["reuse of an older value"], seen["use of a kept forecast"]) > 20
        assert seen["reuse of everything"] > 20


def describe(rows: tuple[Row, ...]) -> Counter[str]:
    """What is in a table."""
    found = Counter({"tables": 1})
    for step, row in enumerate(rows):
        found["reuse of everything"] += not any(isinstance(a, Compute) for a in row)
        for site, action in enumerate(row):
            match action:
                case Reuse(source):
                    between = [r[site] for r in rows[source + 1 : step]]
                    found["reuse of an older value"] += any(map(makes_value, between))
                    found["use of a kept forecast"] += isinstance(rows[source][site], Forecast)
                case Forecast(sources):
                    found[f"forecast of {len(sources)}"] += 1
    return found
