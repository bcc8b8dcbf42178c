"""A Python module of its own that keeps what it was asked for, for tests of models that call it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TABLES: dict[int, Tensor] = {}


def table(count: int) -> Tensor:
    """As many positions."""
    if count not in TABLES:
        TABLES[count] = torch.arange(float(count))
    return TABLES[count]


@functools.cache
def positions(count: int) -> Tensor:
    """Likewise, memoised."""
    return torch.arange(float(count))
