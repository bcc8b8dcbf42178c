"""The measured curves that a calibrated schedule carries along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, FiniteFloat, PlainSerializer

from cachegraph.config.problems import Problem, describe, refuse
from cachegraph.config.sections import Section

LARGEST = 1e9  # a relative change: something is wrong with the model long before

Curves = tuple[tuple[str, tuple[tuple[float, ...], ...]], ...]  # a mapping that can be hashed


def _check_curves(curves: object) -> Curves:
    """The curves by kind of site if each is a list of numbers; their lengths come later."""
    if not isinstance(curves, Mapping):
        expected = "a mapping of kinds of sites to curves, a list for each distance"
        refuse("errors", [Problem((), "'errors' has the wrong type", expected, describe(curves))])
        return ()
    refuse("errors", [p for kind, lists in curves.items() for p in _curve_problems(kind, lists)])
    return tuple(
        (kind, tuple(tuple(float(n) for n in curve) for curve in lists))
        for kind, lists in curves.items()
    )


def _curve_problems(kind: str, lists: object) -> Iterator[Problem]:
    if not isinstance(lists, list | tuple) or not lists:
        yield Problem((kind,), f"{kind!r} has no curves", "a list for each distance from 1")
        return
    for at, curve in enumerate(lists):
        name = f"{kind}[{at}]"
        if not isinstance(curve, list | tuple):
            expected = "a list of numbers, one a step"
            yield Problem((kind, at), f"{name!r} is no list", expected, describe(curve))
            continue
        for step, number in enumerate(curve):
            number_like = isinstance(number, int | float) and not isinstance(number, bool)
            if not number_like or not 0 <= number <= LARGEST:  # NaN is neither
                what = f"'{name}[{step}]' is no error"
                yield Problem((kind, at, step), what, "a number from 0 to 1e9", describe(number))


class CalibrationData(Section):
    """What ``cachegraph calibrate`` measured of the uncached model.

    It says where a schedule comes from and lets others choose another bound; what is computed
    does not depend on it.

    Attributes:
        model: what was measured.
        trajectories: over how many trajectories the errors are averaged.
        bound: the largest error that the schedule allows.
        errors: kind of site -> distance -> step: mean relative L1 change of the sites' values from
            ``step`` to ``step + distance``; distances begin with 1.
    """

    model: str | None = Field(default=None, min_length=1, description="the name of a model")
    trajectories: int = Field(ge=1, description="a whole number, at least 1")
    bound: FiniteFloat | None = Field(default=None, ge=0, description="a number, at least 0")
    errors: Annotated[Curves, BeforeValidator(_check_curves), PlainSerializer(dict)] = Field(
        description="a mapping of kinds of sites to curves, a list for each distance"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """Curves that do not have one number a step."""
        if not self.errors:
            yield Problem(("errors",), "'errors' is empty", "curves for each kind of site")
        for kind, curves in self.errors:
            for at, curve in enumerate(curves):
                if len(curve) != steps - at - 1:
                    yield Problem(
                        ("errors", kind, at),
                        f"'{kind}[{at}]' has the wrong length",
                        f"{steps - at - 1} numbers: {steps} steps less the distance {at + 1}",
                        f"{len(curve)}",
                    )
