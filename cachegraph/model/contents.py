"""What the contents of an input must be for a trace to be the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contents:
    """An input whose numbers the model reads to decide what it computes.

    Attributes:
        input: its index among the model's inputs.
        rows: every row of the batch must have the contents, whatever the batch.
        digest: of the contents, or of a row's.
        place: where they are read, such as ``model.py:12 in forward``.
    """

    input: int
    rows: bool
    digest: str
    place: str

    def fit(self, tensor: Tensor) -> bool:
        """Whether an input has these contents."""
        parts = tensor.unbind() if self.rows else (tensor,)
        return all(digest(part) == self.digest for part in parts)


def digest(tensor: Tensor) -> str:
    """Of shape, dtype and contents."""
    plain = tensor.detach().cpu().contiguous()
    made = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    made.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
