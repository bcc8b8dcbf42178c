"""Pipelines of which one form of call takes many sizes, where the model does."""

from __future__ import annotations

import pytest
import torch

import cachegraph as cg
from tests.pipes import FORA, PIPELINES
from tools.pipeline_matrix import relative_error


def test_one_form_takes_many_sizes_and_lengths() -> None:
    kind = PIPELINES["SD3"]
    pipe, plain, said = kind.build(), kind.build(), list[str]()
    sizes = ({}, {"height": 96}, {"height": 80, "length": 9})
    options = {"backend": "eager", "strict": True, "progress": said.append}
    with cg.accelerated(pipe, FORA, dynamic=["height", "width", "text"], **options):
        found = [kind.draw(pipe, **one) for one in sizes]
    assert len(said) == 1
    for image, one in zip(found, sizes, strict=True):
        with cg.accelerated(plain, FORA, **options):
            assert relative_error(image, kind.draw(plain, **one)) <= 1e-5


def test_a_model_that_fixes_its_sizes_is_compiled_for_each() -> None:
    kind = PIPELINES["DiT"]
    pipe, plain = kind.build(), kind.build()
    with (
        cg.accelerated(plain, FORA, backend="eager"),
        cg.accelerated(pipe, FORA, backend="eager", dynamic=["height"], progress=lambda _: None),
        pytest.warns(UserWarning, match=r"each size is compiled for itself.*height cannot vary"),
    ):
        assert torch.equal(kind.draw(pipe), kind.draw(plain))
