"""A model of two blocks, its trace and a plan with every kind of action, for tests of the parts.

The model is small enough to read its graph, and :func:`plain_loop` says what a plan means on it
without anything of cachegraph but the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cachegraph.compiler.pipeline import PassReport, rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph.step_graph import CONSTANT, SLOT, Pass, StepGraph, copy_module
from cachegraph.model.trace import TracedModel, trace
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower
from cachegraph.plan.action import Action, Compute, Forecast, Reuse, Row, sources
from cachegraph.plan.plan import Plan, make_plan

WIDTH, TOKENS, BATCH = 8, 4, 2
STEPS = 6  # of a drift
BASIC: tuple[Pass, ...] = (InsertCache(), DropDead(), Lower())
Values = dict[tuple[str, int], Tensor]  # (site, step that made it) -> value


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate1, gate2 = self.gates(c).chunk(2, dim=-1)
        x = x + gate1 * self.attn(F.layer_norm(x, (WIDTH,)))
        return x + gate2 * self.mlp(F.layer_norm(x, (WIDTH,)))


class Tiny(nn.Module):
    """``x (B, N, C)`` and ``t (B,)`` to ``(B, N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)

    def example_inputs(self) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        return call(0), {}


def call(step: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """The inputs of a step's call; time falls."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    return x, torch.full((batch,), 10.0 - step)


@cache
def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval()


def drift(model_fn: Callable[..., Tensor], seed: int, *, steps: int = STEPS) -> Tensor:
    """A trajectory whose state follows from the model's outputs, as a sampler's does."""
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = x - 0.2 * model_fn(x, torch.full((BATCH,), 10.0 - step))
    return x


def long_drift(model_fn: Callable[..., Tensor], seed: int) -> Tensor:
    return drift(model_fn, seed, steps=8)


@cache
def traced() -> TracedModel:
    model = tiny()
    return trace(model, *model.example_inputs())


C = Compute()
#     blocks.0.attn  blocks.0.mlp  blocks.1.attn                      blocks.1.mlp
MIXED: tuple[Row, ...] = (
    (C, C, C, C),
    (C, C, C, C),
    (Reuse(1), C, Forecast((1, 0), (2.0, -1.0)), C),
    (C, Reuse(2), C, C),
)


@cache
def plan(rows: tuple[Row, ...] = MIXED) -> Plan:
    return make_plan(traced().sites, rows)


def reuse_everything(steps: int) -> tuple[Row, ...]:
    """The first step computes, all others reuse."""
    return ((C,) * 4, *[(Reuse(0),) * 4] * (steps - 1))


# --- what a plan means


@torch.no_grad()
def plain_loop(rows: Sequence[Row]) -> list[Tensor]:
    """What the model returns at each step, with every decision of the rows taken by hand."""
    model, kept, results = tiny(), Values(), []
    for step, row in enumerate(rows):
        x, t = call(step)
        c = model.time(t.view(-1, 1, 1))
        for index, block in enumerate(model.blocks):
            gate1, gate2 = block.gates(c).chunk(2, dim=-1)
            for name, gate, action in (
                ("attn", gate1, row[2 * index]),
                ("mlp", gate2, row[2 * index + 1]),
            ):
                site = f"blocks.{index}.{name}"
                value = _plain_value(getattr(block, name), x, action, site, kept)
                kept[site, step] = value
                x = x + gate * value
        results.append(model.head(x))
    return results


def _plain_value(module: nn.Module, x: Tensor, action: Action, site: str, kept: Values) -> Tensor:
    match action:
        case Compute():
            return module(F.layer_norm(x, (WIDTH,)))
        case Reuse(source):
            return kept[site, source]
        case Forecast(steps, coefficients):
            return sum(
                (kept[site, s] * c for s, c in zip(steps, coefficients, strict=True)),
                start=torch.zeros(()),
            )


@torch.no_grad()
def run_graphs(made: Plan, graphs: Sequence[StepGraph]) -> list[Tensor]:
    """What the graphs return at each step, every kept value put back by hand."""
    kept, results = Values(), []
    rows = {site.name: [row[i] for row in made.rows] for i, site in enumerate(made.sites)}
    for step, variant in enumerate(made.variant_of):
        graph = graphs[variant]
        given: list[Tensor] = list(call(step))
        for node in graph.inputs:
            if SLOT in node.meta:
                slot = node.meta[SLOT]
                given.append(kept[slot.site, sources(rows[slot.site][step])[slot.age]])
            elif CONSTANT in node.meta:
                given.append(torch.tensor(node.meta[CONSTANT].values[step]))
        result, *written = graph.module(*given)
        writers = [
            s.name for s, w in zip(made.sites, made.variants[variant].writes, strict=True) if w
        ]
        kept |= {(site, step): tensor for site, tensor in zip(writers, written, strict=True)}
        results.append(result)
    return results


# --- passes, one after another


@dataclass(frozen=True)
class Edit:
    """A pass that does what a test wants, to one variant."""

    edit: Callable[[StepGraph], Any] = lambda step: None
    variant: str = ""
    claims: int = 0

    name: ClassVar[str] = "edit"

    def apply(self, step: StepGraph) -> int:
        if step.variant.name != self.variant:
            return 0
        self.edit(step)
        return self.claims


def stages(rows: tuple[Row, ...] = MIXED) -> dict[str, list[StepGraph]]:
    """Every variant's graph after each pass, by the name of the pass; ``edit`` is before all."""
    return {name: [_copied(step) for step in steps] for name, steps in _stages(rows).items()}


@cache
def _stages(rows: tuple[Row, ...]) -> dict[str, list[StepGraph]]:
    found: dict[str, list[StepGraph]] = {}

    def look(step: StepGraph, report: PassReport) -> None:
        found.setdefault(report.pass_name, []).append(_copied(step))

    rewrite(traced(), plan(rows), passes=(Edit(), *BASIC), on_pass=look)
    return found


def _copied(step: StepGraph) -> StepGraph:
    return replace(step, module=copy_module(step.module))


def broken(
    edit: Callable[[StepGraph], Any],
    *,
    after: int,
    variant: str = "variant1",
    rows: tuple[Row, ...] = MIXED,
    claims: int = 1,
) -> str:
    """The error where a broken pass runs after so many good ones, on one variant."""
    passes = (*BASIC[:after], Edit(edit, variant, claims), *BASIC[after:])
    only = tuple(v for v in plan(rows).variants if v.name == variant)
    with pytest.raises(VerifyError) as caught:
        rewrite(traced(), replace(plan(rows), variants=only), passes=passes)
    return str(caught.value)


def node_named(step: StepGraph, name: str) -> fx.Node:
    return next(node for node in step.graph.nodes if node.name == name)


# --- golden texts

GOLDEN = Path(__file__).parent / "passes" / "golden"


def check_golden(name: str, parts: dict[str, str], update: bool) -> None:
    """Compare texts with a file, or write them to it; torch's number of the batch is left out."""
    text = "\n".join(f"=== {title}\n{part}" for title, part in parts.items())
    text = re.sub(r"\bs\d+\b", "s0", text)
    path = GOLDEN / f"{name}.txt"
    if update:
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no {path.name}: write it with pytest --update-golden"
    assert text == path.read_text(encoding="utf-8")
