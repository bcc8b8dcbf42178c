"""A model none of whose modules returns a site's value: the oracle interprets its graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cachegraph as cg
from tests.models import fora, relative_error

WIDTH = 4


class Bare(nn.Module):
    """A residual mlp of plain matrices."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator)) for _ in range(2)
        )

    def branch(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x @ self.a) @ self.b

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.branch(x) * t.view(-1, 1, 1)


@torch.no_grad()
def test_values_are_replaced_in_the_graph() -> None:
    model = Bare().eval()
    calls = [(torch.randn(2, 3, WIDTH), torch.full((2,), 1 - 0.1 * s)) for s in range(5)]
    schedule = fora(5, 2)
    reference = cg.ReferenceRunner(model, schedule)
    run = cg.load(cg.compile(model, schedule, calls[0], backend="eager"))
    for step, (x, t) in enumerate(calls):
        kept = model.branch(calls[step - step % 2][0])  # of the last full step
        found = reference(x, t, step=step)
        assert not reference.by_hooks
        assert relative_error(found, x + kept * t.view(-1, 1, 1)) < 1e-6
        assert relative_error(run(x, t, step=step), found) < 1e-6
