"""lower: golden text, the plan by hand, refusals."""

from __future__ import annotations

import pytest
import torch

from cachegraph.compiler.pipeline import rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import Stage
from cachegraph.graph.text import graph_text
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower
from tests.tiny import (
    MIXED,
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
        "before": graph_text(found["drop-dead"][1]),
        "after": graph_text(found["lower"][1]),
    }
    check_golden("lower", parts, update_golden)


@pytest.mark.parametrize("rows", [MIXED, reuse_everything(3)], ids=["mixed", "reuse"])
def test_graph_in_eager_equals_the_plan_by_hand(rows: tuple) -> None:
    found = run_graphs(plan(rows), stages(rows)["lower"])
    for here, wanted in zip(found, plain_loop(rows), strict=True):
        assert torch.equal(here, wanted)


def test_no_cache_operation_is_left() -> None:
    for step in stages()["lower"]:
        assert step.stage is Stage.LOWERED
        assert not [node for node in step.graph.nodes if node.target in ops.CACHE_OPS]


def test_a_graph_without_cache_operations_is_left_alone() -> None:
    step = stages()["lower"][1]
    before = graph_text(step)
    assert Lower().apply(step) == 0
    assert graph_text(step) == before


def test_a_forecast_without_values_is_refused() -> None:
    step = stages()["drop-dead"][1]
    forecast = step.graph.find_nodes(op="call_function", target=ops.forecast)[0]
    forecast.args = ([], forecast.args[1])
    with pytest.raises(ValueError, match="a forecast without values"):
        Lower().apply(step)


def test_lowering_before_the_cache_is_there_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"pass lower, variant0, .*0 writes instead of 2"):
        rewrite(traced(), plan(), passes=(Lower(), InsertCache(), DropDead()))
