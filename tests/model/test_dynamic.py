"""Sizes that vary beside the batch: found by name, followed by tables, refused where fixed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.errors import ArtifactError, InputError, ModelError, PlanError, TraceError
from cachegraph.model.trace import TracedModel, trace
from tests.models import (
    TOCA,
    compile_traced,
    fora,
    full,
    refused,
    relative_error,
    signed,
    tiny_dit,
    tiny_flux,
    tiny_pixart,
)

W, STEPS = 8, 5
Inputs = dict[str, Any]


class Painter(nn.Module):
    """Noise of an image ``(B, 4, H, W)`` whose height is even, from text ``(B, L, W)``.

    Positions come from the sizes; an image higher than 16 is computed otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, W, 2, 2)
        self.qkv, self.to_q, self.to_kv = (nn.Linear(W, n * W) for n in (3, 1, 2))
        self.proj, self.proj2, self.last = (nn.Linear(W, n) for n in (W, W, 16))
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        torch._check(height % 2 == 0)
        torch._check(width % 2 == 0)
        x = self.patch(x) * (0.5 if height > 16 else 1)
        place = torch.arange(height // 2, device=x.device)[:, None] * torch.ones(1, width // 2)
        x = (x + place.sin()).flatten(2).transpose(1, 2) + t.view(-1, 1, 1)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        k, v = self.to_kv(text).unsqueeze(1).chunk(2, -1)
        q = self.to_q(x).unsqueeze(1)
        x = x + self.proj2(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = self.last(x + self.mlp(x))
        return F.pixel_shuffle(x.transpose(1, 2).view(batch, 16, height // 2, width // 2), 2)


def call(step: int, height: int = 8, width: int = 6, text: int = 5, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, 4, height, width, generator=generator)
    t = torch.full((batch,), 0.9 - step / 10)
    lasting = torch.Generator().manual_seed(100 * text + batch)
    return {"x": x, "t": t, "text": torch.randn(batch, text, W, generator=lasting)}


@cache
def painter() -> nn.Module:
    torch.manual_seed(0)
    return Painter().eval()


@cache
def traced() -> TracedModel:
    return trace(painter(), (), call(0), dynamic=["height", "width", "text"])


@cache
def artifact() -> cg.Artifact:
    return compile_traced(painter(), traced(), fora(STEPS, 3))


def worst(run: cg.Runner, **sizes: int) -> float:
    """Of a session, against the reference."""
    session = run.session()
    reference = cg.ReferenceRunner(painter(), fora(STEPS, 3))
    calls = [call(step, **sizes) for step in range(STEPS)]
    return max(
        relative_error(session(**one, step=step), reference(**one, step=step))
        for step, one in enumerate(calls)
    )


SIZES: tuple[dict[str, int], ...] = (
    {},
    {"height": 16, "width": 10, "text": 9},
    {"height": 4, "width": 4, "text": 3, "batch": 3},
    {"height": 12, "width": 22, "text": 2, "batch": 1},
)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_size_is_right(sizes: dict[str, int]) -> None:
    assert worst(cg.load(artifact()), **sizes) < 1e-6


def test_sizes_have_names() -> None:
    assert {*traced().names.values()} == {"batch", "height", "width", "text"}
    shape = traced().signature.inputs[0][1].shape
    assert [traced().names.get(str(dim)) for dim in shape] == ["batch", None, "height", "width"]


def test_sessions_of_different_sizes_interleave() -> None:
    run = cg.load(artifact())
    sizes = ({"text": 4}, {"height": 12, "text": 7})
    sessions = [run.session() for _ in sizes]
    found = [
        [one(**call(step, **each), step=step) for one, each in zip(sessions, sizes, strict=True)]
        for step in range(STEPS)
    ]
    for number, each in enumerate(sizes):
        alone = run.session()
        wanted = [alone(**call(step, **each), step=step) for step in range(STEPS)]
        assert all(torch.equal(a[number], b) for a, b in zip(found, wanted, strict=True))


def test_one_trajectory_has_one_size() -> None:
    session = cg.load(artifact()).session(quiet=True)
    session(**call(0), step=0)
    refused(lambda: session(**call(1, text=6), step=1), "'text' changed in the middle")


def test_conditions_are_checked_when_a_trajectory_begins() -> None:
    run = cg.load(artifact())
    refused(
        lambda: run.session(quiet=True)(**call(0, height=18), step=0), "height <= 16", "height = 18"
    )
    refused(lambda: run.session(quiet=True)(**call(0, height=7), step=0), "height", "== 0")
    refused(lambda: run.session(quiet=True)(**call(0, text=1), step=0), "text >= 2")


def test_sizes_that_are_not_asked_for_stay_fixed() -> None:
    run = cg.load(
        compile_traced(painter(), trace(painter(), (), call(0), dynamic=["text"]), full(STEPS))
    )
    run.session(quiet=True)(**call(0, text=7), step=0)
    refused(
        lambda: run.session(quiet=True)(**call(0, height=12), step=0),
        "but for the batch and the text",
        "--dynamic",
    )


def test_tables_of_positions_follow() -> None:
    """A model whose positions are an input, with a row a token."""
    model = tiny_flux(guidance_embed=False)

    def inputs(tokens: int, text: int) -> Inputs:
        generator = torch.Generator().manual_seed(tokens)
        shapes = {"img": (tokens, 16), "txt": (text, 8)}
        made = {n: torch.randn(2, *shape, generator=generator) for n, shape in shapes.items()}
        made |= {f"{n}_ids": torch.rand(2, s[0], 3, generator=generator) for n, s in shapes.items()}
        return made | {"timesteps": torch.full((2,), 0.5), "y": torch.ones(2, 8)}

    order = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y")
    example = {name: inputs(12, 5)[name] for name in order}
    found = trace(model, (), example, dynamic=["height", "width", "text"])
    assert {*found.names.values()} >= {"batch", "tokens", "text"}
    run = cg.load(compile_traced(model, found, full(STEPS)))
    for tokens, text in ((12, 5), (20, 7), (6, 3)):
        with torch.no_grad():
            wanted = model(**inputs(tokens, text))
        assert (
            relative_error(run.session(quiet=True)(**inputs(tokens, text), step=0), wanted) < 1e-6
        )


def test_the_length_of_the_text_varies_alone() -> None:
    model = tiny_pixart()
    x, t = torch.ones(2, 4, 8, 8), torch.ones(2)
    found = trace(model, (x, t, torch.ones(2, 1, 5, 16)), dynamic=["text"])
    run = cg.load(compile_traced(model, found, full(STEPS)))
    for length in (5, 3, 11):
        y = torch.randn(2, 1, length, 16)
        with torch.no_grad():
            assert relative_error(run.session(quiet=True)(x, t, y, step=0), model(x, t, y)) < 1e-6


def test_a_model_that_fixes_a_size_is_refused_with_the_line() -> None:
    example = (torch.ones(2, 4, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TraceError) as caught:
        trace(tiny_dit(), example, dynamic=["height", "width"])
    for part in ("height cannot vary", "takes 8 only", "layers.py", "several fixed sizes"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["hight"], ["no size is called 'hight'", "did you mean 'height'?"]),
        (["frames"], ["the model takes no frames", "x [2, 4, 8, 6]"]),
    ],
)
def test_wrong_names_are_refused(names: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        trace(painter(), (), call(0), dynamic=names)
    assert all(word in str(caught.value) for word in words)


def test_a_model_without_text_has_none_that_varies() -> None:
    example = (torch.ones(2, 4, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ModelError, match="the model takes no text"):
        trace(tiny_dit(), example, dynamic=["text"])


class Loops(Painter):
    """Reads the batch as a number."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, t * len(list(x.unbind())), text)


def test_a_fixed_batch_is_refused_where_it_has_to_vary() -> None:
    with pytest.raises(TraceError, match="the batch cannot vary"):
        trace(Loops().eval(), (), call(0), dynamic=["batch"])
    assert trace(painter(), (), call(0), dynamic=["batch"]).batch is not None


class Reads(Painter):
    """Weighs the text by how much of it a mask lets pass."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, t, text * int(mask.sum().item()))


def test_what_a_model_reads_cannot_vary() -> None:
    example = call(0) | {"mask": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(TraceError, match="reads numbers from an input of such a size"):
        trace(Reads().eval(), (), example, dynamic=["text"])


def test_tokens_are_chosen_of_a_known_number_only() -> None:
    with pytest.raises(PlanError) as caught:
        compile_traced(painter(), traced(), TOCA)
    assert "the tokens a number" in str(caught.value)
    assert "fixed image size" in str(caught.value)


def test_an_artifact_keeps_names_and_conditions(tmp_path: Path) -> None:
    path = artifact().save(tmp_path / "painter.cgraph")
    run = cg.load(path)
    assert run.program.names == traced().names
    assert worst(run, **SIZES[1]) < 1e-6
    refused(lambda: run.session(quiet=True)(**call(0, height=18), step=0), "height <= 16")
    signed(path, lambda manifest: manifest["forms"][0]["program"]["names"].update(s99="depth"))
    with pytest.raises(ArtifactError, match="sizes are called"):
        cg.load(path)


class Twice(Painter):
    """Of two texts, each of a length of its own."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_2: Tensor) -> Tensor:
        return super().forward(x, t, torch.cat([text, text_2], 1))


def test_two_texts_vary_by_themselves() -> None:
    model, example = Twice().eval(), call(0)
    found = trace(model, (), example | {"text_2": example["text"][:, :3]}, dynamic=["text"])
    assert {*found.names.values()} == {"batch", "text", "axis1_text_2"}
    session = cg.load(compile_traced(model, found, full(STEPS))).session(quiet=True)
    other = call(0, text=9) | {"text_2": example["text"]}
    with torch.no_grad():
        assert relative_error(session(**other, step=0), model(**other)) < 1e-6
