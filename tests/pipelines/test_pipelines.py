"""Unmodified pipelines of diffusers, with one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from tests.pipes import FORA, FULL, PIPELINES, STEPS, Pipeline, traced_once
from tools.pipeline_matrix import Reference, relative_error


class Pair:
    """A pipeline that tests accelerate, and one of the same parts that they leave as it is."""

    def __init__(self, kind: Pipeline) -> None:
        self.kind, self.pipe, self.plain = kind, kind.build(), kind.build()

    def draw(self, **options: Any) -> Tensor:
        return self.kind.draw(self.pipe, **options)

    def check(self, **options: Any) -> None:
        """The image is that of the reference, and not that of the pipeline without a cache."""
        found = self.draw(**options)
        branches = self.kind.branches if options.get("guided", True) else 1
        reference = Reference(self.plain, self.pipe)
        plain, wanted = reference.draw(self.kind.draw, branches, **options)
        assert relative_error(found, wanted) <= 1e-4
        assert relative_error(found, plain) > 1e-3


# Of the others DiT has whole timesteps and no callbacks, SD3 one batch, Wan2.2 calls in turns.
DEAR = dict.fromkeys(("PixArt", "Flux", "Wan"), pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=DEAR.get(n, ())) for n in PIPELINES])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with traced_once():
        yield Pair(PIPELINES[request.param])


def test_full_is_the_pipeline_bit_for_bit(pair: Pair) -> None:
    with cg.accelerated(pair.pipe, FULL, backend="eager", strict=True):
        found = pair.draw()
        assert torch.equal(found, pair.kind.draw(pair.plain))
        calls = [one.calls["computed"] for one in cg.summary(pair.pipe).components]
        assert sum(calls) == STEPS * pair.kind.branches
        assert len(calls) == (2 if getattr(pair.pipe, "transformer_2", None) else 1)
    assert "forward" not in vars(pair.pipe.transformer)


IMAGES: list[Mapping[str, Any]] = [
    {},
    {"seed": 1, "prompt": 1},
    {"guided": False},
    {"batch": 2},
    {"steps": 5},
    {"seed": 2},
]


def test_fora_is_the_reference(pair: Pair) -> None:
    with cg.accelerated(pair.pipe, FORA, backend="eager", strict=True):
        for options in IMAGES:
            pair.check(**options)
    assert torch.equal(pair.draw(), pair.kind.draw(pair.plain))
