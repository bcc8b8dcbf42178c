"""Sites that are easily missed or cut wrongly: quantised layers, mixtures of experts; kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import SiteError
from cachegraph.model.trace import trace
from tests.models import fora, full, relative_error, tiny_dit

WIDTH = 8
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))


class Int8(nn.Module):
    """A linear layer whose inputs and weights are rounded to eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("q", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1).clone())
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        by = flat.abs().amax(1, keepdim=True) / 127
        whole = torch._int_mm((flat / by).round().to(torch.int8), self.q.t())
        return (whole.to(x.dtype) * by * self.scale + self.bias).reshape(*x.shape[:-1], -1)


def test_quantised_layers_are_linear() -> None:
    model = tiny_dit(input_size=16)  # _int_mm wants more than 16 rows
    call = (torch.randn(2, 4, 16, 16), torch.tensor([9, 9]), torch.tensor([1, 2]))
    plain = trace(model, call).sites
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = Int8(block.attn.qkv), Int8(block.attn.proj)
        block.mlp.fc1, block.mlp.fc2 = Int8(block.mlp.fc1), Int8(block.mlp.fc2)
    found = trace(model.eval(), call).sites
    assert [(s.name, s.kind) for s in found] == [(s.name, s.kind) for s in plain]


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def test_a_kind_that_is_named_and_matches_nothing_is_refused() -> None:
    class OnlyMlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = OnlyMlp().eval()
    with pytest.raises(SiteError) as caught:
        cg.compile(model, full(2, sites={"kinds": ["mlp", "attn"]}), (X,), backend="eager")
    for part in ("the model has no site of kind attn", "1 site: mlp (mlp)", "leave attn out"):
        assert part in str(caught.value)
    for sites in ({}, {"kinds": ["mlp"]}):  # kinds that nobody wrote need not be there
        cg.compile(model, full(2, sites=sites), (X,), backend="eager")


class Mixture(nn.Module):
    """All experts are computed and mixed as the stream decides, token by token or as a whole."""

    def __init__(self, *, pooled: bool, experts: int = 3, shared: bool = False) -> None:
        super().__init__()
        self.router, self.pooled = nn.Linear(WIDTH, experts), pooled
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))
        self.shared = Mlp() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(x, (WIDTH,))
        share = self.router(h.mean(1, keepdim=True) if self.pooled else h).softmax(-1)
        parts = [share[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts)]
        parts += [] if self.shared is None else [self.shared(h)]
        return x + sum(parts[1:], parts[0])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_mixture_of_experts_is_one_site(pooled: bool, shared: bool) -> None:
    torch.manual_seed(0)
    model = Mixture(pooled=pooled, shared=shared).eval()
    artifact = cg.compile(model, fora(3, 3), (X,), backend="eager")
    assert [site.kind for site in artifact.program.plan.sites] == ["mlp"]
    run = cg.load(artifact, track="count")
    with torch.no_grad():
        branch = model(X) - X
        assert relative_error(run(X), model(X)) == 0
        for call in (X + 1, X * X):  # the old branch as it was, without new routing
            found = run(call)
            if not torch.equal(found, model(call)):
                assert relative_error(found, call + branch) < 1e-6


def test_one_expert_that_the_stream_weighs_keeps_its_weight() -> None:
    model = Mixture(pooled=False, experts=2).eval()
    model.experts = model.experts[:1]
    [site] = trace(model, (X,)).sites
    assert site.values[0].node.startswith("mul")


def test_costs_of_views_that_need_their_strides() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            rows = x.transpose(1, 2).view(x.shape[0], -1, WIDTH)
            return rows + self.mlp(rows)

    turned = X.transpose(1, 2).contiguous().transpose(1, 2)
    artifact = cg.compile(Columns().eval(), full(2), (turned,), backend="eager")
    assert artifact.program.cost.full_flops > 0
