"""Memory of a trajectory: what was predicted is what torch's allocator has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from cachegraph.bench.contestants import make_contestants
from cachegraph.bench.memory import allocated
from cachegraph.bench.result import UNCACHED, Compared, Entry, Memory
from cachegraph.compiler.cost import moved_bytes, working_bytes
from cachegraph.schedule.schedule import load_schedule
from tests.models import TOCA, dit_steps, fora, one_thread, shared_dit  # noqa: F401

CPU = torch.device("cpu")


def memory(schedule: dict[str, Any] | None) -> Memory:
    model, traced = shared_dit()
    call = dit_steps(1)[0]
    entry = Entry(UNCACHED, schedule and load_schedule(schedule), "eager")
    entries = [entry, Entry("steps", load_schedule(fora(7, 3)), "eager")]
    one = make_contestants(model, traced, call, {}, entries, False, lambda *_: None)[0]
    one.before()
    for step in one.points:
        one.call(step)
    found = one.memory()
    assert found is not None
    return found


TAYLOR = {
    "cachegraph": 1,
    "steps": 7,
    "policy": {"method": "taylorseer", "interval": 3, "order": 2},
}


@pytest.mark.parametrize("schedule", [fora(7, 3), TOCA, TAYLOR], ids=["fora", "toca", "taylor"])
def test_eager_needs_what_was_predicted(schedule: dict[str, Any]) -> None:
    found = memory(schedule)
    for part in (found.weights, found.slots, found.known):
        assert part.predicted == part.measured
        assert part.predicted > 0
    assert found.peak.predicted == pytest.approx(found.peak.measured, rel=0.01)


def test_the_model_itself_keeps_nothing() -> None:
    found = memory(None)
    assert found.slots == found.known == Compared(0, 0)
    assert found.weights.predicted == found.weights.measured
    assert found.peak.predicted == pytest.approx(found.peak.measured, rel=0.05)


def test_most_is_what_is_there_at_a_time() -> None:
    def run() -> Tensor:
        first = torch.empty(1000)
        del first
        return torch.cat([torch.empty(500), torch.empty(250)])

    most, result = allocated(CPU, run)
    assert most == 1500 * 4
    assert result.shape == (750,)


class Chain(nn.Module):
    """Pointwise, then a product, of (4, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        there = (x + self.table(i)).sin().cos().view(2, 2, 8)
        return self.linear(there).exp()


ONE = 4 * 8 * 4  # bytes of x


@pytest.fixture(scope="module")
def chain() -> fx.GraphModule:
    given = {"x": torch.randn(4, 8), "i": torch.arange(4)}
    module = torch.export.export(Chain().eval(), (), given).run_decompositions({}).module()
    assert isinstance(module, fx.GraphModule)
    return module


def test_work_is_what_is_live(chain: fx.GraphModule) -> None:
    # Two of a chain, then one of it and the product, then the product and its exponential.
    assert working_bytes(chain, {}) == (4 * ONE, 2 * ONE)
    # What is looked up, and the cosine that the product reads; it is exponentiated in place.
    assert working_bytes(chain, {}, fused=True) == (3 * ONE, 2 * ONE)


def test_a_call_moves_weights_inputs_and_outputs(chain: fx.GraphModule) -> None:
    found = moved_bytes(chain, {})
    # x, the indices, the product's weight, the output; not the table, of which it reads 4 rows.
    assert found == ONE + 4 * 8 + 8 * 16 * 4 + 2 * ONE
