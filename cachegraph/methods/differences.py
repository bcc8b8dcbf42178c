"""Forecasts from finite differences of computed steps, whatever polynomials they are weighted with.

Source: Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT/taylor_utils/__init__.py:5-47``. Steps are counted
down there, so a gap between computed steps is negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import ClassVar

from pydantic import Field

from cachegraph.config.problems import Problem
from cachegraph.plan.action import Action, Compute, Forecast, Reuse, Row

from .method import Method, Ruled

Weights = dict[int, Fraction]  # step that made a value -> its weight


class DifferenceMethod(Method):
    """Forecast skipped steps from finite differences of computed ones.

    The first ``warmup`` steps are computed, then every ``interval``-th. Of the warmup only the last
    step begins a history, as in TaylorSeer's published code.
    """

    example: ClassVar = {"interval": 3, "order": 2}

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
        """What each step does, the same at every site.

        The published code keeps divided differences ``F_0 .. F_order``; each is a weighted sum of
        computed values, and so is the forecast. Only these weights are needed beforehand. Of the
        first ``warmup`` steps only the last one takes differences.
        """
        rows: list[Row] = []
        differences: list[Weights] = []
        last = 0
        for step in range(steps):
            action: Action = Compute()
            if step < self.warmup or (step - self.warmup + 1) % self.interval == 0:
                order = self.order if step >= self.warmup - 1 else 0
                differences = _updated(differences, step, last, order)
                last = step
            else:
                action = self._forecast(differences, step - last)
            rows.append((action,) * len(sites))
        return tuple(rows)

    def factor(self, order: int, distance: int) -> Fraction:
        """The weight of ``F_order`` so many steps after the last computed one.

        Steps are counted down, so where a forecast has an ``x``, it is ``-distance``.
        """
        raise NotImplementedError

    def _forecast(self, differences: Sequence[Weights], distance: int) -> Action:
        """The sum of the differences, each times its factor."""
        total: Weights = {}
        for j, difference in enumerate(differences):
            factor = self.factor(j, distance)
            for step, weight in difference.items():
                total[step] = total.get(step, Fraction()) + factor * weight
        sources = sorted((s for s, weight in total.items() if weight), reverse=True)
        if len(sources) == 1 and total[sources[0]] == 1:
            return Reuse(sources[0])
        return Forecast(tuple(sources), tuple(float(total[s]) for s in sources))


def _updated(old: Sequence[Weights], step: int, last: int, order: int) -> list[Weights]:
    """``F_0`` = the value; ``F_{j+1} = (F_j - old F_j) / gap``, as far as an old one exists."""
    new: list[Weights] = [{step: Fraction(1)}]
    for j in range(min(order, len(old))):
        gap = -(step - last)
        steps = sorted({*new[j], *old[j]}, reverse=True)
        new.append(
            {s: (new[j].get(s, Fraction()) - old[j].get(s, Fraction())) / gap for s in steps}
        )
    return new
