"""Any plan that refreshes tokens: the compiled graphs agree with the plan carried out by hooks."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from cachegraph.errors import SessionError
from cachegraph.model.shapes import Shapes
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Action, Compute, Refresh, Reuse, Row
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Score, Selection
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.schedule import load_schedule
from tests.models import fill_random, full, one_thread, relative_error  # noqa: F401

WIDTH, HEADS, TOKENS = 8, 2, 16
BLOCKS = 2
KINDS = ("attn", "cross_attn", "mlp")
NO_COST = PlanCost({}, (), 0, (), (), 0)
CASES = 200


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
        kv = self.kv(context).view(batch, context.shape[1], 2, HEADS, WIDTH // HEADS)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(found.reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.cross_attn = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + c * self.attn(h, h)
        x = x + self.cross_attn(x, y)
        return x + c * self.mlp(self.norm2(x) * (1 + c))


class Crossed(nn.Module):
    """``x (B, N, C)``, text ``y (B, 3, C)`` and ``t (B,)`` to ``(B, N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        c = self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x = block(x, y, c)
        return x


def inputs(step: int, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 100 * seed)
    x = torch.randn((batch, TOKENS, WIDTH), generator=generator)
    y = torch.randn((batch, 3, WIDTH), generator=generator.manual_seed(seed))
    return x, y, torch.full((batch,), 1 - step / 10)


# --- plans


@dataclass(frozen=True)
class Case:
    """A table, how tokens are chosen, and how the model is called."""

    rows: tuple[Row, ...]
    selection: Selection
    batch: int
    separate: bool  # cond and uncond are calls of their own


@dataclass(frozen=True)
class Column:
    """What has become of a site."""

    newest: int = -1
    scored: int = -1  # -1: nothing that a choice could go by
    age: int = 0


@st.composite
def actions(
    draw: st.DrawFn, column: Column, step: int, whole: bool, scored: bool, tokens: bool
) -> tuple[Action, Column]:
    """What a site may do, and what has become of it then."""
    kinds = ["compute"] if step == 0 else ["compute", "reuse", "pass"]
    if tokens and column.scored >= 0:
        kinds += ["refresh"] * 4
    match "compute" if whole else draw(st.sampled_from(kinds)):
        case "refresh":
            count = draw(st.sampled_from([1, 1, 2, 3, 7, 15]))
            action = Refresh(column.newest, count, column.scored, column.age)
            return action, replace(column, newest=step, age=column.age + 1)
        case "reuse":
            return Reuse(column.newest), column
        case "pass":  # a partial step that recomputes nothing, in which tokens grow older
            return Reuse(column.newest), replace(column, age=column.age + 1)
    return Compute(), Column(step, step if scored else -1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A legal table of 3 to 6 steps with any action at any site."""
    score = draw(st.sampled_from(list(Score)))
    cell = draw(st.sampled_from([1, 2, 4]))
    selection = Selection(
        score=score,
        age_weight=draw(st.sampled_from([0.0, 0.05, 0.25])),
        bonus=draw(st.sampled_from([0.0, 0.6])),
        cell=cell,
        grid=draw(st.sampled_from([(4, 4), (4, 4), (1, 16), (8, 2)])) if cell == 1 else (4, 4),
        seed=draw(st.integers(0, 3)) if score is Score.RANDOM else 0,
    )
    columns = [Column()] * (BLOCKS * len(KINDS))
    rows = []
    for step in range(draw(st.integers(3, 6))):
        whole = step == 0 or draw(st.sampled_from([False, False, False, True]))
        row: list[Action] = []
        for i, kind in enumerate(KINDS * BLOCKS):
            # A choice that is foreseen is made where attention is computed too.
            attn = row[i - i % len(KINDS)] if i % len(KINDS) else Compute()
            scored = not selection.foreseen or attn == Compute()
            drawn = actions(columns[i], step, whole, scored, kind != "attn")
            action, columns[i] = draw(drawn)
            row.append(action)
        rows.append(tuple(row))
    paired = score is Score.CROSS_ATTENTION
    separate = not paired and draw(st.booleans())
    return Case(tuple(rows), selection, draw(st.sampled_from([2, 8, 8 if paired else 1])), separate)


# --- both ways to carry them out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fill_random(Crossed())


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> TracedModel:
    traced = trace(model, inputs(0, 2))
    assert [site.name for site in traced.sites] == [
        f"blocks.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS
    ]
    return traced


def compiled(traced: TracedModel, plan: Plan, shapes: Shapes | None) -> Runner:
    """With ``shapes``, unverified: verifying takes most of the time."""
    with ExitStack() as stack:
        if shapes is not None:
            stack.enter_context(mock.patch.object(pipeline, "Shapes", return_value=shapes))
            stack.enter_context(mock.patch.object(pipeline, "verify"))
        graphs = rewrite(traced, plan)
    schedule = load_schedule(full(plan.steps))
    program = make_program(traced, schedule, plan, graphs, NO_COST)
    functions = [graph.module for graph in graphs]
    before = Prologues.of(program, named_prologues(graphs), batched=False)
    return Runner(program, functions, module_weights(traced), prologues=before)


def check(model: nn.Module, traced: TracedModel, case: Case, shapes: Shapes | None) -> None:
    plan = make_plan(traced.sites, case.rows, selection=case.selection)
    run = compiled(traced, plan, shapes)
    schedule = load_schedule(full(plan.steps))
    branches = ("cond", "uncond") if case.separate else ("",)
    references = [
        cg.ReferenceRunner.of_plan(model, traced, plan, schedule) for _ in range(len(branches))
    ]
    kept = plan.cache_bytes({traced.batch or "": case.batch})
    for step in range(plan.steps):
        for seed, (branch, reference) in enumerate(zip(branches, references, strict=True)):
            call = inputs(step, case.batch, seed)
            with run.cache_context(branch):
                found = run(*call)
            assert relative_error(found, reference(*call)) <= 1e-5, f"step {step} {branch}"
        assert run.cache_bytes() == kept[step] * len(branches), f"step {step}"


@pytest.mark.parametrize(("count", "verified"), [(CASES, False), (8, True)])
def test_compiled_graphs_agree_with_the_reference(
    model: nn.Module, traced: TracedModel, count: int, verified: bool
) -> None:
    seen: Counter[object] = Counter()
    shapes = None if verified else Shapes()

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        suppress_health_check=tuple(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def every_case(case: Case) -> None:
        check(model, traced, case, shapes)
        seen.update(["cases", case.selection.score, case.batch, case.separate])
        refreshed = [a for row in case.rows for a in row if isinstance(a, Refresh)]
        seen.update({"refresh": len(refreshed), "aged": sum(a.age > 1 for a in refreshed)})
        seen.update({"one token": sum(a.tokens == 1 for a in refreshed)})

    every_case()
    assert seen["cases"] >= count
    if count > 100:  # what a table may hold was in many of them
        assert min(seen[score] for score in Score) > 15
        assert min(seen[batch] for batch in (1, 2, 8)) > 25
        assert min(seen[True], seen[False]) > 40
        assert seen["refresh"] > 500
        assert min(seen["aged"], seen["one token"]) > 40


# --- both halves of guidance


PAIRED = Selection(Score.CROSS_ATTENTION, 0.1, 0.0, 1, (4, 4))


@pytest.fixture
def paired(model: nn.Module, traced: TracedModel) -> tuple[Runner, cg.ReferenceRunner]:
    rows = ((Compute(),) * 6, (Compute(), Refresh(0, 4, 0, 0), Reuse(0)) * 2)
    plan = make_plan(traced.sites, rows, selection=PAIRED)
    reference = cg.ReferenceRunner.of_plan(model, traced, plan, load_schedule(full(2)))
    return compiled(traced, plan, None), reference


@pytest.mark.parametrize("batch", [1, 3])
def test_an_odd_batch_without_partners_is_refused(
    paired: tuple[Runner, cg.ReferenceRunner], batch: int
) -> None:
    for run in paired:
        with pytest.raises(SessionError) as caught:
            run(*inputs(0, batch))
        assert str(caught.value) == (
            "the score cross-attention wants both halves of guidance in one call; expected a "
            "batch of an even number of samples, a half each for cond and uncond; found a batch "
            f"of {batch}; call the model once a step with a doubled batch, or choose another score"
        )


def test_a_call_for_one_half_is_refused(paired: tuple[Runner, cg.ReferenceRunner]) -> None:
    run, _ = paired
    alone = pytest.raises(SessionError, match="found a call for 'cond' alone")
    with alone, run.cache_context("cond"):
        run(*inputs(0, 4))
    run(*inputs(0, 4))  # without a name it is one call for both
