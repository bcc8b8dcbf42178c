"""ToCa: full steps, and steps in between that recompute some tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from cachegraph.config.problems import Problem

from .rules import TOCA, Published
from .tokens import TokenMethod


class Toca(TokenMethod):
    """ToCa: full steps, and partial ones in between (Shenyi-Z/ToCa, arXiv 2410.05317).

    Defaults: those of its code for the model that ``rules`` names.
    """

    published: ClassVar[Mapping[str, Published]] = TOCA

    method: Literal["toca"]

    def _ratio_problems(self) -> Iterator[Problem]:
        """Also the name ``toca``, which has meant different numbers in versions of this code."""
        if self.ratio_schedule == "toca":
            what = "'ratio_schedule: toca' in toca policy"
            yield Problem(("ratio_schedule",), what, self._fitting(), "toca")
        else:
            yield from super()._ratio_problems()
