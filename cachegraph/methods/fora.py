"""FORA: compute every site at every N-th step, reuse in between (prathebaselva/FORA)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from cachegraph.plan.action import Row

from .method import Method, Ruled, resolve


class Fora(Method):
    """Every site is computed at every ``interval``-th step and reused in between."""

    correctable: ClassVar[bool] = True
    example: ClassVar = {"interval": 3}

    method: Literal["fora"]
    interval: int = Field(
        ge=1, description="a whole number, at least 1: one step in so many is computed"
    )
    count: Literal["down", "up"] = Field(default="down", description="one of down, up")

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """Whole steps that compute, and whole steps that reuse the newest."""
        full = self.full_steps(steps)
        return resolve([[step in full] * len(sites) for step in range(steps)])

    def full_steps(self, steps: int) -> frozenset[int]:
        """The steps that are computed.

        The published code counts down: with ``i = steps - 1 - step``, a step is full where
        ``i == steps - 1`` or ``i % interval == 0`` (``src/models.py:139-152``).
        """
        if self.count == "up":
            return frozenset(range(0, steps, self.interval))
        return frozenset({0, *range(steps - 1, -1, -self.interval)})
