"""What a step does at a site.

An action names the steps whose values it uses, so a row says everything that a step needs and no
history has to be shifted while sampling. A value is made once, by the step it is named after.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """Run the site. The value of this step can be kept."""


@dataclass(frozen=True)
class Reuse:
    """Use the value that an earlier step made.

    Attributes:
        source: the step that made the value.
    """

    source: int


@dataclass(frozen=True)
class Forecast:
    """Use a weighted sum of values that earlier steps made.

    Attributes:
        sources: the steps that made the values, newest first.
        coefficients: one weight a source.
        keeps: the sum itself is a value that later steps may use (GOC); a sum that is not kept
            (TaylorSeer) is gone after the step.
    """

    sources: tuple[int, ...]
    coefficients: tuple[float, ...]
    keeps: bool = False


@dataclass(frozen=True)
class Refresh:
    """Recompute some tokens of a value that an earlier step made; the result is a new value.

    Attributes:
        source: the step that made the value.
        tokens: how many, 1 <= tokens < N.
        scored: the step whose scores the choice goes by: the last that computed the site.
        age: how many partial steps the site has had since then, those without tokens included; 0
            for the first.
    """

    source: int
    tokens: int
    scored: int
    age: int


Action = Compute | Reuse | Forecast | Refresh
Row = tuple[Action, ...]  # one action a site, in site order


def sources(action: Action) -> tuple[int, ...]:
    """The steps whose values the action uses."""
    match action:
        case Compute():
            return ()
        case Reuse(source) | Refresh(source):
            return (source,)
        case Forecast(sources=steps):
            return steps


def makes_value(action: Action) -> bool:
    """True where the action makes a value that a later step may use."""
    match action:
        case Compute() | Refresh():
            return True
        case Forecast(keeps=keeps):
            return keeps
        case Reuse():
            return False


def structure(action: Action) -> tuple[str, int]:
    """What decides the shape of the graph: the kind of action and how many values it uses."""
    return type(action).__name__.lower(), len(sources(action))
