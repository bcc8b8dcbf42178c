"""Numbers that a model reads: recorded, replayed, and checked when a trajectory begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import TraceError
from cachegraph.model.reads import record
from cachegraph.model.trace import trace
from tests.models import compile_traced, fora, refused, relative_error

W, STEPS = 4, 3
Read = Callable[[Tensor, Tensor], Tensor]  # text (B, L, C) and mask (B, L) to (B, 1, C)


class Reads(nn.Module):
    """A residual mlp on ``x (B, N, C)``, with something that is read of text and mask."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W))
        self.read = read

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = x * t[:, None, None] + self.read(text, mask)
        return x + self.mlp(x)


def lengths(text: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(
        [one[:n].mean(0) for one, n in zip(text, mask.sum(1).tolist(), strict=True)]
    )[:, None]


def slices_by_tensors(text: Tensor, mask: Tensor) -> Tensor:
    ends = mask.sum(1)
    return torch.stack([text[i, : ends[i]].sum(0) for i in range(len(text))])[:, None]


def picked_by_mask(text: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([one[m].mean(0) for one, m in zip(text, mask, strict=True)])[:, None]


def positions(text: Tensor, mask: Tensor) -> Tensor:
    found = torch.nonzero(mask[0]).flatten()
    return text[:, found].mean(1, keepdim=True)


def branch(text: Tensor, mask: Tensor) -> Tensor:
    return text.mean(1, keepdim=True) if mask.all() else text[:, :1]


def longest(text: Tensor, mask: Tensor) -> Tensor:
    return text[:, : int(mask.sum(1).max())].mean(1, keepdim=True)


def repeated(text: Tensor, mask: Tensor) -> Tensor:
    return text.repeat_interleave(1 + mask[0].long(), dim=1).mean(1, keepdim=True)


def through_numpy(text: Tensor, mask: Tensor) -> Tensor:
    return text[:, : mask[0].numpy().sum()].mean(1, keepdim=True)


def mask_made_on_the_way(text: Tensor, mask: Tensor) -> Tensor:
    valid = torch.zeros_like(mask)
    valid[:, :3] = mask[:, :3]
    return text[:, valid[0]].mean(1, keepdim=True)


# how the batch may vary: any, or item by item
READS: dict[str, tuple[Read, str]] = {
    "lengths": (lengths, "items"),
    "slices by tensors": (slices_by_tensors, "items"),
    "picked by mask": (picked_by_mask, "items"),
    "positions": (positions, "any"),
    "branch": (branch, "any"),
    "longest": (longest, "any"),
    "repeated": (repeated, "any"),
    "through numpy": (through_numpy, "any"),
    "mask made on the way": (mask_made_on_the_way, "any"),
}


def call(step: int, batch: int, valid: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    text = torch.randn(batch, 5, W, generator=generator)
    mask = (torch.arange(5) < valid).expand(batch, -1).clone()
    x = torch.randn(batch, 3, W, generator=generator) + step
    return {"x": x, "t": torch.full((batch,), 0.9 - step / 10), "text": text, "mask": mask}


@pytest.mark.parametrize("name", READS)
def test_read_numbers_are_replayed_and_checked(name: str) -> None:
    read, varies = READS[name]
    model = Reads(read).eval()
    traced = trace(model, (), call(0, 2))
    assert [traced.signature.inputs[one.input][0] for one in traced.contents] == ["mask"]
    assert "test_reads.py" in traced.contents[0].place
    assert (traced.items is not None, traced.batch is not None) == (
        varies == "items",
        varies == "any",
    )
    made = compile_traced(model, traced, fora(STEPS, 2))
    run = cg.load(made)
    for batch in (1, 2, 3):
        reference = cg.ReferenceRunner.of_plan(model, traced, made.program.plan, made.schedule)
        session = run.session()
        for step in range(STEPS):
            found = session(**call(step, batch))
            assert relative_error(found, reference(**call(step, batch))) <= 1e-6
            with torch.no_grad():
                assert step or relative_error(found, model(**call(step, batch))) <= 1e-6
    refused(lambda: run.session()(**call(0, 2, valid=4)), "contents of 'mask'", "compile the model")
    session = run.session()
    session(**call(0, 2))
    refused(lambda: session(**call(1, 2, valid=4)), "'mask' changed in the middle")


def test_rows_that_differ_keep_the_batch_as_it_is() -> None:
    model, given = Reads(lengths).eval(), call(0, 2)
    given["mask"][1, 3] = True
    traced = trace(model, (), given)
    assert (traced.batch, traced.items) == (None, None)
    assert "depends on the batch" in traced.fixed_batch_reason
    made = cg.load(compile_traced(model, traced, fora(STEPS, 2)))
    with torch.no_grad():
        assert relative_error(made(**given), model(**given)) <= 1e-6


class FromTheLatent(Reads):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        expert = int(x.mean((1, 2)).argmax())
        return x + self.mlp(x) * (expert + 1)


def test_numbers_of_the_latent_are_refused() -> None:
    with pytest.raises(TraceError) as caught:
        trace(FromTheLatent(branch).eval(), (), call(0, 2))
    assert caught.value.found == "input 'x'"
    assert "test_reads.py" in caught.value.place
    assert "every expert" in caught.value.remedy


def test_an_input_that_varies_cannot_be_read() -> None:
    with pytest.raises(TraceError, match="reads numbers from an input that differs"):
        cg.compile(Reads(branch).eval(), fora(3, 2), (), call(0, 2), varying=["mask"])


def test_origins_follow_memory_and_not_names() -> None:
    """A view that is written to carries on to what it is a view of; new memory starts afresh."""

    class Writes(nn.Module):
        def forward(self, one: Tensor, two: Tensor, three: Tensor) -> Any:
            held = torch.zeros(4)
            held[1:3].copy_(one[:2])
            held.view(2, 2)[0].add_(two[:2])
            return [held.sum().item(), three.max().item(), torch.ones(2).sum().item()]

    reads = record(Writes(), {name: torch.rand(4) for name in ("one", "two", "three")})
    assert [read.inputs for read in reads.values()] == [{0, 1}, {2}, set()]


# --- x[mask] = f(x[mask]) needs no contents


class Drops(Reads):
    """Some samples are to be without text."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, drop: Tensor) -> Tensor:
        text = text.clone()
        text[drop] *= 0.5
        x = x * t[:, None, None] + text.mean(1, keepdim=True)
        return x + self.mlp(x)


@pytest.mark.parametrize("rows", [False, True], ids=["tokens", "samples"])
def test_a_write_through_a_mask_is_a_choice(rows: bool) -> None:
    model = Drops(branch).eval()
    given = [call(0, 2), call(0, 2, valid=4)]
    masks = [torch.tensor([True, False]), torch.tensor([False, False])]
    calls = [
        {"x": one["x"], "t": one["t"], "text": one["text"], "drop": mask if rows else one["mask"]}
        for one, mask in zip(given, masks, strict=True)
    ]
    traced = trace(model, (), calls[0])
    assert traced.batch is not None
    assert traced.contents == ()
    run = cg.load(compile_traced(model, traced, fora(2, 2)))
    for one in calls:
        with torch.no_grad():
            assert relative_error(run.session()(**one), model(**one)) <= 1e-6
