"""One kind of step: which steps share a graph, what it keeps and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cachegraph.model.site import Site, SiteKind, block_of
from cachegraph.spec import Dim, TensorSpec

from .action import Action, Forecast, Refresh, Reuse, Row, sources
from .selection import Score, Selection
from .slot import AGE, EXTRAS, INNER, ORDER, SCORE, ConstantKind, Numbers, StepConstant


@dataclass(frozen=True)
class Variant:
    """One specialised graph: the steps whose rows have the same structure share it.

    Attributes:
        name: ``variant0``, numbered by first use.
        steps: the steps that run it.
        row: the row of its first step; the structure is the same in all of them.
        writes: per site, whether the graph hands out the site's values to be kept.
        constants: inputs that differ from step to step.
        extras: per site, which of EXTRAS the graph hands out beside the values.
    """

    name: str
    steps: tuple[int, ...]
    row: Row
    writes: tuple[bool, ...]
    constants: tuple[StepConstant, ...]
    extras: tuple[tuple[int, ...], ...] = ()


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


def extra_spec(site: Site, part: int, depth: int) -> TensorSpec:
    """Spec of what a site keeps beside its values: ``i64[B, J, N]``, ``f32[B, N]``, or inner."""
    if part == INNER and site.inner is not None:
        return site.inner.spec
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
    block = block_of(sites[index])
    return next((i for i, s in enumerate(sites) if s.kind is kind and block_of(s) == block), None)


def order_depth(rows: Sequence[Row]) -> int:
    """The most partial steps that follow one computed step."""
    return max((a.age + 1 for row in rows for a in row if isinstance(a, Refresh)), default=0)


def make_variant(
    name: str,
    steps: Sequence[int],
    sites: Sequence[Site],
    rows: Sequence[Row],
    kept: Mapping[Kept, int],
    selection: Selection | None,
) -> Variant:
    """The variant of steps that are alike.

    Args:
        name: of the variant.
        steps: that share it.
        sites: every site of the model.
        rows: of all steps.
        kept: what is kept, and until when.
        selection: how tokens are chosen.
    """
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
    return Variant(name, tuple(steps), rows[steps[0]], writes, constants, extras)


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

    A single token is named twice: torch makes a constant of the size 1, so a graph for any number
    of tokens starts at 2. It is computed twice then, to the same values.

    An age is the row of a foreseen order; else how many partial steps without tokens have passed
    since the ages were kept.
    """
    tokens: dict[tuple[Numbers, ...], list[str]] = {}
    ages: dict[tuple[Numbers, ...], list[str]] = {}
    for i, site in enumerate(sites):
        actions = [a for step in steps if isinstance(a := rows[step][i], Refresh)]
        if not actions:
            continue
        places = (tuple(range(a.tokens)) if a.tokens > 1 else (0, 0) for a in actions)
        tokens.setdefault(tuple(places), []).append(site.name)
        age = [a.age if foreseen else a.age - _age_after(rows[a.source][i]) for a in actions]
        ages.setdefault(tuple((a,) for a in age), []).append(site.name)
    return (
        *_shared_constants("tokens", ConstantKind.TOKENS, steps, tokens),
        *_shared_constants("age", ConstantKind.AGE, steps, ages),
    )


def _step_constant(
    steps: Sequence[int], sites: Sequence[Site], rows: Sequence[Row], selection: Selection | None
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
    """Tokens of each site in the partial steps that follow, so that ages can be foreseen.

    Sites with as many tokens share a constant, as they are ordered together.
    """
    by_size: dict[Dim, list[int]] = {}
    for i, wanted in enumerate(orders):
        if wanted:
            by_size.setdefault(sites[i].values[0].spec.shape[1], []).append(i)
    several = len(by_size) > 1
    return tuple(
        _count_constant(f"counts{n}" if several else "counts", steps, sites, rows, chosen)
        for n, chosen in enumerate(by_size.values())
    )


def _count_constant(
    name: str,
    steps: Sequence[int],
    sites: Sequence[Site],
    rows: Sequence[Row],
    chosen: Sequence[int],
) -> StepConstant:
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
    return StepConstant(name, tuple(sites[i].name for i in chosen), values, ConstantKind.COUNTS)


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


def last_use(
    rows: Sequence[Row], sites: Sequence[Site], selection: Selection | None
) -> dict[Kept, int]:
    """What is kept -> last step that uses it."""
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
    """What a choice of tokens goes by, beside what its own step computes; and inner values."""
    if sites[index].inner is not None:
        yield Kept(index, action.scored, INNER)
    if selection.foreseen:
        yield Kept(index, action.scored, ORDER)
        return
    yield Kept(index, action.source, AGE)
    owner = scorer(sites, index, selection)
    if owner is not None and (owner == index or isinstance(row[owner], Reuse)):
        yield Kept(owner, sources(row[owner])[0], SCORE)
