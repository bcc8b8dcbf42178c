"""The plan: the table step x site -> action, with everything resolved.

A value is named by its site and the step that made it. So liveness is known before anything runs:
the runner frees a value after the last step that uses it, and no history is ever shifted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .action import (
    Action,
    Compute,
    Forecast,
    Refresh,
    Reuse,
    Row,
    makes_value,
    sources,
    structure,
)
from .errors import PlanError
from .selection import Score, Selection
from .site import Site, SiteKind
from .slot import AGE, EXTRAS, ORDER, SCORE, ConstantKind, Numbers, StepConstant
from .spec import TensorSpec


@dataclass(frozen=True)
class Variant:
    """One specialised graph: the steps whose rows have the same structure share it.

    Attributes:
        name: ``variant0``, numbered by first use.
        steps: the steps that run it.
        row: the row of its first step; the structure is the same in all of them.
        writes: per site, whether the graph hands out the site's values to be kept.
        extras: per site, which of EXTRAS the graph hands out beside the values.
        constants: inputs that differ from step to step.
    """

    name: str
    steps: tuple[int, ...]
    row: Row
    writes: tuple[bool, ...]
    extras: tuple[tuple[int, ...], ...]
    constants: tuple[StepConstant, ...]


VALUES = 0  # the part of a site's memory that its values are


class Kept(NamedTuple):
    """Something that lives between steps.

    Attributes:
        site: index of the site.
        made: the step that made it.
        part: VALUES, or one of EXTRAS.
    """

    site: int
    made: int
    part: int = VALUES


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
        return _last_use(self.rows, self.sites, self.selection)

    @cached_property
    def freed_after(self) -> tuple[tuple[Kept, ...], ...]:
        """Per step, what nothing needs afterwards."""
        freed: list[list[Kept]] = [[] for _ in self.rows]
        for kept, step in self.last_use.items():
            freed[step].append(kept)
        return tuple(tuple(sorted(kept)) for kept in freed)

    @property
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
        size = [sum(v.spec.nbytes(symbols) for v in site.values) for site in self.sites]
        live = [0] * self.steps
        for kept, last in self.last_use.items():
            nbytes = size[kept.site]
            if kept.part in EXTRAS:
                spec = extra_spec(self.sites[kept.site], kept.part, self.order_depth)
                nbytes = spec.nbytes(symbols)
            for step in range(kept.made, last):
                live[step] += nbytes
        return tuple(live)

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
    kept = _last_use(rows, sites, selection)
    variants = tuple(
        _variant(f"variant{i}", steps, sites, rows, kept, selection)
        for i, steps in enumerate(groups.values())
    )
    variant_of = {step: i for i, variant in enumerate(variants) for step in variant.steps}
    in_order = tuple(variant_of[step] for step in range(len(rows)))
    return Plan(tuple(sites), tuple(rows), variants, in_order, selection)


def extra_spec(site: Site, part: int, depth: int) -> TensorSpec:
    """Spec of what a site keeps beside its values: ``i64[B, J, N]`` or ``f32[B, N]``."""
    batch, tokens = site.values[0].spec.shape[:2]
    if part == ORDER:
        return TensorSpec((batch, depth, tokens), torch.int64)
    return TensorSpec((batch, tokens), torch.float32)


def scorer(sites: Sequence[Site], index: int, selection: Selection) -> int | None:
    """Index of the site whose attention scores the tokens of a site; None where none does.

    It is the site of the same block: the cross-attention for entropies, else the self-attention.
    """
    if selection.score in (Score.SIMILARITY, Score.NORM, Score.RANDOM):
        return None
    crossed = selection.score is Score.CROSS_ATTENTION
    kind = SiteKind.CROSS_ATTN if crossed else SiteKind.ATTN
    block = sites[index].name.rpartition(".")[0]
    return next(
        (
            i
            for i, site in enumerate(sites)
            if site.kind is kind and site.name.rpartition(".")[0] == block
        ),
        None,
    )


def order_depth(rows: Sequence[Row]) -> int:
    """The most partial steps that follow one computed step."""
    return max((a.age + 1 for row in rows for a in row if isinstance(a, Refresh)), default=0)


def _variant(
    name: str,
    steps: Sequence[int],
    sites: Sequence[Site],
    rows: Sequence[Row],
    kept: Mapping[Kept, int],
    selection: Selection | None,
) -> Variant:
    # A write that only some of the steps need stays in the shared graph: leaving it out of those
    # steps alone would split the variant.
    parts = [
        [part for part in (VALUES, *EXTRAS) if any(Kept(i, step, part) in kept for step in steps)]
        for i in range(len(sites))
    ]
    writes = tuple(VALUES in found for found in parts)
    extras = tuple(tuple(part for part in found if part in EXTRAS) for found in parts)
    constants = (
        *_forecast_constants(steps, sites, rows),
        *_refresh_constants(steps, sites, rows, selection is not None and selection.foreseen),
        *_step_constant(steps, sites, rows, selection),
        *_count_constants(steps, sites, rows, [ORDER in found for found in extras]),
    )
    return Variant(name, tuple(steps), rows[steps[0]], writes, extras, constants)


def _forecast_constants(
    steps: Sequence[int], sites: Sequence[Site], rows: Sequence[Row]
) -> tuple[StepConstant, ...]:
    """Forecast coefficients; sites whose numbers agree in every step share one constant."""
    shared: dict[tuple[Numbers, ...], list[str]] = {}
    for i, site in enumerate(sites):
        actions = [rows[step][i] for step in steps]
        numbers = tuple(a.coefficients for a in actions if isinstance(a, Forecast))
        if numbers:
            shared.setdefault(numbers, []).append(site.name)
    return _shared_constants("forecast", ConstantKind.COEFFICIENTS, steps, shared)


def _refresh_constants(
    steps: Sequence[int], sites: Sequence[Site], rows: Sequence[Row], foreseen: bool
) -> tuple[StepConstant, ...]:
    """How many tokens, as ``0 .. k-1``, and ages.

    An age is the row of a foreseen order; else how many partial steps without tokens have passed
    since the ages were kept.
    """
    tokens: dict[tuple[Numbers, ...], list[str]] = {}
    ages: dict[tuple[Numbers, ...], list[str]] = {}
    for i, site in enumerate(sites):
        actions = [a for step in steps if isinstance(a := rows[step][i], Refresh)]
        if not actions:
            continue
        tokens.setdefault(tuple(tuple(range(a.tokens)) for a in actions), []).append(site.name)
        age = [a.age if foreseen else a.age - _age_after(rows[a.source][i]) for a in actions]
        ages.setdefault(tuple((a,) for a in age), []).append(site.name)
    return (
        *_shared_constants("tokens", ConstantKind.TOKENS, steps, tokens),
        *_shared_constants("age", ConstantKind.AGE, steps, ages),
    )


def _step_constant(
    steps: Sequence[int],
    sites: Sequence[Site],
    rows: Sequence[Row],
    selection: Selection | None,
) -> tuple[StepConstant, ...]:
    """The number of the step, where scores are random."""
    chosen = [s.name for i, s in enumerate(sites) if isinstance(rows[steps[0]][i], Refresh)]
    if selection is None or selection.score is not Score.RANDOM or not chosen:
        return ()
    values: dict[int, Numbers] = {step: (step,) for step in steps}
    return (StepConstant("step", tuple(chosen), values, ConstantKind.STEP),)


def _age_after(action: Action) -> int:
    """Partial steps that the kept ages of a site account for."""
    return action.age + 1 if isinstance(action, Refresh) else 0


def _count_constants(
    steps: Sequence[int], sites: Sequence[Site], rows: Sequence[Row], orders: Sequence[bool]
) -> tuple[StepConstant, ...]:
    """Tokens of each site in the partial steps that follow, so that ages can be foreseen."""
    chosen = [i for i, wanted in enumerate(orders) if wanted]
    if not chosen:
        return ()
    depth = order_depth(rows)
    counts = {(i, step): [0] * depth for i in chosen for step in steps}
    for row in rows:
        for i in chosen:
            action = row[i]
            if isinstance(action, Refresh) and (i, action.scored) in counts:
                counts[i, action.scored][action.age] = action.tokens
    values: dict[int, Numbers] = {
        step: tuple(tuple(counts[i, step]) for i in chosen) for step in steps
    }
    names = tuple(sites[i].name for i in chosen)
    return (StepConstant("counts", names, values, ConstantKind.COUNTS),)


def _shared_constants(
    name: str,
    kind: ConstantKind,
    steps: Sequence[int],
    shared: Mapping[tuple[Numbers, ...], list[str]],
) -> tuple[StepConstant, ...]:
    return tuple(
        StepConstant(f"{name}{i}", tuple(names), dict(zip(steps, numbers, strict=True)), kind)
        for i, (numbers, names) in enumerate(shared.items())
    )


def _last_use(
    rows: Sequence[Row], sites: Sequence[Site], selection: Selection | None
) -> dict[Kept, int]:
    last: dict[Kept, int] = {}
    for step, row in enumerate(rows):
        for i, action in enumerate(row):
            last.update({Kept(i, source): step for source in sources(action)})
            if isinstance(action, Refresh) and selection is not None:
                last.update(dict.fromkeys(_chosen_by(row, i, action, sites, selection), step))
    return last


def _chosen_by(
    row: Row, index: int, action: Refresh, sites: Sequence[Site], selection: Selection
) -> Iterator[Kept]:
    """What a choice of tokens goes by, beside what its own step computes."""
    if selection.foreseen:
        yield Kept(index, action.scored, ORDER)
        return
    yield Kept(index, action.source, AGE)
    owner = scorer(sites, index, selection)
    if owner is not None and (owner == index or isinstance(row[owner], Reuse)):
        yield Kept(owner, sources(row[owner])[0], SCORE)


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
    site: Site,
    rows: Sequence[Row],
    step: int,
    index: int,
    selection: Selection | None,
    place: str,
) -> None:
    action = rows[step][index]
    if not isinstance(action, Refresh):
        return
    tokens = site.values[0].spec.shape[1] if len(site.values[0].spec.shape) == 3 else None
    computed = 0 <= action.scored < step and isinstance(rows[action.scored][index], Compute)
    fits = isinstance(tokens, int) and 1 <= action.tokens < tokens and action.age >= 0
    if selection is None or len(site.values) != 1 or not computed or not fits:
        raise PlanError(
            f"step {step} cannot refresh tokens of {site.name}",
            place=place,
            expected=f"1 to {tokens} tokens (fewer than all), scored at a step that computed it",
            found=f"{action.tokens} tokens of {site.values[0].spec}, scored at {action.scored}",
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
        case Refresh():
            return f"refresh of {action.tokens} tokens"
