"""No caching: the model as it is, and the baseline."""

from __future__ import annotations

from typing import Literal

from cachegraph.plan.action import Compute, Row

from .method import Method, Ruled


class Full(Method):
    """Every site is computed at every step."""

    method: Literal["full"]

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """Compute, everywhere."""
        return ((Compute(),) * len(sites),) * steps
