"""Policies: pure functions from a schedule and the sites to rows.

They hold all knowledge of methods; the passes hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from cachegraph.errors import PlanError, SessionError
from cachegraph.methods import correction, fora, router, smoothcache, table, taylorseer, toca
from cachegraph.methods.policies import (
    FoRAPolicy,
    FullPolicy,
    RouterPolicy,
    SmoothCachePolicy,
    TablePolicy,
    TaylorSeerPolicy,
)
from cachegraph.methods.tokens import DucaPolicy, TokenPolicy
from cachegraph.model.site import Site, SiteKind, select_sites
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Compute, Reuse, Row
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Selection

from .schedule import Schedule, SiteFilter

Decisions = Sequence[Sequence[bool]]  # [step][site]: True where the site is computed


def make_rows(schedule: Schedule, sites: Sequence[Site]) -> tuple[Row, ...]:
    """What every step does at every site.

    Args:
        schedule: what the user asked for.
        sites: every site of the model; those that ``schedule.sites`` leaves out are computed.
            So is a ``stack``, unless the policy is one that skips it.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the schedule does not fit the model.
    """
    chosen = _chosen(schedule, sites)
    ruled = chosen
    if isinstance(schedule.policy, DucaPolicy):
        ruled |= {site.name for site in sites if site.kind == SiteKind.STACK}
    rows = tuple(
        tuple(a if site.name in ruled else Compute() for a, site in zip(row, sites, strict=True))
        for row in _rows(schedule, sites, chosen)
    )
    if schedule.correction is not None:
        rows = correction.correct(schedule, schedule.correction, rows, sites)
    return rows


def plan_of(schedule: Schedule, traced: TracedModel) -> Plan:
    """The plan of a schedule for a model.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the schedule does not fit the model.
    """
    sites = traced.sites
    if isinstance(schedule.policy, DucaPolicy) and traced.stack is not None:
        sites = (*sites, traced.stack)
    selection = make_selection(schedule, sites)
    if selection is not None and traced.batch is None:
        try:
            selection.check_call(traced.signature.inputs[0][1].sizes(traced.symbols)[0])
        except SessionError as error:
            raise PlanError(
                error.what,
                place=schedule.where("policy", "score"),
                expected=error.expected,
                found=f"{error.found}, and no other ({traced.fixed_batch_reason})",
                remedy=error.remedy,
            ) from error
    return make_plan(
        sites,
        make_rows(schedule, sites),
        selection=selection,
        max_variants=schedule.max_variants,
        place=schedule.where("max_variants"),
    )


def make_selection(schedule: Schedule, sites: Sequence[Site]) -> Selection | None:
    """How the schedule's policy chooses tokens; None where it chooses none.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the policy's choice does not fit the model.
    """
    policy = schedule.policy
    if not isinstance(policy, TokenPolicy) or not policy.fresh_ratio:
        return None
    return toca.selection(schedule, policy, sites, _chosen(schedule, sites))


def _chosen(schedule: Schedule, sites: Sequence[Site]) -> frozenset[str]:
    return select_sites(
        sites,
        kinds=schedule.sites.kinds,
        include=schedule.sites.include,
        exclude=schedule.sites.exclude,
        named=set(schedule.sites.kinds) != set(SiteFilter().kinds),  # all kinds: what there is
        place=schedule.where("sites"),
    )


def _rows(schedule: Schedule, sites: Sequence[Site], chosen: frozenset[str]) -> tuple[Row, ...]:
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
        case TokenPolicy():
            return toca.rows(schedule, policy, sites, chosen)
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
