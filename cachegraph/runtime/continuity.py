"""Whether a call goes on with the image of the call before it, told from the latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Of a latent of n numbers that has nothing to do with k others, the share that lies in their span
# is about k/n (squared norms). A sampler's next latent lies in the span almost whole; even one
# that adds fresh noise at every step keeps a few per cent of it.
_CHANCE = 12.0
_PLAINLY = 0.25


class Link(Enum):
    """How the latent of a call is related to the call before."""

    UNKNOWN = 0  # nothing to compare, or not compared
    SAME = 1  # the very same latent
    FOLLOWS = 2  # made from the last latent and output
    APART = 3  # of another image


@dataclass(frozen=True)
class Trail:
    """The latent and the outputs of the last call.

    Attributes:
        latent: a copy; samplers write to theirs.
        outputs: what the model returned, as far as it has the form of the latent.
    """

    latent: Tensor
    outputs: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, latent: Tensor, outputs: Sequence[Tensor]) -> Trail:
        """What a call leaves behind."""
        return cls(latent.clone(), tuple(outputs))

    @torch.no_grad()
    def link(self, latent: Tensor) -> Link:
        """How a call's latent is related to the last call's.

        A sampler's step is close to linear: the next latent is a weighted sum of the last one, of
        the outputs (both halves, where guidance mixes them) and of noise.
        """
        last = self.latent
        alike = (last.shape, last.dtype, last.device) == (latent.shape, latent.dtype, latent.device)
        if not alike or not latent.is_floating_point() or not latent.ndim:
            return Link.UNKNOWN
        if torch.equal(latent, last):
            return Link.SAME
        half = len(latent) // 2 if len(latent) % 2 == 0 else len(latent)
        given, before = latent[:half].reshape(-1).float(), last[:half].reshape(-1).float()
        chance = _CHANCE * (1 + 2 * len(self.outputs)) / given.numel()
        if chance >= _PLAINLY:
            return Link.UNKNOWN  # too few numbers to tell
        dots = torch.stack([given @ before, given @ given, before @ before]).tolist()
        if dots[0] ** 2 > _PLAINLY * dots[1] * dots[2] > 0:
            return Link.FOLLOWS
        parts = (part for out in self.outputs for part in _parts(out, last, half))
        basis = torch.stack([before, *(part.reshape(-1).float() for part in parts)], dim=1)
        if not basis.isfinite().all() or not dots[1] > 0:
            return Link.UNKNOWN
        share = float((basis @ (torch.linalg.pinv(basis) @ given)).square().sum()) / dots[1]
        return Link.APART if share < chance else Link.FOLLOWS


def _parts(output: Tensor, like: Tensor, half: int) -> list[Tensor]:
    """The halves of an output without the channels that the latent does not have."""
    if output.ndim != like.ndim or len(output) != len(like):
        return []
    for dim, size in enumerate(like.shape):
        if output.shape[dim] < size:
            return []
        output = output.narrow(dim, 0, size)
    return [output[start : start + half] for start in range(0, len(like), half)]
