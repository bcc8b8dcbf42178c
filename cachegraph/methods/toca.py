"""ToCa and DuCa: full steps, and steps in between that recompute some tokens or skip all blocks.

Sources: Shenyi-Z/ToCa, ``DiT-ToCa`` and ``PixArt-alpha-ToCa``; Shenyi-Z/DuCa, ``DuCa-DiT`` and
``DuCa-PixArt-alpha`` (``models.py`` or ``PixArt.py``, and ``cache_functions``).

The code decides at every block anew what the step is, and a full pass of the first block changes
the interval. So a step can be full in the first block and something else in all others: a mixed
step. ``quirks: false`` decides once a step, before anything changes. All else stays as the code has
it: the interval that varies along a trajectory, the ratios, truncation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum, auto
from math import isqrt

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, block_of, describe
from cachegraph.plan.action import Action, Compute, Refresh, Reuse, Row
from cachegraph.plan.selection import Score, Selection
from cachegraph.schedule.schedule import Schedule

from . import ratios
from .tokens import DucaPolicy, TokenPolicy

_REFRESHED = {
    "dit": frozenset({SiteKind.MLP}),
    "pixart": frozenset({SiteKind.MLP, SiteKind.CROSS_ATTN}),
}
_NEEDED = {  # the kind of site that makes a score
    Score.ATTENTION: SiteKind.ATTN,
    Score.KV_NORM: SiteKind.ATTN,
    Score.CROSS_ATTENTION: SiteKind.CROSS_ATTN,
}


class StepType(Enum):
    """What a step does in a block."""

    FULL = auto()  # everything is computed
    PARTIAL = auto()  # attention is reused, some tokens of the rest are recomputed
    SKIP = auto()  # nothing is run; the last block hands out what it did a step before


StepTypes = tuple[StepType, StepType]  # in the first block, and in all others


def rows(
    schedule: Schedule, policy: TokenPolicy, sites: Sequence[Site], chosen: Collection[str]
) -> tuple[Row, ...]:
    """What every step does at every site.

    Args:
        schedule: gives the number of steps, and places for errors.
        policy: the schedule's.
        sites: every site of the model.
        chosen: names of those that the policy rules.

    Raises:
        PlanError: the policy does not fit the model.
    """
    types = step_types(policy, schedule.steps)
    choice, counts = None, dict[str, int]()
    if policy.fresh_ratio and any(StepType.PARTIAL in pair for pair in types):
        choice = selection(schedule, policy, sites, chosen)
        tokens = choice.grid[0] * choice.grid[1]
        counts = {site.name: tokens for site in _refreshed(policy, sites, chosen)}
    if any(StepType.SKIP in pair for pair in types):
        _check_stack(schedule, sites, chosen)
    columns: dict[str, list[Action]] = {}
    groups = blocks_of(sites)
    for number, block in enumerate(groups):
        here = [pair[min(number, 1)] for pair in types]
        for site in block:
            shares = [
                ratios.ratio(policy, site.kind, at, schedule.steps, number, len(groups))
                for at in _numbers(policy, schedule.steps)
            ]
            n = counts.get(site.name, 0)
            fresh = [ratios.token_count(share, n) if n else 0 for share in shares]
            columns[site.name] = _column(schedule, choice, site.name, here, fresh, n)
    last = [pair[min(len(groups), 2) - 1] for pair in types]
    for site in sites:
        if site.kind == SiteKind.STACK:
            columns[site.name] = _stack_column(last)
    return tuple(
        tuple(columns[site.name][step] for site in sites) for step in range(schedule.steps)
    )


def step_types(policy: TokenPolicy, steps: int) -> tuple[StepTypes, ...]:
    """What each step is in the first block, and in the others (``cal_type.py``)."""
    types = []
    interval = policy.interval
    for at in _numbers(policy, steps):
        first = _type(policy, at, steps, interval)
        others = first
        if first is StepType.FULL:
            interval = ratios.interval(policy, at, steps)
            others = _type(policy, at, steps, interval) if policy.quirks else first
        types.append((first, others))
    return tuple(types)


def _numbers(policy: TokenPolicy, steps: int) -> range:
    """The steps as the published code numbers them."""
    return range(steps - 1, -1, -1) if policy.rules == "dit" else range(steps)


def _type(policy: TokenPolicy, at: int, steps: int, interval: int) -> StepType:
    is_first = at == _numbers(policy, steps)[0]
    if is_first or at % interval == 0:
        return StepType.FULL
    if isinstance(policy, DucaPolicy) and at % interval % 2 == 0:
        return StepType.SKIP
    return StepType.PARTIAL


def _column(
    schedule: Schedule,
    choice: Selection | None,
    name: str,
    types: Sequence[StepType],
    fresh: Sequence[int],
    tokens: int,
) -> list[Action]:
    """What the steps do at one site; ``fresh`` of its ``tokens`` are recomputed if partial.

    A partial step without tokens reuses, yet all tokens grow older; one with all of them computes
    and makes them young. A score that only full steps make is as old as the last of them even then.
    """
    newest = scored = age = 0
    seen: set[tuple[int, int]] = set()
    actions: list[Action] = []
    for step, (kind, count) in enumerate(zip(types, fresh, strict=True)):
        if kind is StepType.FULL or (kind is StepType.PARTIAL and 0 < tokens <= count):
            actions.append(Compute())
            newest, age = step, 0
            if kind is StepType.FULL or (choice is not None and not choice.foreseen):
                scored = step
        elif kind is StepType.PARTIAL and count:
            if (scored, age) in seen and choice is not None and choice.foreseen:
                raise _reordered(schedule, name, step)
            seen.add((scored, age))
            actions.append(Refresh(newest, count, scored, age))
            newest, age = step, age + 1
        else:
            actions.append(Reuse(newest))
            age += kind is StepType.PARTIAL
    return actions


def _stack_column(types: Sequence[StepType]) -> list[Action]:
    """What the steps do with all blocks together, by what they do in the last block."""
    newest = 0
    actions: list[Action] = []
    for step, kind in enumerate(types):
        if kind is StepType.SKIP:
            actions.append(Reuse(newest))
        else:
            actions.append(Compute())
            newest = step
    return actions


def selection(
    schedule: Schedule,
    policy: TokenPolicy,
    sites: Sequence[Site],
    chosen: Collection[str] | None = None,
) -> Selection:
    """How tokens are chosen.

    Args:
        schedule: gives places for errors.
        policy: the schedule's.
        sites: every site of the model.
        chosen: names of those that the policy rules; by default all.

    Raises:
        PlanError: the score is not to be had, or the tokens form no grid of whole cells.
    """
    score = Score(policy.score)
    needed = _NEEDED.get(score)
    if needed is not None and all(site.kind != needed for site in sites):
        raise PlanError(
            f"no score {policy.score!r}: the model has no {needed} site",
            place=schedule.where("policy", "score"),
            expected=f"a score that the model can give ({describe(sites)})",
            remedy="choose another: " + ", ".join(s for s in Score if _available(s, sites)),
        )
    counts = {site.name: _tokens(schedule, site) for site in _refreshed(policy, sites, chosen)}
    if len(set(counts.values())) != 1:
        several = ", ".join(f"{name}: {n}" for name, n in counts.items())
        raise PlanError(
            "the sites to refresh have no common number of tokens" if counts else "nothing to do",
            place=schedule.where("policy"),
            expected="at least one site of kind "
            + " or ".join(sorted(_REFRESHED[policy.rules]))
            + ", and as many tokens in all of them",
            found=several if len(several) < 200 else several[:200] + "...",
            remedy="'sites: {exclude: ...}' leaves sites out" if counts else "",
        )
    grid = _grid(schedule, policy, *set(counts.values()))
    cell = policy.bonus.cell if policy.bonus.weight else 1
    return Selection(
        score=score,
        age_weight=policy.age_weight / policy.interval,
        bonus=policy.bonus.weight,
        cell=cell,
        grid=grid,
        seed=policy.seed or 0,
    )


def _available(score: Score, sites: Sequence[Site]) -> bool:
    return score not in _NEEDED or any(site.kind == _NEEDED[score] for site in sites)


def _refreshed(
    policy: TokenPolicy, sites: Sequence[Site], chosen: Collection[str] | None
) -> list[Site]:
    kinds = _REFRESHED[policy.rules]
    return [s for s in sites if s.kind in kinds and (chosen is None or s.name in chosen)]


def _tokens(schedule: Schedule, site: Site) -> int:
    """Tokens of a site's value ``(B, N, C)``."""
    shape = site.values[0].spec.shape
    tokens = shape[1] if len(shape) == 3 and len(site.values) == 1 else None
    if not isinstance(tokens, int):
        raise PlanError(
            f"the tokens of {site.name} cannot be counted",
            place=schedule.where("policy"),
            expected="one value of shape (batch, tokens, channels), the tokens a number",
            found=", ".join(str(value.spec) for value in site.values),
            remedy="compile for a fixed image size, or leave the site out with 'sites: {exclude}'",
        )
    return tokens


def _grid(schedule: Schedule, policy: TokenPolicy, tokens: int) -> tuple[int, int]:
    side = isqrt(tokens)
    if policy.grid is not None:
        height, width = policy.grid
    elif policy.bonus.weight and side * side != tokens:
        raise PlanError(
            f"{tokens} tokens form no square",
            place=schedule.where("policy"),
            expected="the grid of tokens",
            remedy="add 'grid: [height, width]' to the policy, or 'bonus: {weight: 0}'",
        )
    else:
        height, width = (side, side) if side * side == tokens else (1, tokens)
    if height * width != tokens:
        raise PlanError(
            f"a grid of {height} x {width} does not hold {tokens} tokens",
            place=schedule.where("policy", "grid"),
            expected=f"two numbers whose product is {tokens}",
            found=f"{height * width}",
        )
    cell = policy.bonus.cell
    if policy.bonus.weight and (height % cell or width % cell):
        raise PlanError(
            f"{height} x {width} tokens do not divide into cells of {cell} x {cell}",
            place=schedule.where("policy", "bonus", "cell"),
            expected=f"a cell that divides {height} and {width}",
            found=f"{cell}",
            remedy="choose another cell, or 'bonus: {weight: 0}' for no bonus",
        )
    return height, width


def blocks_of(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of each block, in order: those whose modules have the same parent."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind != SiteKind.STACK:
            blocks.setdefault(block_of(site), []).append(site)
    return list(blocks.values())


def _check_stack(schedule: Schedule, sites: Sequence[Site], chosen: Collection[str]) -> None:
    if all(site.kind != SiteKind.STACK for site in sites):
        raise PlanError(
            "the policy skips all blocks, but the model has no site for all of them together",
            place=schedule.where("policy"),
            expected="a chain of blocks, each taking what the one before it hands out",
            found=describe(sites),
            remedy="'method: toca' works without",
        )
    left_out = [s.name for s in sites if s.kind != SiteKind.STACK and s.name not in chosen]
    if left_out:
        raise PlanError(
            "the policy skips all blocks, so it cannot leave out sites",
            place=schedule.where("sites"),
            expected="no filter of sites, or one that lets all of them through",
            found=", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else ""),
        )


def _reordered(schedule: Schedule, name: str, step: int) -> PlanError:
    return PlanError(
        f"{name} is computed whole between two partial steps, which makes all its tokens young: "
        f"their order at step {step} cannot be made at the last full step",
        place=schedule.where("policy", "fresh_ratio"),
        expected="ratios that reach 1 only before or after the partial steps of an interval",
        remedy="lower 'fresh_ratio', or choose another 'ratio_schedule'",
    )
