"""SmoothCache: published JSON lists of 0 (reuse) and 1 (compute), per component or block.

Source: Roblox/SmoothCache, ``smooth_cache_helper.py:63-141``. A list belongs to ``component-block``
or, for every block without one of its own, to ``component``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from cachegraph.config.problems import Problem, describe, refuse
from cachegraph.errors import PlanError, nearest
from cachegraph.model.site import Site
from cachegraph.plan.action import Row

from .method import NOTHING_YET, Method, Ruled, resolve

ListPairs = tuple[tuple[str, tuple[int, ...]], ...]  # a mapping that can be hashed


def _check_lists(lists: object) -> ListPairs | None:
    """The lists by key if each holds 0 and 1 only; their lengths come later."""
    if lists is None:
        return None
    if not isinstance(lists, Mapping):
        expected = "a mapping of keys such as attn, mlp or attn-3 to lists of 0 and 1"
        refuse("lists", [Problem((), "'lists' has the wrong type", expected, describe(lists))])
        return None
    refuse("lists", list_problems(lists))
    return tuple((key, tuple(rule)) for key, rule in lists.items())


def list_problems(lists: Mapping[str, object], steps: int | None = None) -> Iterator[Problem]:
    """What is wrong with SmoothCache lists.

    Args:
        lists: key -> 0 (reuse) or 1 (compute) for each step.
        steps: of the schedule; None to look at the types only.
    """
    if not lists:
        yield Problem((), "there are no lists", "such as {attn: [1, 0, 1], mlp: [1, 0, 1]}")
    for key, rule in lists.items():
        if not isinstance(rule, list | tuple):
            what = f"{key!r} is no list"
            yield Problem((key,), what, "a list of 0 (reuse) and 1 (compute)", describe(rule))
        elif wrong := [n for n in rule if type(n) is not int or n not in (0, 1)]:
            what = f"the list of {key!r} holds something else than 0 and 1"
            yield Problem((key,), what, "0 (reuse) or 1 (compute)", describe(wrong[0]))
        elif steps is None:
            continue
        elif len(rule) != steps:
            what, remedy = f"the list of {key!r} has the wrong length", f"set steps: {len(rule)}"
            yield Problem(
                (key,), what, f"{steps} numbers, one a step", str(len(rule)), remedy if rule else ""
            )
        elif rule[0] == 0:
            what = f"the list of {key!r} reuses at step 0: {NOTHING_YET}"
            yield Problem((key,), what, "1 as the first number", "0", "let it begin with 1")


class SmoothCache(Method):
    """Steps to compute as SmoothCache lists them, per component or block.

    The lists are in a file as published, or in the schedule itself.
    """

    fixes_steps: ClassVar[bool] = True
    correctable: ClassVar[bool] = True
    file_keys: ClassVar[tuple[str, ...]] = ("file",)
    example: ClassVar = {"lists": {"attn": [1, 0, 1, 0, 0, 1, 0], "mlp": [1, 1, 0] * 2 + [0]}}

    method: Literal["smoothcache"]
    file: str | None = Field(
        default=None, min_length=1, description="the path of a SmoothCache JSON file"
    )
    lists: Annotated[
        ListPairs | None,
        BeforeValidator(_check_lists),
        PlainSerializer(lambda lists: None if lists is None else dict(lists)),
    ] = Field(default=None, description="a mapping of keys to lists of 0 and 1")

    def problems(self, steps: int) -> Iterator[Problem]:
        """Not exactly one of file and lists, or lists that do not fit the steps."""
        if self.file is not None and self.lists is not None:
            what = "both 'file' and 'lists' in smoothcache policy"
            yield Problem(("lists",), what, "one of the two")
        elif self.lists is not None:
            for problem in list_problems(dict(self.lists), steps):
                yield replace(problem, path=("lists", *problem.path))
        elif self.file is None:
            what = "neither 'file' nor 'lists' in smoothcache policy"
            yield Problem((), what, "one of the two")

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What the lists say; sites without a list are computed."""
        path = None if self.file is None else self.find("file")
        lists = dict(self.lists or ()) if path is None else _read(path, steps)
        keys = [_keys(site) for site in sites.model]
        for key in lists:
            if not any(key in names for names in keys):
                known = list(dict.fromkeys(name for names in keys for name in reversed(names)))
                raise PlanError(
                    f"key {key!r} matches no site",
                    place=self.where("lists", key) if path is None else str(path),
                    expected=", ".join(known[:8]) + (", ..." if len(known) > 8 else ""),
                    remedy=nearest(key, known) or "take it out",
                )
        rules = [next((lists[key] for key in _keys(s) if key in lists), [1] * steps) for s in sites]
        return resolve([[rule[step] == 1 for rule in rules] for step in range(steps)])


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
        where = " in the schedule" if problem.remedy.startswith("set ") else ""
        raise replace(problem, remedy=problem.remedy + where).error(PlanError, str(path))
    return lists
