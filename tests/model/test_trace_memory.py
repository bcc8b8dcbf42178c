"""What calls of a model on the way write to, draw and import is afterwards as it was before."""

from __future__ import annotations

import importlib
import random
import sys
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
KEPT = {}
def last(x):
    if 0 not in KEPT:
        KEPT[0] = 0 * x + 2
    return KEPT[0]
"""
LATE = """
{first}
from tests.model import test_trace_state as own
class Late(own.Base):
    def forward(self, x, t):
        {then}
        return self.body(x * {call}(x), t)
"""


LATE_PARTS = ("first", "then", "call")
LATE_CASES = {
    "new": ("", "from {package}.kept import last", "last"),
    "imported": ("", "from {package}.kept import last", "last"),
    "relative": ("", "from .kept import last", "last"),
    "relative_module": ("", "from . import kept", "kept.last"),
    "above": ("", "from ..{package}.kept import last", "last"),
    "elsewhere": ("import kept_elsewhere", "", "kept_elsewhere.last"),
    "by_text": ("import importlib", "", "importlib.import_module('kept_elsewhere').last"),
    "nested": ("import kept_elsewhere", "", "(lambda: kept_elsewhere.last)()"),
    "held": ("from . import kept as hidden\nHELD = [hidden]", "", "HELD[0].last"),
    "got": ("import kept_elsewhere", "", "getattr(kept_elsewhere, 'last')"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LATE_CASES)
def test_a_module_that_only_forward_asks(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"late_{case}"
    package = tmp_path / "outer" / name if case == "above" else tmp_path / name
    package.mkdir(parents=True)
    dotted = ".".join(package.relative_to(tmp_path).parts)
    (package / "__init__.py").touch()
    (package / "kept.py").write_text(KEPT)
    (tmp_path / "kept_elsewhere.py").write_text(KEPT)
    parts = (part.format(package=name) for part in LATE_CASES[case])
    (package / "model.py").write_text(LATE.format(**dict(zip(LATE_PARTS, parts, strict=True))))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kept_elsewhere", raising=False)
    model = importlib.import_module(f"{dotted}.model").Late().eval()
    if case != "new":
        for known in (f"{dotted}.kept", "kept_elsewhere"):
            importlib.import_module(known)
    trace(model, (X, T))
    assert type(model(X, T)) is Tensor
    assert torch.equal(model(X, T), model(X, T))
