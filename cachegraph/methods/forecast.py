"""Forecasts with a choice of basis, between full steps that are listed or follow a rule.

Sources of the bases stand in ``bases``; the window that grows with every full step is Spectrum's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from cachegraph.config.problems import Problem, describe, refuse
from cachegraph.config.sections import Section
from cachegraph.plan.action import Row

from .bases import BASES, Shape
from .differences import at_interval, first_difference, forecast_rows
from .method import NOTHING_YET, Method, Ruled

_FORMS = "a list of steps, or a mapping with interval or window"


class FullSteps(Section):
    """Full steps by a rule: the first ``warmup``, then one in ``interval``, or ever farther apart.

    With ``window`` a step is full as many steps after the last one as the window says, rounded
    down, and the window then grows by ``growth``.
    """

    interval: int | None = Field(
        default=None, ge=1, description="a whole number, at least 1: one step in so many is full"
    )
    window: FiniteFloat | None = Field(
        default=None, ge=1, description="a number, at least 1: steps from one full one to the next"
    )
    growth: FiniteFloat = Field(
        default=0.0, ge=0, description="a number, at least 0: what the window grows by"
    )
    warmup: int = Field(
        default=1, ge=1, description="a whole number, at least 1: steps that are full at first"
    )

    def steps(self, count: int) -> list[int]:
        """The full ones of so many steps."""
        if self.interval is not None:
            return at_interval(count, self.interval, self.warmup)
        window, full = self.window or 1.0, list(range(min(self.warmup, count)))
        while (following := full[-1] + math.floor(window)) < count:
            full.append(following)
            window = round(window + self.growth, 3)
        return full

    @property
    def first_difference(self) -> int:
        """The first step that differences look at, where full steps are those of TaylorSeer."""
        return first_difference(self.warmup) if self.interval is not None else 0

    def problems(self, steps: int) -> Iterator[Problem]:
        """Not exactly one of interval and window, or more full steps than there are steps."""
        if (self.interval is None) == (self.window is None):
            found = "neither" if self.interval is None else "both"
            yield Problem((), "not one rule for full steps", "one of interval, window", found)
        elif self.window is None and self.growth:
            yield Problem(("growth",), "'growth' without a window", "'window'", f"{self.growth:g}")
        if self.warmup > steps:
            what = "'warmup' is longer than the trajectory"
            yield Problem(("warmup",), what, f"at most {steps} steps", f"{self.warmup}")


def _check_full_steps(given: object) -> object:
    match given:
        case Mapping():
            return FullSteps.model_validate(given)
        case tuple():
            expected = "a whole number"
            wrong = [(at, step) for at, step in enumerate(given) if type(step) is not int]
            what = "'full_steps[{}]' has the wrong type"
            problems = (Problem((at,), what.format(at), expected, describe(s)) for at, s in wrong)
            empty = () if given else (Problem((), "'full_steps' is empty", _FORMS),)
            refuse("full_steps", chain(problems, empty))
        case FullSteps():
            return given
        case _:
            problem = Problem((), "'full_steps' has the wrong type", _FORMS, describe(given))
            refuse("full_steps", [problem])
    return given


class ForecastMethod(Method):
    """Some steps are computed; all others are forecast from values of those."""

    example: ClassVar = {"basis": "lagrange", "order": 1, "full_steps": [0, 2, 5]}

    method: Literal["forecast"]
    basis: Literal["taylor", "lagrange", "hermite", "chebyshev", "foca", "adams"] = Field(
        description="one of adams, chebyshev, foca, hermite, lagrange, taylor"
    )
    full_steps: Annotated[tuple[int, ...] | FullSteps, BeforeValidator(_check_full_steps)] = Field(
        description=_FORMS
    )
    order: int | None = Field(
        default=None, ge=0, le=8, description="a whole number from 0 to 8: of the polynomial"
    )
    sigma: FiniteFloat | None = Field(
        default=None, gt=0, le=1, description="a number above 0, at most 1: scale of hermite"
    )
    ridge: FiniteFloat | None = Field(
        default=None, gt=0, description="a number above 0: the ridge of chebyshev"
    )
    blend: FiniteFloat | None = Field(
        default=None, ge=0, le=1, description="a number from 0 to 1: the ridge's share in chebyshev"
    )
    history: int | None = Field(
        default=None, ge=1, description="a whole number, at least 1: full steps chebyshev looks at"
    )
    since: int | None = Field(
        default=None, ge=0, description="a step: forecasts look at no full step before it"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """Keys of another basis, full steps that cannot be, an order that is too high."""
        basis = BASES[self.basis]
        keys = {key for other in BASES.values() for key in other.keys} - set(basis.keys)
        for key in sorted(keys | ({"order"} if basis.order is None else set())):
            if getattr(self, key) is not None:
                able = [
                    n for n, b in BASES.items() if key in b.keys or (key == "order" and b.order)
                ]
                what = f"{key!r} with 'basis: {self.basis}'"
                yield Problem((key,), what, f"'basis: {' or '.join(able)}', or no such key")
        if isinstance(self.full_steps, FullSteps):
            found = list(self.full_steps.problems(steps))
        else:
            found = list(self._listed_problems(self.full_steps, steps))
        yield from (Problem(("full_steps", *p.path), *_rest(p)) for p in found)
        most = steps if found or basis.fits else len(self.computed(steps)) - 1
        if (self.order or 0) > most:
            expected = f"an order of at most {most}: {most + 1} steps are full"
            yield Problem(("order",), "the order is too high", expected, f"{self.order}")

    @staticmethod
    def _listed_problems(listed: tuple[int, ...], steps: int) -> Iterator[Problem]:
        for at, step in enumerate(listed):
            name = f"'full_steps[{at}]'"
            if at == 0 and step != 0:
                what = f"{name} is not step 0: {NOTHING_YET}"
                yield Problem((at,), what, "0 as the first step", f"{step}")
            elif not 0 <= step < steps:
                expected = f"a step from 0 to {steps - 1}"
                yield Problem((at,), f"{name} is out of range", expected, f"{step}")
            elif at and step <= listed[at - 1]:
                expected = f"a step after {listed[at - 1]}"
                yield Problem((at,), f"{name} is out of order", expected, f"{step}")

    def computed(self, steps: int) -> list[int]:
        """The full steps."""
        if isinstance(self.full_steps, FullSteps):
            return self.full_steps.steps(steps)
        return list(self.full_steps)

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What each step does, the same at every site."""
        basis, rule, usual = BASES[self.basis], self.full_steps, Shape()
        since = self.since or 0
        if self.since is None and basis.differs and isinstance(rule, FullSteps):
            since = rule.first_difference
        shape = Shape(
            order=(basis.order or 0) if self.order is None else self.order,
            sigma=usual.sigma if self.sigma is None else self.sigma,
            ridge=usual.ridge if self.ridge is None else self.ridge,
            blend=usual.blend if self.blend is None else self.blend,
            history=self.history,
        )
        return forecast_rows(steps, self.computed(steps), basis, shape, len(sites), since=since)


def _able(key: str) -> str:
    """The bases that have a key."""
    have = [
        n for n, b in BASES.items() if key in b.keys or (key == "order" and b.order is not None)
    ]
    return " or ".join(have)


def _rest(problem: Problem) -> tuple[str, str, str, str]:
    return problem.what, problem.expected, problem.found, problem.remedy
