"""ToCa: full steps, and steps in between that recompute some tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from cachegraph.config.problems import Problem

from .token_keys import fitting
from .tokens import TokenMethod


class Toca(TokenMethod):
    """ToCa: full steps, and partial ones in between (Shenyi-Z/ToCa, arXiv 2410.05317).

    Defaults: ``DiT-ToCa`` and ``PixArt-alpha-ToCa``, the commands of the README and
    ``cache_cutfresh.py``.
    """

    published: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "dit": {
            "fresh_ratio": 0.07,
            "ratio_schedule": "ddim50",
            "score": "attention",
            "bonus": {"weight": 0.6, "cell": 2},
        },
        "pixart": {
            "fresh_ratio": 0.3,
            "ratio_schedule": "pixart",
            "score": "cross-attention",
            "bonus": {"weight": 0.4, "cell": 4},
        },
    }

    pixart_interval_weight: ClassVar[float] = -0.2

    method: Literal["toca"]

    def _ratio_problems(self) -> Iterator[Problem]:
        """Also the name ``toca``, which has meant different numbers in versions of this code."""
        yield from super()._ratio_problems()
        if self.ratio_schedule == "toca":
            what = "'ratio_schedule: toca' in toca policy"
            yield Problem(("ratio_schedule",), what, fitting(self.rules), "toca")
