"""The plan: the table step x site -> action, with everything resolved.

A value is named by its site and the step that made it. So liveness is known before anything runs:
the runner frees a value after the last step that uses it, and no history is ever shifted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .action import (
    Action,
    Compute,
    Forecast,
    Reuse,
    Row,
    makes_value,
    sources,
    structure,
)
from .errors import PlanError
from .site import Site
from .slot import StepConstant


@dataclass(frozen=True)
class Variant:
    """One specialised graph: the steps whose rows have the same structure share it.

    Attributes:
        name: ``variant0``, numbered by first use.
        steps: the steps that run it.
        row: the row of its first step; the structure is the same in all of them.
        writes: per site, whether the graph hands out the site's values to be kept.
        constants: inputs that differ from step to step.
    """

    name: str
    steps: tuple[int, ...]
    row: Row
    writes: tuple[bool, ...]
    constants: tuple[StepConstant, ...]


@dataclass(frozen=True)
class Plan:
    """What every step does, resolved before anything runs.

    Attributes:
        sites: every site of the model, in execution order.
        rows: one row a step; ``rows[step][i]`` is the action at ``sites[i]``.
        variants: the specialised graphs.
        variant_of: step -> index into ``variants``.
    """

    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    variants: tuple[Variant, ...]
    variant_of: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Model calls per trajectory and branch."""
        return len(self.rows)

    @cached_property
    def last_use(self) -> dict[tuple[int, int], int]:
        """(site index, step that made the value) -> last step that uses it."""
        return _last_use(self.rows)

    @cached_property
    def freed_after(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per step, the values (site index, step made) that nothing needs afterwards."""
        freed: list[list[tuple[int, int]]] = [[] for _ in self.rows]
        for value, step in self.last_use.items():
            freed[step].append(value)
        return tuple(tuple(sorted(values)) for values in freed)

    def is_kept(self, site: int, step: int) -> bool:
        """True where a later step uses the value that ``step`` makes at the site."""
        return (site, step) in self.last_use

    def cache_bytes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Bytes of the values that live on after each step.

        Args:
            symbols: a number for each shape symbol, such as the batch.
        """
        size = [sum(v.spec.nbytes(symbols) for v in site.values) for site in self.sites]
        live = [0] * self.steps
        for (site, made), last in self.last_use.items():
            for step in range(made, last):
                live[step] += size[site]
        return tuple(live)

    def full_steps(self) -> int:
        """How many steps compute every site."""
        return sum(all(isinstance(a, Compute) for a in row) for row in self.rows)


def make_plan(
    sites: Sequence[Site],
    rows: Sequence[Row],
    *,
    max_variants: int | None = None,
    place: str = "schedule",
) -> Plan:
    """Check the rows and merge them into variants.

    Args:
        sites: every site of the model.
        rows: one a step, one action a site.
        max_variants: refuse more specialised graphs than this.
        place: where the schedule is written, for errors.

    Raises:
        PlanError: a row of the wrong length, a value used before it was made or that its step does
            not make, coefficients that do not fit, or too many variants.
    """
    for step, row in enumerate(rows):
        if len(row) != len(sites):
            raise PlanError(
                f"the row of step {step} does not fit the model",
                place=place,
                expected=f"{len(sites)} actions, one a site",
                found=str(len(row)),
            )
        for index, action in enumerate(row):
            _check_action(sites[index], rows, step, index, place)
            _check_forecast(sites[index], action, step, place)
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for step, row in enumerate(rows):
        groups.setdefault(tuple(structure(a) for a in row), []).append(step)
    if max_variants is not None and len(groups) > max_variants:
        raise PlanError(
            f"the schedule needs {len(groups)} variants",
            place=place,
            expected=f"at most {max_variants} (max_variants)",
            found="; ".join(_describe_group(key, steps) for key, steps in groups.items()),
            remedy="raise max_variants or make rows alike",
        )
    kept = _last_use(rows)
    variants = tuple(
        _variant(f"variant{i}", steps, sites, rows, kept) for i, steps in enumerate(groups.values())
    )
    variant_of = {step: i for i, variant in enumerate(variants) for step in variant.steps}
    return Plan(tuple(sites), tuple(rows), variants, tuple(variant_of[s] for s in range(len(rows))))


def _variant(
    name: str,
    steps: Sequence[int],
    sites: Sequence[Site],
    rows: Sequence[Row],
    kept: Mapping[tuple[int, int], int],
) -> Variant:
    # A write that only some of the steps need stays in the shared graph: leaving it out of those
    # steps alone would split the variant.
    writes = tuple(any((i, step) in kept for step in steps) for i in range(len(sites)))
    return Variant(name, tuple(steps), rows[steps[0]], writes, _constants(steps, sites, rows))


def _constants(
    steps: Sequence[int], sites: Sequence[Site], rows: Sequence[Row]
) -> tuple[StepConstant, ...]:
    """Forecast coefficients; sites whose numbers agree in every step share one constant."""
    shared: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for i, site in enumerate(sites):
        if isinstance(rows[steps[0]][i], Forecast):
            actions = [rows[step][i] for step in steps]
            numbers = tuple(a.coefficients for a in actions if isinstance(a, Forecast))
            shared.setdefault(numbers, []).append(site.name)
    return tuple(
        StepConstant(f"forecast{i}", tuple(names), dict(zip(steps, numbers, strict=True)))
        for i, (numbers, names) in enumerate(shared.items())
    )


def _last_use(rows: Sequence[Row]) -> dict[tuple[int, int], int]:
    return {
        (i, source): step
        for step, row in enumerate(rows)
        for i, action in enumerate(row)
        for source in sources(action)
    }


def _check_action(site: Site, rows: Sequence[Row], step: int, index: int, place: str) -> None:
    for source in sources(rows[step][index]):
        if not 0 <= source < step:
            raise PlanError(
                f"step {step} uses a value of {site.name} that does not exist yet",
                place=place,
                expected=f"a value made at a step before {step}" if step else "compute at step 0",
                found=f"step {source}" if step else "nothing was computed before the first step",
            )
        if not makes_value(rows[source][index]):
            raise PlanError(
                f"step {step} uses the value that step {source} makes of {site.name}",
                place=place,
                expected="a step that computes the site",
                found=_word(rows[source][index]),
            )


def _check_forecast(site: Site, action: Action, step: int, place: str) -> None:
    if not isinstance(action, Forecast):
        return
    fits = len(action.coefficients) == len(action.sources) == len(set(action.sources))
    if not fits or not action.sources or not all(map(math.isfinite, action.coefficients)):
        raise PlanError(
            f"the forecast of {site.name} at step {step} cannot be computed",
            place=place,
            expected="one finite coefficient for each of at least one distinct step",
            found=f"steps {action.sources}, coefficients {action.coefficients}",
        )


def _describe_group(key: Sequence[tuple[str, int]], steps: Sequence[int]) -> str:
    words: dict[str, int] = {}
    for kind, _ in key:
        words[kind] = words.get(kind, 0) + 1
    listed = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
    return f"steps {listed}: " + ", ".join(f"{n} {kind}" for kind, n in words.items())


def _word(action: Action) -> str:
    match action:
        case Compute():
            return "compute"
        case Reuse(source):
            return f"reuse of step {source}"
        case Forecast():
            return f"forecast from steps {', '.join(map(str, action.sources))}"
