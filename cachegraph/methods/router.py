"""Learned masks: Learning-to-Cache and HarmoniCa."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from cachegraph.config.problems import Problem
from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, describe
from cachegraph.plan.action import Row

from .method import Method, Ruled, resolve
from .router_file import Mask, read_router


class Router(Method):
    """A learned mask of attn and mlp per block and step (Learning-to-Cache, HarmoniCa).

    With ``semantics: l2c`` every second step, the first among them, is computed as a whole, and
    so it is with ``uvit``, where router i belongs to step 2 i. With ``harmonica`` the mask rules
    every step but the first.
    """

    fixes_steps: ClassVar[bool] = True
    correctable: ClassVar[bool] = True
    by_block: ClassVar[bool] = True
    file_keys: ClassVar[tuple[str, ...]] = ("file",)
    example: ClassVar = {"file": "mask.yaml", "semantics": "harmonica"}

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

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What the mask says of attn and mlp; all else is computed."""
        mask = read_router(self.find("file"), self.threshold, self.semantics)
        self._check_fit(mask, steps, sites.model)
        columns = {SiteKind.ATTN: mask.attn, SiteKind.MLP: mask.mlp}
        table = []
        for step in range(steps):
            runs = {kind: iter(rows[step]) for kind, rows in columns.items()}
            row = [next(runs[s.kind]) if s.kind in runs else True for s in sites.model]
            table.append(sites.pick(row))
        return resolve(table)

    def _check_fit(self, mask: Mask, steps: int, sites: Sequence[Site]) -> None:
        place = self.where("file")
        if mask.steps != steps:
            raise PlanError(
                f"'file: {self.file}' is a router of {mask.steps} steps",
                place=place,
                expected=f"{steps} steps, as the schedule has",
                remedy=f"set steps: {mask.steps}, or use the router of {steps} steps",
            )
        if not all((*mask.attn[0], *mask.mlp[0])):
            raise PlanError(
                f"'file: {self.file}' reuses at step 0, before anything was computed",
                place=place,
                expected="a router whose first step runs everything",
                remedy="check 'threshold' and 'semantics'",
            )
        for kind in (SiteKind.ATTN, SiteKind.MLP):
            count = sum(site.kind == kind for site in sites)
            if count != mask.depth:
                raise PlanError(
                    f"'file: {self.file}' is a router of {mask.depth} blocks",
                    place=place,
                    expected=f"{count} {kind} sites, as the model has ({describe(sites)})",
                    remedy="use the router that was trained for this model",
                )
