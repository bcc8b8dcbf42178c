"""What calls of a model on the way write to, draw and import is afterwards as it was before."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cachegraph.errors import TraceError
from cachegraph.model.trace import trace
from tests.model.test_trace_state import Base, T, X


class Writes(Base):
    """Counts its calls in memory; reads a number, so that it is called with data, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("counted", torch.zeros(()))
        self.plain = torch.zeros(())
        self.kind, self.random = kind, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        x = x * lengths.tolist()[0]
        match self.kind:
            case "buffer":
                self.counted += 1
            case "tensor":
                self.plain.add_(1)
            case "generator":
                x = x + torch.randn(3, 4, generator=self.random)
            case "weight":
                self.mlp[0].weight.data = self.mlp[0].weight.data * 1.5
        return self.body(x * (1 + self.counted + self.plain), t)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["buffer", "tensor", "generator", "weight"])
def test_a_model_that_is_refused_for_what_it_writes_is_as_it_was(kind: str) -> None:
    def made() -> Writes:
        torch.manual_seed(0)
        return Writes(kind).eval()

    call, twin, model = (X, T, torch.tensor([2, 2])), made(), made()
    for one in (twin, model):
        one(*call)
    with pytest.raises(TraceError):
        trace(model, call)
    for _ in range(2):
        assert torch.equal(model(*call), twin(*call))


def test_random_numbers_go_on() -> None:
    class Draws(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = x + random.random() + np.random.random()
            return torch.cat([self.body(x[i : i + 1] + 0 * torch.randn(3, 4), t) for i in (0, 1)])

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.random(), float(torch.rand(()))

    def seeded() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seeded()
    wanted = drawn()
    model = Draws().eval()
    seeded()
    trace(model, (X, T[:1]))
    assert drawn() == wanted


KEPT = """
LAST = None
def last(x):
    global LAST
    LAST = 0 * x + 2 if LAST is None else LAST
    return LAST
"""
LATE = """
{first}
from tests.model import test_trace_state as own
class Late(own.Base):
    def forward(self, x, t):
        {then}
        return self.body(x * {call}(x), t)
"""


@torch.no_grad()
@pytest.mark.parametrize("case", ["new", "imported", "elsewhere"])
def test_a_module_that_only_forward_asks(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / f"late_{case}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kept.py").write_text(KEPT)
    (tmp_path / "kept_elsewhere.py").write_text(KEPT)
    late = {"first": "", "then": f"from {package.name}.kept import last", "call": "last"}
    if case == "elsewhere":
        late = {"first": "import kept_elsewhere", "then": "", "call": "kept_elsewhere.last"}
    (package / "model.py").write_text(LATE.format(**late))
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module(f"{package.name}.model").Late().eval()
    if case == "imported":
        importlib.import_module(f"{package.name}.kept")
    trace(model, (X, T))
    assert type(model(X, T)) is Tensor
    assert torch.equal(model(X, T), model(X, T))
