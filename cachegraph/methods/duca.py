"""DuCa: full steps, partial ones, and in between those that skip all blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from .rules import DUCA, Published
from .tokens import TokenMethod


class Duca(TokenMethod):
    """DuCa: as ToCa, but every second step in between skips all blocks (Shenyi-Z/DuCa).

    Defaults: those of its code for the model that ``rules`` names, for DiT with the score of the
    paper (arXiv 2412.18911). ``ratio_schedule: toca`` is what its code calls so: the numbers of
    ``ddim50``, or of the schedule that is named after the rules.
    """

    published: ClassVar[Mapping[str, Published]] = DUCA
    skips_stack: ClassVar[bool] = True

    method: Literal["duca"]
