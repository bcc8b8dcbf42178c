"""TaylorSeer: extrapolate skipped steps from finite differences of computed ones.

Source: Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT/taylor_utils/__init__.py:5-47``. Steps are counted
down there, so a gap between computed steps is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import factorial

from cachegraph.plan.action import Action, Compute, Forecast, Reuse

from .policies import TaylorSeerPolicy

Weights = dict[int, Fraction]  # step that made a value -> its weight


def actions(policy: TaylorSeerPolicy, steps: int) -> list[Action]:
    """What each step does, the same at every site.

    The published code keeps divided differences ``F_0 .. F_order``; each is a weighted sum of
    computed values, and so is the forecast. Only these weights are needed beforehand. Of the
    first ``warmup`` steps only the last one takes differences.
    """
    result: list[Action] = []
    differences: list[Weights] = []
    last = 0
    for step in range(steps):
        if step < policy.warmup or (step - policy.warmup + 1) % policy.interval == 0:
            order = policy.order if step >= policy.warmup - 1 else 0
            differences = _updated(differences, step, last, order)
            last = step
            result.append(Compute())
        else:
            result.append(_forecast(differences, step - last))
    return result


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


def _forecast(differences: Sequence[Weights], distance: int) -> Action:
    """``sum_j F_j x^j / j!`` with ``x = -distance``."""
    total: Weights = {}
    for j, difference in enumerate(differences):
        factor = Fraction((-distance) ** j, factorial(j))
        for step, weight in difference.items():
            total[step] = total.get(step, Fraction()) + factor * weight
    sources = sorted((s for s, weight in total.items() if weight), reverse=True)
    if len(sources) == 1 and total[sources[0]] == 1:
        return Reuse(sources[0])
    return Forecast(tuple(sources), tuple(float(total[s]) for s in sources))
