"""Inputs that stay the same throughout a trajectory: the same contents are the same input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cachegraph.errors import SessionError
from cachegraph.runtime.known import _SMALL, Lasting
from tests.models import Compiled, dit_steps, one_thread  # noqa: F401

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
)
def test_what_is_no_number_may_be_the_same(dtype: torch.dtype) -> None:
    padded = torch.tensor([1.0, NAN, INF, -INF], dtype=dtype)
    kept = Lasting.of(padded)
    assert kept.is_same(padded)
    assert kept.is_same(padded.clone())
    for other in ([1.0, 2.0, INF, -INF], [NAN, NAN, INF, -INF], [1.0, NAN, INF, INF], [1.5, NAN]):
        changed = padded.clone()
        changed[: len(other)] = torch.tensor(other, dtype=dtype)
        assert not kept.is_same(changed)


def through_data(tensor: Tensor) -> None:
    tensor.data[0] += 1


def through_numpy(tensor: Tensor) -> None:
    tensor.numpy()[0] += 1


@pytest.mark.parametrize("write", [through_data, through_numpy])
def test_writes_that_torch_does_not_count(write: Callable[[Tensor], None]) -> None:
    small, large = (torch.zeros(count) for count in (_SMALL // 4, _SMALL // 4 + 1))
    kept = [Lasting.of(small), Lasting.of(large)]
    write(small)
    write(large)
    assert [one.is_same(t) for one, t in zip(kept, (small, large), strict=True)] == [False, True]
    assert not kept[1].is_same(large[:])  # as another tensor


@pytest.mark.parametrize("write", [through_data, through_numpy])
def test_a_class_that_is_written_to_unseen(write: Callable[[Tensor], None]) -> None:
    run, calls = Compiled(3).runner(), dit_steps(3)
    y = calls[0][2].clone()
    run(*calls[0][:2], y)
    write(y)
    with pytest.raises(SessionError, match="step 1: input 'y' changed in the middle"):
        run(*calls[1][:2], y)
