"""The steps written out by hand: whole steps to reuse, or one row a step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cachegraph.config.problems import Problem, refuse
from cachegraph.config.problems import describe as shown
from cachegraph.errors import PlanError, nearest
from cachegraph.model.site import describe
from cachegraph.plan.action import Row

from .method import NOTHING_YET, Method, Ruled, resolve

TableRow = Literal["compute", "reuse"] | tuple[int, ...]


def _check_rows(rows: object) -> tuple[TableRow, ...] | None:
    """The rows if each is a word or a list of 0 and 1; their number and lengths come later."""
    if rows is None or isinstance(rows, tuple):
        problems = [_row_problems(at, row) for at, row in enumerate(rows or ())]
        refuse("rows", chain.from_iterable(problems))
        return rows
    expected = "a list, one row a step"
    refuse("rows", [Problem((), "'rows' has the wrong type", expected, shown(rows))])
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
                    yield Problem((at, site), what, expected, shown(number))
        case _:
            yield Problem((at,), f"{name} has the wrong type", expected, shown(row))


class Table(Method):
    """The steps are written out: whole steps to reuse, or one row a step.

    A row is ``compute``, ``reuse`` or a list of 0 (reuse) and 1 (compute), one number a site in
    the order of the sites; whether their number fits is known only with the model.
    """

    fixes_steps: ClassVar[bool] = True
    correctable: ClassVar[bool] = True
    example: ClassVar = {"reuse_steps": [1, 3]}

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
                yield Problem(path, f"step 0 cannot reuse: {NOTHING_YET}", expected, "0")
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
            what = f"step 0 cannot reuse: {NOTHING_YET}"
            found = "reuse" if first == "reuse" else f"0 for site {first.index(0)}"
            yield Problem(("rows", 0), what, "compute, or a list of 1 only", found)
        lists = [(at, row) for at, row in enumerate(rows) if not isinstance(row, str)]
        for at, row in lists[1:]:
            like, length = lists[0][0], len(lists[0][1])
            if len(row) != length:
                what, expected = "rows of different lengths", f"{length} numbers, as in row {like}"
                yield Problem(("rows", at), what, expected, f"{len(row)}")

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What is written, where it speaks of the ruled sites."""
        if self.rows is None:
            reused = set(self.reuse_steps or ())
            return resolve([[step not in reused] * len(sites) for step in range(steps)])
        table = []
        for step, row in enumerate(self.rows):
            if isinstance(row, str):
                table.append([row == "compute"] * len(sites))
                continue
            if len(row) != len(sites.model):
                raise PlanError(
                    f"row {step} of the table does not fit the model",
                    place=self.where("rows", step),
                    expected=f"{len(sites.model)} numbers, one a site ({describe(sites.model)})",
                    found=f"{len(row)}",
                )
            table.append([number == 1 for number in sites.pick(row)])
        return resolve(table)
