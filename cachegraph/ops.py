"""The cache operations that stand in a rewritten graph until they are lowered.

Plain functions of tensors, so a graph that holds them still runs in eager.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def read(slot: Tensor) -> Tensor:
    """The value kept in a slot, ``(B, N, C)``."""
    return slot


def write(value: Tensor, slot: str) -> Tensor:
    """Hand out a value ``(B, N, C)`` to be kept under the name ``slot``."""
    return value


def forecast(values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Weighted sum of kept values.

    Args:
        values: m tensors of one shape, newest first.
        coefficients: ``(m,)`` float32, a step constant.
    """
    total = values[0] * coefficients[0]
    for i, value in enumerate(values[1:], 1):
        total = total + value * coefficients[i]
    return total


CACHE_OPS = frozenset({read, write, forecast})
