"""Partial steps through inductor: one graph a variant, for every number of tokens and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cachegraph as cg
from cachegraph.plan.action import Refresh
from tests.models import one_thread, relative_error, tiny_dit, tiny_pixart  # noqa: F401

STEPS = 6
DIT = {"method": "toca", "interval": 4, "fresh_ratio": 0.12, "ratio_schedule": "linear"}
PIXART = {"method": "toca", "interval": 4, "fresh_ratio": 0.12, "rules": "pixart"}


def calls(batch: int, text: bool) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(batch)
    y = torch.randn(batch, 1, 5, 16, generator=generator) if text else torch.arange(batch)
    return [
        (torch.randn(batch, 4, 8, 8, generator=generator), torch.full((batch,), 900 - step), y)
        for step in range(STEPS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_tokens_and_batches_do_not_compile_anew(family: str) -> None:
    text = family == "pixart"
    model: nn.Module = tiny_pixart() if text else tiny_dit()
    schedule: Any = {"cachegraph": 1, "steps": STEPS, "policy": PIXART if text else DIT}
    artifact = cg.compile(model, schedule, calls(4, text)[0], backend="inductor")
    rows = artifact.program.rows
    counts = {a.tokens for row in rows for a in row if isinstance(a, Refresh)}
    assert 1 in counts  # torch would make a constant of it
    assert len(counts) >= 3
    run, variants = artifact.runner(), len(artifact.program.variants)
    torch.compiler.reset()
    compiled = torch._dynamo.utils.counters["stats"]  # noqa: TID251 - nothing public counts
    compiled.clear()
    for batch, graphs in ((4, variants), (2, variants), (8, variants), (1, 2 * variants)):
        if batch == 1 and text:
            continue  # half of guidance
        reference = cg.ReferenceRunner(model, schedule)
        for call in calls(batch, text):
            assert relative_error(run(*call), reference(*call)) <= 1e-4, batch
        assert compiled["unique_graphs"] == graphs, batch
