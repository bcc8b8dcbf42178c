"""FORA: compute every site at every N-th step, reuse in between (prathebaselva/FORA)."""

from __future__ import annotations

from .policies import FoRAPolicy


def full_steps(policy: FoRAPolicy, steps: int) -> frozenset[int]:
    """The steps that are computed.

    The published code counts down: with ``i = steps - 1 - step``, a step is full where
    ``i == steps - 1`` or ``i % interval == 0`` (``src/models.py:139-152``).
    """
    if policy.count == "up":
        return frozenset(range(0, steps, policy.interval))
    return frozenset({0, *range(steps - 1, -1, -policy.interval)})
