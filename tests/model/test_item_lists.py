"""Lists of the same constant for each item: as long as the batch, where a model does so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.model.items import Items
from cachegraph.model.trace import trace
from tests.models import compile_traced, full, refused, relative_error

W = 4


class First(nn.Module):
    """Takes the first of the shapes for all, as some do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W))

    def scale(self, shapes: list[tuple[int, int]]) -> float:
        return shapes[0][0] / shapes[0][1]

    def forward(self, x: Tensor, t: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        x = x * t.view(-1, 1, 1) * self.scale(shapes)
        return x + self.mlp(x)


class Counts(First):
    """What it computes depends on how many there are."""

    def scale(self, shapes: list[tuple[int, int]]) -> float:
        return float(sum(shape[0] for shape in shapes))


def call(batch: int, **more: Any) -> dict[str, Any]:
    x = torch.randn(batch, 3, W, generator=torch.Generator().manual_seed(batch))
    return {"x": x, "t": torch.full((batch,), 0.5), "shapes": [(2, 3)] * batch} | more


def loop(model: nn.Module, batch: int) -> cg.Runner:
    return cg.load(compile_traced(model, trace(model, (), call(batch)), full(4)))


@pytest.mark.parametrize("example", [1, 2])
def test_a_list_is_as_long_as_the_batch(example: int) -> None:
    model = First().eval()
    run = loop(model, example)
    for batch in (1, 2, 5):
        with torch.no_grad():
            wanted = model(**call(batch))
        assert relative_error(run.session(quiet=True)(**call(batch), step=0), wanted) < 1e-6


def test_another_entry_or_length_is_refused() -> None:
    run = loop(First().eval(), 2)
    short, other = call(3, shapes=[(2, 3)] * 2), call(2, shapes=[(2, 3), (2, 4)])
    refused(
        lambda: run.session(quiet=True)(**short, step=0),
        "one value for each item of the batch",
        "3 values",
    )
    refused(
        lambda: run.session(quiet=True)(**other, step=0), "shapes[1][1] differs from the traced one"
    )
    refused(
        lambda: run.session(quiet=True)(**call(2, shapes=((2, 3),) * 2), step=0),
        "shapes has another form",
    )


def test_a_list_whose_length_matters_stays_as_it_was() -> None:
    run = loop(Counts().eval(), 2)
    run.session(quiet=True)(**call(2), step=0)
    refused(
        lambda: run.session(quiet=True)(**call(3), step=0), "shapes has another form", "2 values"
    )


def test_one_row_is_for_all_items() -> None:
    items, x, t = Items(("x", "t"), ()), torch.rand(2, 3), torch.rand(1)
    part = items.part({"x": x, "t": t}, 1)
    assert torch.equal(part["x"], x[1:])
    assert torch.equal(part["t"], t)
