"""Models that fix their batch run item by item, all items of a call or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.model.items import Items, independent_items, joined
from cachegraph.model.trace import trace
from tests.models import compile_traced, fora, full, refused, relative_error

W, STEPS = 4, 4


class Fixed(nn.Module):
    """Loops over the items of its batch; positions ``(2,)`` are as long as a batch of two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W))

    def forward(
        self, x: Tensor, t: Tensor, sizes: list[int], positions: Tensor
    ) -> dict[str, Tensor]:
        made = [one[:size].mean(0) for one, size in zip(x, sizes, strict=True)]
        x = x + torch.stack(made)[:, None] * t[:, None, None] + positions.sum()
        return {"sample": x + self.mlp(x)}


class Mixes(Fixed):
    """Looks at other items."""

    def forward(
        self, x: Tensor, t: Tensor, sizes: list[int], positions: Tensor
    ) -> dict[str, Tensor]:
        return super().forward(x + x.mean(0), t, sizes, positions)


def call(step: int, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, W, generator=generator) + step
    t = torch.full((batch,), 0.9 - step / 10)
    return {"x": x, "t": t, "sizes": [2] * batch, "positions": torch.tensor([1.0, 3.0])}


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Any, cg.Artifact]:
    model = Fixed().eval()
    traced = trace(model, (), call(0, 2))
    return model, traced, compile_traced(model, traced, fora(STEPS, 2))


def test_what_belongs_to_an_item_is_found() -> None:
    wanted = Items(("x", "t"), ("sizes",))
    assert independent_items(Fixed().eval(), call(0, 2)) == wanted
    assert independent_items(Fixed().eval(), call(0, 3)) == wanted
    assert independent_items(Mixes().eval(), call(0, 2)) is None


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_is_as_the_reference(made: Any, batch: int, tmp_path: Path) -> None:
    model, traced, artifact = made
    artifact.save(tmp_path / "m.cgraph", lambda _: None)
    run = cg.load(tmp_path / "m.cgraph")
    reference = cg.ReferenceRunner.of_plan(model, traced, artifact.program.plan, artifact.schedule)
    for step in range(STEPS):
        found, wanted = run(**call(step, batch)), reference(**call(step, batch))
        assert relative_error(found["sample"], wanted["sample"]) <= 1e-6


def test_a_batch_of_one_is_compiled_as_one_item() -> None:
    model = Fixed().eval()
    run = cg.load(cg.compile(model, full(2), (), call(0, 1), backend="eager"))
    with torch.no_grad():
        assert torch.equal(run(**call(0, 1))["sample"], model(**call(0, 1))["sample"])
        found = run.session()(**call(0, 3))["sample"]
        assert relative_error(found, model(**call(0, 3))["sample"]) <= 1e-6


def test_items_that_look_at_each_other_stay_together() -> None:
    traced = trace(Mixes().eval(), (), call(0, 2))
    assert traced.items is None
    assert "item by item" not in traced.fixed_batch_reason
    run = cg.load(compile_traced(Mixes().eval(), traced, fora(STEPS, 2)))
    refused(lambda: run(**call(0, 3)), "sizes")


def test_a_call_that_fails_for_one_item_changes_none(made: Any) -> None:
    run = cg.load(made[2])
    undisturbed = [run(**call(step, 2)) for step in range(STEPS)]
    session = run.session()
    for step in range(STEPS):
        broken = call(step, 2)
        broken["sizes"] = [2, 1]  # of the second item: not as it was traced
        refused(lambda broken=broken: session(**broken), "sizes")  # type: ignore[misc]
        found = session(**call(step, 2))
        assert torch.equal(found["sample"], undisturbed[step]["sample"])


def test_results_are_joined_by_their_form() -> None:
    one, two = torch.ones(1, 2), torch.zeros(1, 2)
    assert joined([(one, [1], None), (two, [2], None)])[1:] == ([1, 2], None)
    assert joined([{"a": one}, {"a": two}])["a"].tolist() == [[1, 1], [0, 0]]
