"""GOC: push reused values further along their last change.

Source: qiujx0520/GOC_ICCV2025, ``DiT/models/models.py:125-173``. Each block keeps what the last two
steps used, computed, reused or corrected alike; a corrected value is kept in its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, FiniteFloat

from cachegraph.config.problems import Problem
from cachegraph.config.sections import Section
from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, block_of
from cachegraph.plan.action import Action, Forecast, Reuse, Row

_Partners = dict[int, tuple[int, ...]]  # site -> the other attn and mlp sites of its block


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

    def correct(self, rows: Sequence[Row], sites: Sequence[Site]) -> tuple[Row, ...]:
        """Rows in which the correction's steps forecast instead of reusing.

        A site that is computed at such a step stays computed (the published list for the router
        host names step 19, where that router runs everything), and one that the two steps before
        used the same value of has no change to follow: it stays a reuse.

        Raises:
            PlanError: no step of the list reuses anything, so the correction would do nothing.
        """
        partners = _partners(sites) if self.both_modules else {}
        if not any(_is_open(rows[s], i, partners) for s in self.steps for i in range(len(sites))):
            both = " attn and mlp of one block" if self.both_modules else ""
            raise PlanError(
                "the correction changes nothing: none of its steps reuses a value",
                place=self.where("steps"),
                expected=f"steps at which the policy reuses{both}",
                found=", ".join(map(str, self.steps)),
                remedy="cachegraph plan shows what each step does",
            )
        used: list[list[int]] = [[] for _ in sites]  # [site][step]: the step that made the value
        corrected: list[Row] = []
        for step, row in enumerate(rows):
            wanted = step in self.steps
            actions = list(row)
            for i, action in enumerate(row):
                weight = self.weight if wanted and _is_open(row, i, partners) else 0
                actions[i] = _action(action, used[i], weight)
                used[i].append(made.source if isinstance(made := actions[i], Reuse) else step)
            corrected.append(tuple(actions))
        return tuple(corrected)


def _is_open(row: Row, index: int, partners: _Partners) -> bool:
    """True where a site is reused and so are, with ``both_modules``, the others of its block."""
    return all(isinstance(row[i], Reuse) for i in (index, *partners.get(index, ())))


def _action(action: Action, used: Sequence[int], weight: float) -> Action:
    if not isinstance(action, Reuse) or not used:
        return action
    newest = used[-1]
    if weight and len(used) > 1 and used[-2] != newest:
        return Forecast((newest, used[-2]), (1 + weight, -weight), keeps=True)
    return Reuse(newest)


def _partners(sites: Sequence[Site]) -> _Partners:
    """Which sites are corrected together, or not at all."""
    blocks: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if site.kind in (SiteKind.ATTN, SiteKind.MLP):
            blocks.setdefault(block_of(site), []).append(i)
    return {i: tuple(j for j in members if j != i) for members in blocks.values() for i in members}
