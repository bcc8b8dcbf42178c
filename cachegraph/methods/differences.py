"""What TaylorSeer and HiCache have in common, and the rows of all forecasts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

from pydantic import Field

from cachegraph.config.problems import Problem
from cachegraph.plan.action import Action, Compute, Forecast, Reuse, Row

from .bases import BASES, Basis, History, Shape
from .method import Method, Ruled


class DifferenceMethod(Method):
    """Forecast skipped steps from finite differences of computed ones.

    The first ``warmup`` steps are computed, then every ``interval``-th. Of the warmup only the last
    step takes differences, as in TaylorSeer's published code.
    """

    example: ClassVar = {"interval": 3, "order": 2}
    basis_name: ClassVar[str]

    interval: int = Field(
        ge=1, description="a whole number, at least 1: one step in so many is computed"
    )
    order: int = Field(
        default=4, ge=0, le=8, description="a whole number from 0 to 8: highest derivative"
    )
    warmup: int = Field(
        default=2, ge=1, description="a whole number, at least 1: steps computed at first"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """A warmup that is longer than the trajectory, or a history that never fills."""
        if self.warmup > steps:
            what = "'warmup' is longer than the trajectory"
            yield Problem(("warmup",), what, f"at most {steps} steps", f"{self.warmup}")
            return
        computed = self.warmup + (steps - self.warmup) // self.interval
        most = computed - max(self.warmup - 1, 1)  # the warmup takes differences in its last step
        if self.order > max(most, 0):
            what = "the history is deeper than the trajectory"
            expected = f"an order of at most {max(most, 0)}: {computed} steps are computed"
            remedy = "lower 'order' or 'interval'"
            yield Problem(("order",), what, expected, f"{self.order}", remedy)

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What each step does, the same at every site."""
        full = at_interval(steps, self.interval, self.warmup)
        since = first_difference(self.warmup)
        basis = BASES[self.basis_name]
        return forecast_rows(steps, full, basis, self.shape(), len(sites), since=since)

    def shape(self) -> Shape:
        """What the basis is told."""
        return Shape(self.order)


def at_interval(steps: int, interval: int, warmup: int) -> list[int]:
    """The first ``warmup`` steps, then every ``interval``-th."""
    return [s for s in range(steps) if s < warmup or (s - warmup + 1) % interval == 0]


def first_difference(warmup: int) -> int:
    """The first step that is looked at: the last of a warmup takes a difference to the one before.

    Source: ``TaylorSeer-DiT/taylor_utils/__init__.py``, as for ``differences``.
    """
    return max(warmup - 2, 0)


def forecast_rows(
    steps: int, full: Collection[int], basis: Basis, shape: Shape, sites: int, *, since: int = 0
) -> tuple[Row, ...]:
    """Rows that compute the full steps and forecast all others, the same at every site.

    Only the weights of values are needed beforehand, whatever recursion they come from.

    Args:
        steps: of a trajectory.
        full: the steps that are computed, the first among them.
        basis: of the forecasts.
        shape: of the forecasts.
        sites: how many.
        since: the first full step that forecasts look at, once there is a later one.
    """
    rows: list[Row] = []
    seen: list[int] = []
    used: list[int] = []
    for step in range(steps):
        if step in full:
            seen = [step, *(s for s in seen if s >= since)]
            action: Action = Compute()
            used.append(step)
        else:
            weights = basis.weights(History(step, seen, used), shape)
            action = _action({s: float(w) for s, w in weights.items() if w}, basis.keeps)
            used.append(action.source if isinstance(action, Reuse) else step)
        rows.append((action,) * sites)
    return tuple(rows)


def _action(weights: dict[int, float], keeps: bool) -> Action:
    sources = sorted(weights, reverse=True)
    if list(weights.values()) == [1]:
        return Reuse(sources[0])
    return Forecast(tuple(sources), tuple(weights[s] for s in sources), keeps)
