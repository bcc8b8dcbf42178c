"""The steps written out by hand: whole steps to reuse, or one row a step."""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, describe
from cachegraph.schedule.schedule import Schedule

from .policies import TablePolicy


def decisions(schedule: Schedule, policy: TablePolicy, sites: Sequence[Site]) -> list[list[bool]]:
    """[step][site], True where the site is computed.

    Raises:
        PlanError: a row has not one number a site.
    """
    if policy.rows is None:
        reused = set(policy.reuse_steps or ())
        return [[step not in reused] * len(sites) for step in range(schedule.steps)]
    table = []
    for step, row in enumerate(policy.rows):
        if isinstance(row, str):
            table.append([row == "compute"] * len(sites))
            continue
        if len(row) != len(sites):
            raise PlanError(
                f"row {step} of the table does not fit the model",
                place=schedule.where("policy", "rows", step),
                expected=f"{len(sites)} numbers, one a site ({describe(sites)})",
                found=f"{len(row)}",
            )
        table.append([number == 1 for number in row])
    return table
