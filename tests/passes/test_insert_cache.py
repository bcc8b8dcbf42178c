"""insert-cache: golden text, the plan by hand, refusals."""

from __future__ import annotations

import pytest
import torch

from cachegraph.compiler.pipeline import rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import SLOT, Stage
from cachegraph.graph.text import graph_text
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.plan.action import Forecast, Reuse
from tests.tiny import (
    MIXED,
    C,
    check_golden,
    plain_loop,
    plan,
    reuse_everything,
    run_graphs,
    stages,
    traced,
)


def test_golden(update_golden: bool) -> None:
    found = stages()
    parts = {
        "before": graph_text(found["edit"][1]),
        "after": graph_text(found["insert-cache"][1]),
    }
    check_golden("insert_cache", parts, update_golden)


@pytest.mark.parametrize(
    "rows",
    [
        MIXED,
        ((C, C, C, C),),
        reuse_everything(3),
        # a forecast that is kept, and used by the next step
        (
            (C, C, C, C),
            (C, C, C, C),
            (C, Forecast((1, 0), (1.5, -0.5), keeps=True), C, C),
            (C, Reuse(2), C, C),
        ),
        # one variant, of whose steps only the second keeps its forecast
        (
            (C, C, C, C),
            (C, C, C, C),
            (C, C, Forecast((1, 0), (1.5, -0.5)), C),
            (C, C, Forecast((1, 0), (2.5, -1.5), keeps=True), C),
            (C, C, Reuse(3), C),
        ),
    ],
    ids=["mixed", "full", "reuse", "kept forecast", "forecast kept by one step"],
)
def test_graph_in_eager_equals_the_plan_by_hand(rows: tuple) -> None:
    found = run_graphs(plan(rows), stages(rows)["insert-cache"])
    for here, wanted in zip(found, plain_loop(rows), strict=True):
        assert torch.equal(here, wanted)


def test_reads_and_writes_are_those_of_the_row() -> None:
    full, mixed, _ = stages()["insert-cache"]
    assert [slot.name for slot in full.read_slots()] == []
    assert [slot.name for slot in mixed.read_slots()] == [
        "blocks.0.attn#0",
        "blocks.1.attn#0",
        "blocks.1.attn#0@1",
    ]
    written = {
        step.variant.name: [n.meta[SLOT].name for n in step.graph.nodes if n.target is ops.write]
        for step in (full, mixed)
    }
    assert written == {
        "variant0": ["blocks.0.attn#0", "blocks.1.attn#0"],
        "variant1": ["blocks.0.mlp#0"],
    }


def test_nothing_to_do_is_no_rewrite() -> None:
    step = stages(((C, C, C, C),))["edit"][0]
    before = graph_text(step)
    assert InsertCache().apply(step) == 0
    assert step.stage is Stage.CACHED
    assert graph_text(step) == before


def test_running_it_twice_is_refused() -> None:
    with pytest.raises(VerifyError) as caught:
        rewrite(traced(), plan(), passes=(InsertCache(), InsertCache()))
    assert str(caught.value).startswith("pass insert-cache, variant0, ")
    assert "inputs in order" in str(caught.value) or "writes instead of" in str(caught.value)
