"""The plan: the table step x site -> action, with everything resolved.

A value is named by its site and the step that made it. So liveness is known before anything runs:
the runner frees a value after the last step that uses it, and no history is ever shifted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cachegraph.errors import PlanError
from cachegraph.model.site import Site

from .action import Action, Compute, Forecast, Refresh, Reuse, Row, makes_value, sources, structure
from .selection import Selection
from .slot import EXTRAS
from .variant import VALUES, Kept, Variant, extra_spec, last_use, make_variant, order_depth


@dataclass(frozen=True)
class Plan:
    """What every step does, resolved before anything runs.

    Attributes:
        sites: every site of the model, in execution order.
        rows: one row a step; ``rows[step][i]`` is the action at ``sites[i]``.
        variants: the specialised graphs.
        variant_of: step -> index into ``variants``.
        selection: how tokens are chosen, where a row refreshes some.
    """

    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    variants: tuple[Variant, ...]
    variant_of: tuple[int, ...]
    selection: Selection | None = None

    @property
    def steps(self) -> int:
        """Model calls per trajectory and branch."""
        return len(self.rows)

    @cached_property
    def last_use(self) -> dict[Kept, int]:
        """What is kept -> last step that uses it."""
        return last_use(self.rows, self.sites, self.selection)

    @cached_property
    def freed_after(self) -> tuple[tuple[Kept, ...], ...]:
        """Per step, what nothing needs afterwards."""
        freed: list[list[Kept]] = [[] for _ in self.rows]
        for kept, step in self.last_use.items():
            freed[step].append(kept)
        return tuple(tuple(sorted(kept)) for kept in freed)

    @cached_property
    def _stacks(self) -> tuple[tuple[int, ...], ...]:
        """Per site, the stacks around it."""
        stacks = [(i, frozenset(site.covers)) for i, site in enumerate(self.sites) if site.covers]
        return tuple(tuple(i for i, names in stacks if s.name in names) for s in self.sites)

    def is_skipped(self, row: Row, site: int) -> bool:
        """True where a row does not compute a stack that the site lies in."""
        return any(not isinstance(row[stack], Compute) for stack in self._stacks[site])

    @cached_property
    def order_depth(self) -> int:
        """J: the most partial steps that follow one computed step."""
        return order_depth(self.rows)

    def is_kept(self, site: int, step: int, part: int = VALUES) -> bool:
        """True where a later step uses what ``step`` makes at the site."""
        return Kept(site, step, part) in self.last_use

    def cache_bytes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Bytes of the values that live on after each step.

        Args:
            symbols: a number for each shape symbol, such as the batch.
        """
        live = [0] * self.steps
        for kept, last in self.last_use.items():
            nbytes = self.nbytes(kept, symbols)
            for step in range(kept.made, last):
                live[step] += nbytes
        return tuple(live)

    def unfreed_bytes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Bytes that would live on after each step without liveness.

        Every value that is made would be kept, in a history as deep for all sites as the deepest
        one has to be, until newer ones push it out; so would everything beside the values, until
        it is made anew. What liveness saves is the difference to :meth:`cache_bytes`.

        Args:
            symbols: a number for each shape symbol, such as the batch.
        """
        deepest = max(self.history_depths(), default=0)
        live = [0] * self.steps
        for i in range(len(self.sites)):
            nbytes, made = self.nbytes(Kept(i, 0), symbols), 0
            for step, row in enumerate(self.rows):
                made += makes_value(row[i])
                live[step] += nbytes * min(made, deepest)
        extras = {(kept.site, kept.part): kept for kept in sorted(self.last_use, reverse=True)}
        for kept in extras.values():  # the first that is made of each
            if kept.part in EXTRAS:
                for step in range(kept.made, self.steps):
                    live[step] += self.nbytes(kept, symbols)
        return tuple(live)

    def history_depths(self) -> tuple[int, ...]:
        """Per site, the most of its values that live on after any step."""
        alive = [[0] * self.steps for _ in self.sites]
        for kept, last in self.last_use.items():
            for step in range(kept.made, last) if kept.part == VALUES else ():
                alive[kept.site][step] += 1
        return tuple(map(max, alive))

    def nbytes(self, kept: Kept, symbols: Mapping[str, int]) -> int:
        """Bytes of something that is kept."""
        site = self.sites[kept.site]
        if kept.part in EXTRAS:
            return extra_spec(site, kept.part, self.order_depth).nbytes(symbols)
        return sum(value.spec.nbytes(symbols) for value in site.values)

    def full_steps(self) -> int:
        """How many steps compute every site."""
        return sum(all(isinstance(a, Compute) for a in row) for row in self.rows)


def make_plan(
    sites: Sequence[Site],
    rows: Sequence[Row],
    *,
    selection: Selection | None = None,
    max_variants: int | None = None,
    place: str = "schedule",
) -> Plan:
    """Check the rows and merge them into variants.

    Args:
        sites: every site of the model.
        rows: one a step, one action a site.
        selection: how tokens are chosen, where a row refreshes some.
        max_variants: refuse more specialised graphs than this.
        place: where the schedule is written, for errors.

    Raises:
        PlanError: a row of the wrong length, a value used before it was made or that its step does
            not make, coefficients that do not fit, or too many variants.
    """
    _check_rows(sites, rows, selection, place)
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
    kept = last_use(rows, sites, selection)
    variants = tuple(
        make_variant(f"variant{i}", steps, sites, rows, kept, selection)
        for i, steps in enumerate(groups.values())
    )
    variant_of = {step: i for i, variant in enumerate(variants) for step in variant.steps}
    in_order = tuple(variant_of[step] for step in range(len(rows)))
    return Plan(tuple(sites), tuple(rows), variants, in_order, selection)


def _check_rows(
    sites: Sequence[Site], rows: Sequence[Row], selection: Selection | None, place: str
) -> None:
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
            _check_refresh(sites[index], rows, step, index, selection, place)


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


def _check_refresh(
    site: Site, rows: Sequence[Row], step: int, index: int, selection: Selection | None, place: str
) -> None:
    action = rows[step][index]
    if not isinstance(action, Refresh):
        return
    tokens = site.values[0].spec.shape[1] if len(site.values[0].spec.shape) == 3 else None
    computed = 0 <= action.scored < step and isinstance(rows[action.scored][index], Compute)
    # All tokens of a fused site: its attention stays what it was, so that is no computing.
    most = tokens - (not site.fused) if isinstance(tokens, int) else 0
    fits = 1 <= action.tokens <= most and action.age >= 0 and (site.inner or not site.fused)
    if selection is None or len(site.values) != 1 or not computed or not fits:
        raise PlanError(
            f"step {step} cannot refresh tokens of {site.name}",
            place=place,
            expected=f"1 to {tokens} tokens (fewer than all), scored at a step that computed it",
            found=f"{action.tokens} tokens of {site.values[0].spec}, scored at {action.scored}",
        )


def _describe_group(key: Sequence[tuple[str, int]], steps: Sequence[int]) -> str:
    words = Counter(kind for kind, _ in key)
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
        case Refresh():
            return f"refresh of {action.tokens} tokens"
