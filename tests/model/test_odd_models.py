"""Models that do what diffusers' do here and there: layouts, casts, defaults, shared outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import cachegraph as cg
from cachegraph.errors import TraceError
from cachegraph.model.trace import TracedModel, trace
from cachegraph.runtime.known import Prologues
from tests.models import compile_traced, fora

W = 8
linear = torch.ops.aten.linear.default
Forward = Callable[["Odd", Tensor, Tensor, Tensor], Any]


class Odd(nn.Module):
    """``x (B, N, C)``, ``t (B,)``, ``text (B, L, C)``; what it does with them is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(W, W) for _ in range(4))
        self.time = nn.Linear(1, W)
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W))
        self.inner = forward

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Any:
        return self.inner(self, x, t, text)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, W // 2).transpose(1, 2)

    def body(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(t[:, None].float())[:, None]
        return x + self.mlp(F.layer_norm(x, (W,)))


def refined_text(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    q, k, v = (m.heads(layer(text)) for layer in (m.q, m.k, m.v))
    text = m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return m.body(x + text.mean(1, keepdim=True), t)


def text_refined_by_time(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Several steps at once lay the result of attention out otherwise."""
    return refined_text(m, x, t, text + m.time(t[:, None])[:, None])


def heads_side_by_side(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The view needs the strides that the known value has."""
    value = F.gelu(m.heads(m.v(text)))
    mixed = value * x.mean((1, 2))[:, None, None, None]
    return m.body(x + m.o(mixed.transpose(1, 2).view(text.shape[0], -1, W)).mean(1, True), t)


def cast_like_the_image(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return m.body(x + m.o(text.mean(1)).type_as(x)[:, None], t.type_as(x))


def a_view_of_a_value(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    kept = m.mlp(F.layer_norm(x, (W,)))
    return m.body(x + kept + text.mean(1, keepdim=True), t), kept.transpose(1, 2)


def a_view_of_what_is_known(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    known = m.o(F.gelu(m.v(text)))
    return m.body(x + known.mean(1, keepdim=True), t), known.unsqueeze(1)


def the_value_itself(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    kept = m.mlp(F.layer_norm(x, (W,)))
    return m.body(x + kept + text.mean(1, keepdim=True), t), kept


FORWARDS = [
    refined_text,
    text_refined_by_time,
    heads_side_by_side,
    cast_like_the_image,
    a_view_of_a_value,
    a_view_of_what_is_known,
    the_value_itself,
]


def calls(steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, W, generator=generator)
    return [
        (torch.randn(2, 4, W, generator=generator), torch.full((2,), 90.0 - step), text)
        for step in range(steps)
    ]


def together(found: Any) -> Tensor:
    """All that a model returns."""
    return torch.cat([t.flatten() for t in (found if isinstance(found, tuple) else (found,))])


@cache
def compiled(forward: Forward) -> tuple[nn.Module, TracedModel, cg.Artifact]:
    """Once for all tests, which only run it."""
    model = Odd(forward).eval()
    traced = trace(model, calls(1)[0])
    return model, traced, compile_traced(model, traced, fora(6, 3))


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_as_the_reference_though_the_caller_writes_to_what_it_gets(forward: Forward) -> None:
    model, traced, made = compiled(forward)
    run = cg.load(made)
    reference = cg.ReferenceRunner.of_plan(model, traced, made.program.plan, made.schedule)
    for call in calls(6):
        found, wanted = run(*call), together(reference(*call))
        assert torch.equal(together(found), wanted)
        for tensor in found if isinstance(found, tuple) else (found,):
            tensor.fill_(1e6)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_for_several_steps_at_once(forward: Forward) -> None:
    _, _, made = compiled(forward)
    before = Prologues.of(made.program, made.prologues, batched=True)
    run = cg.Runner(made.program, made.graphs, made.weights, prologues=before)
    plain = cg.load(made)
    for call in calls(6) * 2:  # the second time all timesteps are known
        found, wanted = together(run(*call)), together(plain(*call))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "layers"),
    [(refined_text, 2), (heads_side_by_side, 3), (cast_like_the_image, 2)],
    ids=["refined", "heads", "cast"],
)
def test_what_depends_on_text_and_time_alone_leaves_the_step(forward: Forward, layers: int) -> None:
    _, _, made = compiled(forward)
    left = made.graphs[0].graph.find_nodes(op="call_function", target=linear)
    assert len(left) == layers  # the mlp's, and the one behind the image


class Defaults(Odd):
    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, text: Tensor, scale: tuple[float, ...] = (1.0, 2.0)
    ) -> Tensor:
        return self.body(x * scale[1] + text.mean(1, keepdim=True), t)


def test_a_default_may_be_a_tuple() -> None:
    model, call = Defaults(refined_text).eval(), calls(1)[0]
    run = cg.load(cg.compile(model, fora(6, 3), call, backend="eager"))
    assert torch.equal(run(*call), model(*call))
    run.reset()
    assert torch.equal(run(*call, scale=(1.0, 2.0)), model(*call))


def by_mask(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return m.body(x + text[text > 0].sum(), t)


def by_number(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return m.body(x * t[0].item() + text.mean(1, keepdim=True), t)


def by_function(m: Odd, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    q, k, v = (m.heads(layer(x)) for layer in (m.q, m.k, m.v))
    mixed = flex_attention(q, k, v, score_mod=lambda score, *_: score * 2)
    assert isinstance(mixed, Tensor)
    return m.body(x + m.o(mixed.transpose(1, 2).flatten(2)) + text.mean(1, keepdim=True), t)


@pytest.mark.parametrize("forward", [by_mask, by_function], ids=["mask", "function"])
def test_what_becomes_plain_is_as_the_reference(forward: Forward) -> None:
    model, traced, made = compiled(forward)
    run = cg.load(made)
    reference = cg.ReferenceRunner.of_plan(model, traced, made.program.plan, made.schedule)
    for call in calls(6):
        torch.testing.assert_close(run(*call), reference(*call), rtol=1e-5, atol=1e-6)


def test_a_number_of_the_timestep_is_refused() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Odd(by_number).eval(), calls(1)[0])
    assert caught.value.found == "input 't'"
    assert "test_odd_models.py" in caught.value.place


def test_without_weights_nothing_is_read() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Odd(by_mask).eval().to("meta"), [one.to("meta") for one in calls(1)[0]])
    assert caught.value.found == "index makes u0, which only contents decide"
    assert ".item()" in caught.value.remedy
