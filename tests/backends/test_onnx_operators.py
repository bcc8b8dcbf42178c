"""What ONNX has no words for, said otherwise: complex numbers, masks, forms of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.backends.onnx.real import in_real_numbers
from tests.models import fora, relative_error

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

W, STEPS = 8, 3
Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """One attention on ``x (B, N, C)``, with a table ``(N, C / 2)`` and a mask ``(B, N)``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(W, W) for _ in range(4))
        self.register_buffer("stored", torch.polar(torch.ones(4, W // 2), torch.rand(4, W // 2)))
        self.attend = attend

    def forward(self, x: Tensor, t: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        x = x + t[:, None, None]
        h = F.layer_norm(x, (W,))
        return x + self.o(self.attend(self, self.q(h), self.k(h), self.v(h), table, mask))


def turned(x: Tensor, table: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * table).flatten(-2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def complex_input(m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(turned(q, table), turned(k, table), v)


def complex_weight(
    m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor
) -> Tensor:
    both = (table[:, None] * m.stored.conj().unsqueeze(1)).squeeze(1)
    return F.scaled_dot_product_attention(turned(q, both), turned(k, both * 2), v)


def complex_made(m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    angles = torch.arange(4.0)[:, None] * torch.arange(1.0, 1 + W // 2) + table.abs()
    made = torch.polar(torch.ones_like(angles), angles).expand(q.shape[0], -1, -1)
    made = torch.cat([made[:, :2], made[:, 2:]], 1) / 2
    return F.scaled_dot_product_attention(turned(q, made), turned(k, made), v)


def masked(m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    every = mask[:, None, :] & mask[:, :, None] | torch.eye(4, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=every)


def causal(m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(m: Model, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(q, 4), heads(k, 4)[:, :2], heads(v, 4)[:, :2]
    made = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return made.transpose(1, 2).flatten(2)


def call(step: int, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 4, W, generator=generator) + step
    table = torch.polar(torch.ones(4, W // 2), torch.rand(4, W // 2, generator=generator))
    return x, torch.full((batch,), 0.9 - step / 10), table, torch.arange(4).expand(batch, -1) < 3


@pytest.mark.onnx
@pytest.mark.parametrize(
    "attend",
    [complex_input, complex_weight, complex_made, masked, causal, grouped],
    ids=lambda f: f.__name__,
)
def test_runs_as_in_eager(attend: Attend, tmp_path: Path) -> None:
    model = Model(attend).eval()
    schedule: Any = fora(STEPS, 2)
    plain = cg.load(cg.compile(model, schedule, call(0, 2), backend="eager"))
    cg.compile(model, schedule, call(0, 2), backend="onnx", out=tmp_path / "m.cgraph")
    run = cg.load(tmp_path / "m.cgraph")
    for batch in (2, 3):
        one, other = run.session(), plain.session()
        for step in range(STEPS):
            found, wanted = one(*call(step, batch)), other(*call(step, batch))
            assert relative_error(found, wanted) <= 1e-5


def test_a_graph_in_real_numbers_says_what_it_cannot() -> None:
    class Inverts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(1 / torch.view_as_complex(x))

    program = torch.export.export(Inverts(), (torch.randn(3, 2),), strict=False)
    module = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    with pytest.raises(cg.errors.BackendError, match="reciprocal"):
        in_real_numbers(module)
