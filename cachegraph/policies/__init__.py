"""Policies: pure functions from a schedule and the sites to rows.

They hold all knowledge of methods; the passes hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from cachegraph.action import Compute, Reuse, Row
from cachegraph.schedule import Schedule
from cachegraph.schedule_policies import (
    FoRAPolicy,
    FullPolicy,
    RouterPolicy,
    SmoothCachePolicy,
    TablePolicy,
    TaylorSeerPolicy,
)
from cachegraph.site import Site, select_sites

from . import correction, fora, router, smoothcache, table, taylorseer

Decisions = Sequence[Sequence[bool]]  # [step][site]: True where the site is computed


def make_rows(schedule: Schedule, sites: Sequence[Site]) -> tuple[Row, ...]:
    """What every step does at every site.

    Args:
        schedule: what the user asked for.
        sites: every site of the model; those that ``schedule.sites`` leaves out are computed.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the schedule does not fit the model.
    """
    chosen = select_sites(
        sites,
        kinds=schedule.sites.kinds,
        include=schedule.sites.include,
        exclude=schedule.sites.exclude,
        place=schedule.where("sites"),
    )
    rows = tuple(
        tuple(a if site.name in chosen else Compute() for a, site in zip(row, sites, strict=True))
        for row in _rows(schedule, sites)
    )
    if schedule.correction is not None:
        rows = correction.correct(schedule, schedule.correction, rows, sites)
    return rows


def _rows(schedule: Schedule, sites: Sequence[Site]) -> tuple[Row, ...]:
    policy = schedule.policy
    match policy:
        case FullPolicy():
            return resolve([[True] * len(sites)] * schedule.steps)
        case FoRAPolicy():
            full = fora.full_steps(policy, schedule.steps)
            return resolve([[step in full] * len(sites) for step in range(schedule.steps)])
        case TablePolicy():
            return resolve(table.decisions(schedule, policy, sites))
        case RouterPolicy():
            return resolve(router.decisions(schedule, policy, sites))
        case SmoothCachePolicy():
            return resolve(smoothcache.decisions(schedule, policy, sites))
        case TaylorSeerPolicy():
            actions = taylorseer.actions(policy, schedule.steps)
            return tuple((action,) * len(sites) for action in actions)
        case _:
            assert_never(policy)


def resolve(decisions: Decisions) -> tuple[Row, ...]:
    """Rows that reuse, wherever a site is not computed, the newest value that was."""
    newest: dict[int, int] = {}
    rows = []
    for step, row in enumerate(decisions):
        newest.update({i: step for i, computed in enumerate(row) if computed})
        rows.append(
            tuple(
                Compute() if computed else Reuse(newest.get(i, step))
                for i, computed in enumerate(row)
            )
        )
    return tuple(rows)
