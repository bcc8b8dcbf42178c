"""From a schedule and the sites of a model to rows, and to a plan.

All knowledge of methods is in ``methods``; the passes have none.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.errors import PlanError, SessionError
from cachegraph.methods.method import Ruled
from cachegraph.model.site import Site, SiteKind, select_sites
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Compute, Row
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Selection

from .schedule import Schedule, SiteFilter
from .stacks import hide_covered, with_stacks


def make_rows(schedule: Schedule, sites: Sequence[Site]) -> tuple[Row, ...]:
    """What every step does at every site.

    Args:
        schedule: what the user asked for.
        sites: every site of the model; those that ``schedule.sites`` leaves out are computed.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the schedule does not fit the model.
    """
    ruled = _ruled(schedule, sites)
    names = [site.name for site in ruled]
    rows = []
    for actions in schedule.policy.make_rows(schedule.steps, ruled):
        by_name = dict(zip(names, actions, strict=True))
        rows.append(tuple(by_name.get(site.name, Compute()) for site in sites))
    if schedule.correction is not None:
        rows = list(schedule.correction.correct(rows, sites))
    return tuple(rows) if schedule.policy.skips_stack else hide_covered(rows, sites)


def plan_of(schedule: Schedule, traced: TracedModel) -> Plan:
    """The plan of a schedule for a model.

    Raises:
        SiteError: the schedule's globs match nothing.
        PlanError: the schedule does not fit the model.
    """
    sites = with_stacks(schedule, traced)
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
    return schedule.policy.make_selection(_ruled(schedule, sites))


def _ruled(schedule: Schedule, sites: Sequence[Site]) -> Ruled:
    place = schedule.where("sites")
    named = set(schedule.sites.kinds) != set(SiteFilter().kinds)  # all kinds: what there is
    kinds, include, exclude = schedule.sites.kinds, schedule.sites.include, schedule.sites.exclude
    names = select_sites(
        sites, kinds=kinds, include=include, exclude=exclude, named=named, place=place
    )
    if schedule.policy.skips_stack:
        names |= {site.name for site in sites if site.kind == SiteKind.STACK}
    return Ruled(sites, names, place)
