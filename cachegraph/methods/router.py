"""Learned masks: Learning-to-Cache and HarmoniCa."""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, describe
from cachegraph.schedule.schedule import Schedule

from .policies import RouterPolicy
from .router_file import read_router


def decisions(schedule: Schedule, policy: RouterPolicy, sites: Sequence[Site]) -> list[list[bool]]:
    """[step][site], True where the site is computed; what is neither attn nor mlp always is.

    Raises:
        InputError: the file is no router and no mask.
        PlanError: it was made for another number of steps or blocks.
    """
    path = schedule.file(policy.file, "policy", "file")
    mask = read_router(path, policy.threshold, policy.semantics)
    place = schedule.where("policy", "file")
    if mask.steps != schedule.steps:
        raise PlanError(
            f"'file: {policy.file}' is a router of {mask.steps} steps",
            place=place,
            expected=f"{schedule.steps} steps, as the schedule has",
            remedy=f"set steps: {mask.steps}, or use the router of {schedule.steps} steps",
        )
    if not all((*mask.attn[0], *mask.mlp[0])):
        raise PlanError(
            f"'file: {policy.file}' reuses at step 0, before anything was computed",
            place=place,
            expected="a router whose first step runs everything",
            remedy="check 'threshold' and 'semantics'",
        )
    columns = {SiteKind.ATTN: mask.attn, SiteKind.MLP: mask.mlp}
    for kind in columns:
        count = sum(site.kind == kind for site in sites)
        if count != mask.depth:
            raise PlanError(
                f"'file: {policy.file}' is a router of {mask.depth} blocks",
                place=place,
                expected=f"{count} {kind} sites, as the model has ({describe(sites)})",
                remedy="use the router that was trained for this model",
            )
    table = []
    for step in range(schedule.steps):
        runs = {kind: iter(rows[step]) for kind, rows in columns.items()}
        table.append([next(runs[site.kind]) if site.kind in runs else True for site in sites])
    return table
