"""Scores that are taken of large attention maps, piece by piece."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cachegraph.graph import ops


class Largest(TorchFunctionMode):
    """Elements of the largest result of a softmax, and how many there were."""

    size = calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func is torch.softmax:
            self.size, self.calls = max(self.size, result.numel()), self.calls + 1
        return result


@pytest.mark.parametrize(("limit", "pieces"), [(2**24, 1), (1200, 1), (600, 2), (400, 3), (1, 4)])
def test_attention_received_in_pieces(limit: int, pieces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 10, 4, generator=generator) for _ in range(2))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as heads are cut from channels
    wanted = torch.stack(
        [
            sum(torch.softmax(q @ k.T / 2, dim=-1).sum(dim=0) for q, k in zip(*one, strict=True))
            / 3
            for one in zip(query, key, strict=True)
        ]
    )
    with mock.patch.object(ops, "_MAP_BYTES", limit), Largest() as largest:
        found = ops.attention_received(query, key, None)
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert largest.calls == pieces
    assert largest.size == 2 * 3 * 10 * -(-10 // pieces)
