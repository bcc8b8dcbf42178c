"""SmoothCache: published JSON lists of 0 (reuse) and 1 (compute), per component or block.

Source: Roblox/SmoothCache, ``smooth_cache_helper.py:63-141``. A list belongs to ``component-block``
or, for every block without one of its own, to ``component``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachegraph.errors import PlanError, nearest
from cachegraph.model.site import Site
from cachegraph.schedule.schedule import Schedule

from .policies import SmoothCachePolicy, list_problems


def decisions(
    schedule: Schedule, policy: SmoothCachePolicy, sites: Sequence[Site]
) -> list[list[bool]]:
    """[step][site], True where the site is computed; sites without a list are computed.

    Raises:
        PlanError: the file is no SmoothCache schedule, a list does not fit the number of steps, or
            a key matches no site.
    """
    path = None if policy.file is None else schedule.file(policy.file, "policy", "file")
    lists = dict(policy.lists or ()) if path is None else _read(path, schedule.steps)
    keys = [_keys(site) for site in sites]
    for key in lists:
        if not any(key in names for names in keys):
            known = list(dict.fromkeys(name for names in keys for name in reversed(names)))
            raise PlanError(
                f"key {key!r} matches no site",
                place=schedule.where("policy", "lists", key) if path is None else str(path),
                expected=", ".join(known[:8]) + (", ..." if len(known) > 8 else ""),
                remedy=nearest(key, known) or "take it out",
            )
    chosen = [next((lists[name] for name in names if name in lists), None) for names in keys]
    return [[rule is None or rule[step] == 1 for rule in chosen] for step in range(schedule.steps)]


def _keys(site: Site) -> tuple[str, ...]:
    """The keys that may speak of a site, in order of precedence: ``attn-3``, then ``attn``."""
    *path, component = re.split(r"[.:]", site.name)
    names = dict.fromkeys((component, str(site.kind)))
    number = next((part for part in reversed(path) if part.isdigit()), None)
    by_block = tuple(f"{name}-{number}" for name in names) if number is not None else ()
    return (*by_block, *names)


def _read(path: Path, steps: int) -> Mapping[str, Sequence[int]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError("not a JSON file", place=str(path), found=str(error)) from error
    if not isinstance(lists, dict):
        raise PlanError(
            "not a SmoothCache schedule",
            place=str(path),
            expected="an object of lists of 0 and 1, such as {'attn': [1, 0, ...]}",
        )
    for problem in list_problems(lists, steps):
        raise PlanError(
            problem.what,
            place=str(path),
            expected=problem.expected,
            found=problem.found,
            remedy=problem.remedy and f"{problem.remedy} in the schedule"
            if problem.remedy.startswith("set ")
            else problem.remedy,
        )
    return lists
