"""DuCa: full steps, partial ones, and in between those that skip all blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from .tokens import TokenMethod


class Duca(TokenMethod):
    """DuCa: as ToCa, but every second step in between skips all blocks (Shenyi-Z/DuCa).

    Defaults: ``DuCa-DiT`` with the score of the paper (arXiv 2412.18911) and
    ``DuCa-PixArt-alpha``. ``ratio_schedule: toca`` is what its code calls so: the numbers of
    ``ddim50`` or, with ``rules: pixart``, of ``pixart``.
    """

    published: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "dit": {
            "fresh_ratio": 0.05,
            "ratio_schedule": "toca",
            "score": "kv-norm",
            "bonus": {"weight": 0.8, "cell": 2},
        },
        "pixart": {
            "fresh_ratio": 0.75,
            "ratio_schedule": "toca",
            "score": "cross-attention",
            "bonus": {"weight": 0.4, "cell": 4},
        },
    }

    pixart_interval_weight: ClassVar[float] = 0.0
    skips_stack: ClassVar[bool] = True

    method: Literal["duca"]
