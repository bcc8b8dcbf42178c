"""Forty styles of block: the sites in each, and FORA against a cache that is written by hand.

Every block says itself what it keeps: ``keep(name, make)`` computes, or gives what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.model.trace import trace
from tests.models import compile_traced, fill_random, fora, relative_error

W, HEADS, TOKENS, STEPS, INTERVAL = 8, 2, 6, 4, 3
Keep = Callable[[str, Callable[[], Any]], Any]
Style = Callable[["Block", Tensor, Tensor, Tensor, Keep], Any]


def plain(_name: str, make: Callable[[], Any]) -> Any:
    """Keeps nothing."""
    return make()


class Cache:
    """What a hook on the eager model would do: keep, and give again in between."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.computes = True

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        if self.computes:
            self.kept[name] = make()
        return self.kept[name]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Layers for every style; ``x (B, N, C)``, condition ``c (B, C)``, text ``y (B, M, C)``."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.keep: Keep = plain
        linear = {"q": W, "k": W, "v": W, "o": W, "up": 2 * W, "gate": 2 * W, "mod": W, "t": W}
        for name, width in linear.items():
            setattr(self, name, nn.Linear(W, width))
        self.down, self.qkv, self.both = (
            nn.Linear(2 * W, W),
            nn.Linear(W, 3 * W),
            nn.Linear(3 * W, W),
        )
        self.all = nn.Linear(W, 5 * W)
        self.ty = nn.Linear(W, 3 * W)
        self.mha = nn.MultiheadAttention(W, HEADS, batch_first=True)
        self.stacked = nn.Parameter(torch.zeros(2, W, W))
        self.scales = nn.Parameter(torch.zeros(W))
        self.conv = nn.Sequential(
            nn.Conv1d(W, W, 3, padding=1), nn.SiLU(), nn.Conv1d(W, W, 3, padding=1)
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W)) for _ in range(2)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        c = self.t(t[:, None].expand(-1, W) / 100)
        return self.style(self, x + c[:, None], c, y, self.keep)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def attn(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = self.heads(self.q(x)), self.heads(self.k(y)), self.heads(self.v(y))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def written(attend: Callable[[Block, Tensor, Tensor, Tensor], Tensor]) -> Style:
    """A block of attention in another form, then an mlp."""

    def style(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
        h = norm(x)
        x = x + keep("a", lambda: m.o(attend(m, m.q(h), m.k(h), m.v(h))))
        return x + keep("m", lambda: m.mlp(norm(x)))

    return style


def residual(add: Callable[[Block, Tensor, Tensor, Tensor], Tensor]) -> Style:
    """A block whose branches are added in another form."""

    def style(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
        x = add(m, x, keep("a", lambda: m.attn(norm(x))), c)
        return add(m, x, keep("m", lambda: m.mlp(norm(x))), c)

    return style


def middle(change: Callable[[Block, Tensor], Tensor]) -> Style:
    """A block with another mlp."""

    def style(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
        x = x + keep("a", lambda: m.attn(norm(x)))
        return x + keep("m", lambda: change(m, norm(x)))

    return style


def by_broadcast(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, None] * k[:, None]).sum(-1) / W**0.5
    return (scores.softmax(-1)[..., None] * v[:, None]).sum(2)


def by_einsum(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bnc,bmc->bnm", q, k).softmax(-1)
    return torch.einsum("bnm,bmc->bnc", weights, v)


def by_baddbmm(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=W**-0.5)
    return torch.bmm(scores.softmax(-1), v)


def linear_attention(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().transpose(1, 2) @ v)


def masked(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def normed_heads(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (m.heads(one) for one in (q, k, v))
    return F.scaled_dot_product_attention(norm(q), norm(k), v).transpose(1, 2).flatten(2)


def rotated(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angles = torch.arange(TOKENS)[:, None] / (1 + torch.arange(W // 2))
    table = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_complex(one.unflatten(-1, (-1, 2))) * table for one in (q, k))
    q, k = (torch.view_as_real(one).flatten(2) for one in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def fused(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    def make() -> Tensor:
        q, k, v, up = m.all(norm(x)).split([W, W, W, 2 * W], dim=-1)
        return m.both(torch.cat([F.scaled_dot_product_attention(q, k, v), F.gelu(up)], -1))

    return x + keep("a", make)


def parallel(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    h = norm(x)
    return x + (keep("a", lambda: m.attn(h)) + keep("m", lambda: m.mlp(h)))


def in_turn(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    h = norm(x)
    return (x + keep("a", lambda: m.attn(h))) + keep("m", lambda: m.mlp(h))


def sandwich(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x + norm(keep("a", lambda: m.attn(norm(x))))
    return x + norm(keep("m", lambda: m.mlp(norm(x))))


def after(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = norm(x + keep("a", lambda: m.attn(x)))
    return norm(x + keep("m", lambda: m.mlp(x)))


def gated(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    gate = m.mod(c)[:, None]
    x = x + gate * keep("a", lambda: m.attn(norm(x) * (1 + gate) + gate))
    return x + gate.tanh() * keep("m", lambda: m.mlp(norm(x)))


def layer_scale(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x + m.scales * keep("a", lambda: m.attn(norm(x)))
    return x + m.scales * keep("m", lambda: m.mlp(norm(x)))


def cross(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x + keep("a", lambda: m.attn(norm(x)))
    x = x + keep("c", lambda: m.attn(norm(x), y))
    return x + keep("m", lambda: m.mlp(norm(x)))


def joint(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    y = y + c[:, None]

    def make() -> tuple[Tensor, Tensor]:
        both = torch.cat([m.qkv(norm(x)), m.ty(norm(y))], 1)
        made = F.scaled_dot_product_attention(*both.chunk(3, -1))
        return m.o(made[:, : x.shape[1]]), m.v(made[:, x.shape[1] :])

    of_x, of_y = keep("a", make)
    return x + of_x, y + of_y


def multihead(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    h = norm(x)
    x = x + keep("a", lambda: m.mha(h, h, h, need_weights=False)[0])
    return x + keep("m", lambda: m.mlp(norm(x)))


def multihead_with_weights(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    h = norm(x)
    x = x + keep("a", lambda: m.mha(h, h, h)[0])
    return x + keep("m", lambda: m.mlp(norm(x)))


def tokens_last(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x.transpose(1, 2)
    x = x + keep("a", lambda: m.attn(norm(x.transpose(1, 2)))).transpose(1, 2)
    return (x + keep("m", lambda: m.conv(x))).transpose(1, 2)


def stacked(m: Block, x: Tensor) -> Tensor:
    """Weights of both layers in one parameter."""
    return F.silu(x @ m.stacked[0]) @ m.stacked[1]


def mixture(m: Block, x: Tensor) -> Tensor:
    """Every expert for every token."""
    weights = m.mod(x)[..., :2].softmax(-1)
    return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(m.experts))


def no_stream_in_between(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    return x + keep("a", lambda: m.attn(norm(x)))


def skip_over_both(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    h = x + keep("a", lambda: m.attn(norm(x)))
    return x + (h + keep("m", lambda: m.mlp(norm(h))))


def in_half(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x + keep("a", lambda: m.attn(norm(x)).bfloat16()).float()
    return x + keep("m", lambda: m.mlp(norm(x)).bfloat16()).float()


def written_in_place(m: Block, x: Tensor, c: Tensor, y: Tensor, keep: Keep) -> Tensor:
    x = x.clone()
    x += keep("a", lambda: m.attn(norm(x)))
    x.add_(keep("m", lambda: m.mlp(norm(x))))
    return x


def mp_sum(m: Block, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The magnitude-preserving sum of EDM2."""
    return x.lerp(b, 0.3) / (0.7**2 + 0.3**2) ** 0.5


def by_gate(m: Block, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    gate = m.mod(c)[:, None].sigmoid()
    return x * (1 - gate) + b * gate


A, M, C = "attn", "mlp", "cross_attn"
STYLES: dict[str, tuple[Style, list[str]]] = {
    "plain": (residual(lambda m, x, b, c: x + b), [A, M]),
    "branch first": (residual(lambda m, x, b, c: b + x), [A, M]),
    "alpha": (residual(lambda m, x, b, c: torch.add(x, b, alpha=0.5)), [A, M]),
    "difference": (residual(lambda m, x, b, c: x - b), [A, M]),
    "difference with alpha": (residual(lambda m, x, b, c: torch.sub(x, b, alpha=0.5)), [A, M]),
    "branch less stream": (residual(lambda m, x, b, c: b - x), [A, M]),
    "addcmul": (residual(lambda m, x, b, c: torch.addcmul(x, m.mod(c)[:, None], b)), [A, M]),
    "addcmul, value": (
        residual(lambda m, x, b, c: torch.addcmul(x, b, m.mod(c)[:, None], value=0.5)),
        [A, M],
    ),
    "lerp": (residual(lambda m, x, b, c: torch.lerp(x, b, 0.3)), [A, M]),
    "lerp by a gate": (residual(lambda m, x, b, c: x.lerp(b, m.mod(c)[:, None])), [A, M]),
    "mp_sum": (residual(mp_sum), [A, M]),
    "weighted sum": (residual(lambda m, x, b, c: 0.8 * x + 0.6 * b), [A, M]),
    "weighted sum, divided": (residual(lambda m, x, b, c: (x + b) / 2**0.5), [A, M]),
    "weighted by a gate": (residual(by_gate), [A, M]),
    "scaled stream": (residual(lambda m, x, b, c: x * m.scales + b), [A, M]),
    "in place": (written_in_place, [A, M]),
    "half precision": (in_half, [A, M]),
    "einsum": (written(by_einsum), [A, M]),
    "broadcast and sum": (written(by_broadcast), [A, M]),
    "baddbmm": (written(by_baddbmm), [A, M]),
    "linear attention": (written(linear_attention), [A, M]),
    "masked": (written(masked), [A, M]),
    "causal": (written(causal), [A, M]),
    "normed heads": (written(normed_heads), [A, M]),
    "complex rotary table": (written(rotated), [A, M]),
    "multihead attention": (multihead, [A, M]),
    "multihead attention, weights": (multihead_with_weights, [A, M]),
    "fused": (fused, [A]),
    "parallel": (parallel, [A, M]),
    "added in turn": (in_turn, [A, M]),
    "sandwich norm": (sandwich, [A, M]),
    "norm after": (after, [A, M]),
    "gated": (gated, [A, M]),
    "layer scale": (layer_scale, [A, M]),
    "cross": (cross, [A, C, M]),
    "joint": (joint, [A]),
    "tokens last, convolutions": (tokens_last, [A, M]),
    "skip over both": (skip_over_both, [A, M]),
    "stacked parameters": (middle(stacked), [A, M]),
    "mixture of experts": (middle(mixture), [A, M]),
    "glu": (middle(lambda m, x: m.down(F.silu(m.up(x)) * m.gate(x))), [A, M]),
    "attention alone": (no_stream_in_between, [A]),
}


def calls() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, W, generator=generator)
    return [
        (torch.randn(2, TOKENS, W, generator=generator), torch.full((2,), 90.0 - step), y)
        for step in range(STEPS)
    ]


@pytest.mark.parametrize("name", STYLES)
@torch.no_grad()
def test_sites_and_fora(name: str) -> None:
    style, kinds = STYLES[name]
    torch.manual_seed(0)
    model = Block(style)
    fill_random(model)
    traced = trace(model, calls()[0], dynamic_batch=False)
    assert [site.kind.value for site in traced.sites] == kinds
    run = cg.load(compile_traced(model, traced, fora(STEPS, INTERVAL)))
    model.keep = cache = Cache()
    for step, call in enumerate(calls()):
        cache.computes = step == 0 or (STEPS - 1 - step) % INTERVAL == 0
        found, wanted = run(*call), model(*call)
        assert relative_error(found, wanted) <= (1e-6 if name != "half precision" else 1e-3)
        model.keep = plain
        far = relative_error(found, model(*call))
        assert far > 1e-3 if not cache.computes else far <= 1e-6
        model.keep = cache
