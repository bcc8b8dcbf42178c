"""What a plan costs, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanCost:
    """Predicted cost of one trajectory.

    Attributes:
        symbols: the sizes that it was computed for, such as the batch.
        flops: per step, with its share of what is computed beforehand; 1 multiply-add is 2 FLOPs,
            counted by ``torch.utils.flop_counter`` (matrix products, convolutions and attention).
        full_flops: of one uncached model call.
        cache_bytes: kept after each step.
        known_bytes: values known beforehand that are held when each step begins: those of the
            request, and those of every later step whose prologue has run.
        weight_bytes: of the weights, stored once for all variants.
        prologue_bytes: of the weights, those that only prologues use; ``release=True`` leaves them
            out of memory while steps run.
        peak_bytes: most that is in use at a time during each step by a backend that compiles; see
            ``compiler.cost.predict_peaks``.
    """

    symbols: Mapping[str, int]
    flops: tuple[int, ...]
    full_flops: int
    cache_bytes: tuple[int, ...]
    known_bytes: tuple[int, ...]
    weight_bytes: int
    peak_bytes: tuple[int, ...] = ()
    prologue_bytes: int = 0

    @property
    def total_flops(self) -> int:
        """FLOPs of all steps."""
        return sum(self.flops)

    @property
    def limit(self) -> float:
        """Speed-up if time were FLOPs: uncached over cached."""
        return len(self.flops) * self.full_flops / max(self.total_flops, 1)

    def mean_flops(self, steps: Sequence[int]) -> float:
        """FLOPs of a call: the mean over steps, of which each may recompute another k tokens."""
        return sum(self.flops[step] for step in steps) / len(steps)
