"""The policies that a schedule can name, one class a method, told apart by ``method``.

To add one, write its class and put its name into the union ``Policy``. A class says what its keys
may hold and, in ``problems``, what can be wrong with them that one key alone does not show. What
its steps do at each site is worked out elsewhere, from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, PlainSerializer

from cachegraph.config.problems import Problem, describe, refuse
from cachegraph.config.sections import PolicySection, Section
from cachegraph.errors import nearest

from .tokens import DucaPolicy, TocaPolicy

_NOTHING_YET = "nothing has been computed yet"


class FullPolicy(PolicySection):
    """Every site is computed at every step: the model as it is, and the baseline."""

    method: Literal["full"]


class FoRAPolicy(PolicySection):
    """Every site is computed at every ``interval``-th step and reused in between.

    Counting down, as the published code does (prathebaselva/FORA, ``src/models.py:139-152``), a
    step is computed if it is the first or if ``(steps - 1 - step) % interval == 0``: the last step
    always is. Counting up it is computed if ``step % interval == 0``.
    """

    method: Literal["fora"]
    interval: int = Field(
        ge=1, description="a whole number, at least 1: one step in so many is computed"
    )
    count: Literal["down", "up"] = Field(default="down", description="one of down, up")


TableRow = Literal["compute", "reuse"] | tuple[int, ...]


def _check_rows(rows: object) -> tuple[TableRow, ...] | None:
    """The rows if each is a word or a list of 0 and 1; their number and lengths come later."""
    if rows is None or isinstance(rows, tuple):
        problems = [_row_problems(at, row) for at, row in enumerate(rows or ())]
        refuse("rows", chain.from_iterable(problems))
        return rows
    expected = "a list, one row a step"
    refuse("rows", [Problem((), "'rows' has the wrong type", expected, describe(rows))])
    return None


def _row_problems(at: int, row: object) -> Iterator[Problem]:
    name, expected = f"'rows[{at}]'", "compute, reuse or a list of 0 and 1, one number a site"
    match row:
        case "compute" | "reuse":
            return
        case str():
            near = nearest(row, ("compute", "reuse"))
            yield Problem((at,), f"unknown word {row!r} for {name}", expected, remedy=near)
        case ():
            yield Problem((at,), f"{name} is empty", expected)
        case tuple():
            for site, number in enumerate(row):
                if type(number) is not int or number not in (0, 1):
                    what = f"'rows[{at}][{site}]' is neither 0 nor 1"
                    expected = "0 (reuse) or 1 (compute)"
                    yield Problem((at, site), what, expected, describe(number))
        case _:
            yield Problem((at,), f"{name} has the wrong type", expected, describe(row))


class TablePolicy(PolicySection):
    """The steps are written out: whole steps to reuse, or one row a step.

    A row is ``compute``, ``reuse`` or a list of 0 (reuse) and 1 (compute), one number a site in
    the order of the sites; whether their number fits is known only with the model.
    """

    method: Literal["table"]
    reuse_steps: tuple[int, ...] | None = Field(default=None, description="a list of steps")
    rows: Annotated[tuple[TableRow, ...] | None, BeforeValidator(_check_rows)] = Field(
        default=None, description="a list, one row a step"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """Steps or rows that cannot be, and a reuse before anything has been computed."""
        if self.reuse_steps is not None and self.rows is not None:
            what = "both 'reuse_steps' and 'rows' in table policy"
            yield Problem(("rows",), what, "one of the two")
        elif self.reuse_steps is not None:
            yield from self._step_problems(self.reuse_steps, steps)
        elif self.rows is not None:
            yield from self._rows_problems(self.rows, steps)
        else:
            what = "neither 'reuse_steps' nor 'rows' in table policy"
            yield Problem((), what, "one of the two")

    @staticmethod
    def _step_problems(listed: tuple[int, ...], steps: int) -> Iterator[Problem]:
        expected = f"a step from 1 to {steps - 1}" if steps > 1 else "no step, as there is only one"
        for at, step in enumerate(listed):
            path, name = ("reuse_steps", at), f"'reuse_steps[{at}]'"
            if step == 0:
                yield Problem(path, f"step 0 cannot reuse: {_NOTHING_YET}", expected, "0")
            elif not 0 < step < steps:
                yield Problem(path, f"{name} is out of range", expected, f"{step}")
            elif at and step <= listed[at - 1]:
                what = f"{name} is out of order"
                yield Problem(path, what, f"a step after {listed[at - 1]}", f"{step}")

    @staticmethod
    def _rows_problems(rows: tuple[TableRow, ...], steps: int) -> Iterator[Problem]:
        if len(rows) != steps:
            yield Problem(("rows",), "not one row a step", f"{steps} rows", f"{len(rows)}")
        first = rows[0] if rows else "compute"
        if first != "compute" and (first == "reuse" or 0 in first):
            what = f"step 0 cannot reuse: {_NOTHING_YET}"
            found = "reuse" if first == "reuse" else f"0 for site {first.index(0)}"
            yield Problem(("rows", 0), what, "compute, or a list of 1 only", found)
        lists = [(at, row) for at, row in enumerate(rows) if not isinstance(row, str)]
        for at, row in lists[1:]:
            like, length = lists[0][0], len(lists[0][1])
            if len(row) != length:
                what, expected = "rows of different lengths", f"{length} numbers, as in row {like}"
                yield Problem(("rows", at), what, expected, f"{len(row)}")


class RouterPolicy(PolicySection):
    """A learned mask of attn and mlp per block and step (Learning-to-Cache, HarmoniCa).

    With ``semantics: l2c`` every second step, the first among them, is computed as a whole, and
    so it is with ``uvit``, where router i belongs to step 2 i. With ``harmonica`` the mask rules
    every step but the first.
    """

    method: Literal["router"]
    file: str = Field(min_length=1, description="the path of a router checkpoint or mask file")
    threshold: FiniteFloat = Field(
        default=0.1, ge=0, le=1, description="a number from 0 to 1: what scores above it is run"
    )
    semantics: Literal["l2c", "harmonica", "uvit"] = Field(
        default="l2c", description="one of harmonica, l2c, uvit"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """An odd number of steps: l2c and uvit pair a step of the mask with a whole one."""
        if self.semantics != "harmonica" and steps % 2:
            what = f"'semantics: {self.semantics}' with an odd number of steps"
            remedy = "it masks every second step; did you mean 'semantics: harmonica'?"
            yield Problem(("semantics",), what, "an even number of steps", f"{steps}", remedy)


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
            what = f"the list of {key!r} reuses at step 0: {_NOTHING_YET}"
            yield Problem((key,), what, "1 as the first number", "0", "let it begin with 1")


class SmoothCachePolicy(PolicySection):
    """Steps to compute as SmoothCache lists them, per component or block.

    The lists are in a file as published, or in the schedule itself.
    """

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


class TaylorSeerPolicy(PolicySection):
    """Forecast skipped steps from finite differences of computed ones (Shenyi-Z/TaylorSeer).

    The first ``warmup`` steps are computed, then every ``interval``-th. Of the warmup only the last
    step begins a history, as in the published code.
    """

    method: Literal["taylorseer"]
    interval: int = Field(
        ge=1, description="a whole number, at least 1: one step in so many is computed"
    )
    order: int = Field(
        default=4, ge=0, le=8, description="a whole number from 0 to 8: highest derivative"
    )
    warmup: int = Field(
        default=2, ge=1, description="a whole number, at least 1: steps computed at first"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """A warmup that is longer than the trajectory, or a history that never fills."""
        if self.warmup > steps:
            what = "'warmup' is longer than the trajectory"
            yield Problem(("warmup",), what, f"at most {steps} steps", f"{self.warmup}")
            return
        computed = self.warmup + (steps - self.warmup) // self.interval
        most = computed - max(self.warmup - 1, 1)  # the warmup takes differences in its last step
        if self.order > max(most, 0):
            what = "the history is deeper than the trajectory"
            expected = f"an order of at most {max(most, 0)}: {computed} steps are computed"
            remedy = "lower 'order' or 'interval'"
            yield Problem(("order",), what, expected, f"{self.order}", remedy)


class GOCCorrection(Section):
    """Correct reused values along the last change (gradient-optimized cache, qiujx0520/GOC).

    At a step in ``steps`` a reused value becomes ``prev1 + weight * (prev1 - prev2)``, where prev1
    and prev2 are what the last two steps used.
    """

    method: Literal["goc"]
    weight: FiniteFloat = Field(description="a number: how far to go along the last change")
    steps: tuple[int, ...] = Field(min_length=1, description="a list of steps")
    both_modules: bool = Field(
        default=False,
        description="true or false: correct a block only where attn and mlp are both reused",
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """Steps that cannot be corrected."""
        for at, step in enumerate(self.steps):
            name = f"'steps[{at}]'"
            if not 0 <= step < steps:
                expected = f"a step from 2 to {steps - 1}"
                yield Problem(("steps", at), f"{name} is out of range", expected, f"{step}")
            elif step < 2:
                what = f"step {step} cannot be corrected: it has no two steps before it"
                remedy = "take it out of 'steps'"
                yield Problem(("steps", at), what, "step 2 or later", f"{step}", remedy)
            elif at and step <= self.steps[at - 1]:
                what = f"{name} is out of order"
                yield Problem(("steps", at), what, f"a step after {self.steps[at - 1]}", f"{step}")


Policy = Annotated[
    FullPolicy
    | FoRAPolicy
    | TablePolicy
    | RouterPolicy
    | SmoothCachePolicy
    | TaylorSeerPolicy
    | TocaPolicy
    | DucaPolicy,
    Field(discriminator="method"),
]
