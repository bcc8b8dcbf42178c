"""SmoothCache: published JSON lists of 0 (reuse) and 1 (compute), per component or block.

Source: Roblox/SmoothCache, ``smooth_cache_helper.py:63-141``. A list belongs to ``component-block``
or, for every block without one of its own, to ``component``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachegraph.errors import PlanError, nearest
from cachegraph.schedule import Schedule
from cachegraph.schedule_policies import SmoothCachePolicy
from cachegraph.site import Site


def decisions(
    schedule: Schedule, policy: SmoothCachePolicy, sites: Sequence[Site]
) -> list[list[bool]]:
    """[step][site], True where the site is computed; sites without a list are computed.

    Raises:
        PlanError: the file is no SmoothCache schedule, a list does not fit the number of steps, or
            a key matches no site.
    """
    path = schedule.file(policy.file, "policy", "file")
    lists = _read(path, schedule.steps)
    keys = [_keys(site) for site in sites]
    for key in lists:
        if not any(key in names for names in keys):
            known = sorted({name for names in keys for name in names})
            raise PlanError(
                f"key {key!r} matches no site",
                place=str(path),
                expected=", ".join(known[:8]) + (", ..." if len(known) > 8 else ""),
                remedy=nearest(key, known),
            )
    chosen = [next((lists[name] for name in names if name in lists), None) for names in keys]
    return [[rule is None or rule[step] == 1 for rule in chosen] for step in range(schedule.steps)]


def _keys(site: Site) -> tuple[str, ...]:
    """The keys that may speak of a site, in order of precedence: ``attn-3``, then ``attn``."""
    component = site.name.rpartition(".")[2]
    names = dict.fromkeys((component, str(site.kind)))
    number = next((part for part in site.name.split(".") if part.isdigit()), None)
    by_block = tuple(f"{name}-{number}" for name in names) if number is not None else ()
    return (*by_block, *names)


def _read(path: Path, steps: int) -> Mapping[str, list[int]]:
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError("not a JSON file", place=str(path), found=str(error)) from error
    if not isinstance(lists, dict) or not lists:
        raise PlanError(
            "not a SmoothCache schedule",
            place=str(path),
            expected="an object of lists of 0 and 1, such as {'attn': [1, 0, ...]}",
        )
    for key, rule in lists.items():
        if not isinstance(rule, list) or any(type(n) is not int or n not in (0, 1) for n in rule):
            raise PlanError(
                f"key {key!r} does not hold a list of 0 and 1",
                place=str(path),
                found=repr(rule)[:60],
            )
        if len(rule) != steps:
            raise PlanError(
                f"the list of {key!r} does not fit the schedule",
                place=str(path),
                expected=f"{steps} numbers, one a step",
                found=str(len(rule)),
                remedy=f"set steps: {len(rule)} in the schedule",
            )
        if rule[0] == 0:
            raise PlanError(
                f"the list of {key!r} reuses at step 0", place=str(path), expected="1 at step 0"
            )
    return lists
