"""What a report shows, as plain data; ``docs/report.md`` describes it for others to draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachegraph.plan.slot import EXTRAS
from cachegraph.plan.variant import VALUES
from cachegraph.show.picture import picture_rows
from cachegraph.show.view import View

from .costs import Cells, SiteFlops
from .graphs import Graphs

SCHEMA = "cachegraph-report/1"


@dataclass(frozen=True)
class Extras:
    """What others measured, where it is given.

    Attributes:
        measured: seconds of each step: what ``bench --json`` wrote of this schedule.
        quality: schedules with their time and their distance to the uncached images.
        tokens: which tokens were recomputed at each step of a sampled image.
    """

    measured: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None


def report_data(view: View, title: str, extras: Extras) -> dict[str, Any]:
    """Everything, as dicts, lists, texts and numbers.

    Args:
        view: plan and graphs.
        title: of the report: model and schedule.
        extras: what was measured elsewhere.
    """
    graphs = Graphs.of(view)
    return {
        "schema": SCHEMA,
        "title": title,
        "schedule": view.schedule_text,
        "batch": view.batch_text,
        "sizes": dict(view.cost.symbols),
        "plan": _plan(view, graphs.site_flops),
        "variants": [graphs.variant(index) for index in range(len(view.plan.variants))],
        "prologues": {name: graphs.sections(name) for name in view.prologues},
        "cost": _cost(view),
        "measured": extras.measured,
        "quality": extras.quality,
        "tokens": extras.tokens,
    }


def _plan(view: View, flops: SiteFlops) -> dict[str, Any]:
    """Sites, what each step does there, and how long what it makes is kept."""
    plan, cells = view.plan, Cells(view.plan, flops)
    rows = [
        [cells.index(step, site) for site in range(len(plan.sites))] for step in range(plan.steps)
    ]
    return {
        "steps": plan.steps,
        "full_steps": plan.full_steps(),
        "sites": [
            {
                "name": site.name,
                "kind": str(site.kind),
                "module": site.module,
                "values": [str(value.spec) for value in site.values],
            }
            for site in plan.sites
        ],
        "groups": [
            {"label": row.label, "cells": row.cells, "sites": list(row.sites)}
            for row in picture_rows(plan)
        ],
        "cells": cells.found,
        "rows": rows,
        "variant_of": list(plan.variant_of),
        "kept": _kept(view),
    }


def _kept(view: View) -> list[dict[str, Any]]:
    """Tensors that live between steps; those of one part, step and lifetime together."""
    plan = view.plan
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for kept, last in sorted(plan.last_use.items()):
        key = kept.part, kept.made, last
        one = found.setdefault(key, {"bytes": 0, "sites": []})
        one["sites"].append(kept.site)
        one["bytes"] += plan.nbytes(kept, view.cost.symbols)
    return [
        {"what": _part(part), "made": made, "last": last, **one}
        for (part, made, last), one in found.items()
    ]


def _part(part: int) -> str:
    return "value" if part == VALUES else EXTRAS[part]


def _cost(view: View) -> dict[str, Any]:
    cost, plan = view.cost, view.plan
    return {
        "flops": list(cost.flops),
        "full_flops": cost.full_flops,
        "total_flops": cost.total_flops,
        "uncached_flops": cost.full_flops * plan.steps,
        "speed_up_limit": cost.limit,
        "cache_bytes": list(cost.cache_bytes),
        "unfreed_cache_bytes": list(plan.unfreed_bytes(cost.symbols)),
        "known_bytes": list(cost.known_bytes),
        "peak_bytes": list(cost.peak_bytes),
        "weight_bytes": cost.weight_bytes,
    }


def listed(names: Sequence[str], most: int = 3) -> str:
    """``a, b and 5 more``."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
