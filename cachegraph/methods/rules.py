"""Whose code ToCa and DuCa follow, as data: a set of rules for each model that it was written for.

Sources: Shenyi-Z/ToCa, ``cache_functions`` in ``DiT-ToCa``, ``PixArt-alpha-ToCa``, ``flux-ToCa``
and ``Open-Sora``; Shenyi-Z/DuCa, the same in ``DuCa-DiT``, ``DuCa-PixArt-alpha`` and
``DuCa-Open-Sora``. A schedule may write a set of its own, with what differs from one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, FiniteFloat

from cachegraph.config.sections import Section
from cachegraph.model.site import Site

RulesName = Literal["dit", "pixart", "flux", "opensora"]
Kind = Literal["attn", "cross_attn", "mlp", "fused"]

_KINDS = "of attn, cross_attn, mlp, fused"


class Ratio(Section):
    """How the share of tokens varies: falling from ``1 + weight`` to ``1 - weight``, by kind."""

    step: FiniteFloat = Field(default=0.0, description="a number: weight along a trajectory")
    block: FiniteFloat = Field(default=0.0, description="a number: weight from first block to last")
    kinds: dict[Kind, FiniteFloat] = Field(
        default={}, description=f"a mapping {_KINDS} to numbers: factor of the share"
    )


class Rules(Section):
    """When what is computed, and of which sites tokens are chosen."""

    like: RulesName = Field(
        default="dit", description="one of dit, flux, opensora, pixart: where all else is from"
    )
    count: Literal["down", "up"] = Field(
        default="up", description="one of down, up: how steps are numbered"
    )
    first: int = Field(
        default=1, ge=1, description="a whole number, at least 1: steps computed at the beginning"
    )
    first_without_tokens: int = Field(
        default=1, ge=1, description="a whole number, at least 1: the same for 'fresh_ratio: 0'"
    )
    full: Literal["multiple", "counter"] = Field(
        default="multiple",
        description="one of counter, multiple: a full step is a multiple of the interval, or that "
        "far from the one before",
    )
    by_block: bool = Field(
        default=False, description="true or false: whether each block decides anew what a step is"
    )
    change: FiniteFloat = Field(
        default=0.0, description="a number: how much longer the first intervals are than the last"
    )
    sensitive: tuple[FiniteFloat, ...] = Field(
        default=(),
        max_length=2,
        description="two shares of the trajectory, between which the interval is 2; or none",
    )
    periods: dict[Kind, int] = Field(
        default={}, description=f"a mapping {_KINDS} to whole numbers: intervals of their own"
    )
    refresh: tuple[Kind, ...] = Field(
        default=("mlp",), min_length=1, description=f"a list {_KINDS}: what tokens are chosen of"
    )
    last_block: int = Field(
        default=0,
        ge=0,
        description="a whole number: the block that 'block' counts as the last, whatever the model "
        "has; 0 for the last that it has",
    )
    ratios: dict[str, Ratio] = Field(
        default={}, description="a mapping of ratio schedules to step, block and kinds"
    )


@dataclass(frozen=True)
class Published:
    """A set of rules, and what stands for keys that a schedule leaves out."""

    rules: Rules
    defaults: Mapping[str, object]


def kind_of(site: Site) -> str:
    """What rules call a site: ``fused`` where attention and mlp are one."""
    return "fused" if site.fused else site.kind.value


# The numbers of ``fresh_ratio_scheduler.py``.
_DIT = {
    "ddim50": Ratio(step=2.0, block=-0.2, kinds={"mlp": 2.5, "cross_attn": 0.0}),
    "ddpm250": Ratio(step=0.4, block=0.8, kinds={"mlp": 2.5, "cross_attn": 0.0}),
    "linear-layerwise": Ratio(step=0.4, block=0.8, kinds={"mlp": 2.5, "cross_attn": 0.0}),
}
_PIXART = {
    name: Ratio(step=0.9, block=0.6, kinds={"mlp": 1.6, "cross_attn": 0.6})
    for name in ("pixart", "linear-layerwise")
}
_FLUX = {
    "flux": Ratio(block=0.5, kinds={"mlp": 0.4, "fused": 1.6}),
    "linear-layerwise": Ratio(step=0.9, block=0.6, kinds={"mlp": 1.6, "fused": 1.6}),
}
_OPENSORA = {"opensora": Ratio(kinds={"mlp": 1.495, "cross_attn": -0.005})}

_PERIODS: dict[Kind, int] = {"attn": 3, "cross_attn": 6, "mlp": 3}

TOCA: Mapping[str, Published] = {
    "dit": Published(
        Rules(
            like="dit", count="down", by_block=True, change=0.4, sensitive=(0.2, 0.4), ratios=_DIT
        ),
        {
            "fresh_ratio": 0.07,
            "ratio_schedule": "ddim50",
            "score": "attention",
            "bonus": {"weight": 0.6, "cell": 2},
        },
    ),
    "pixart": Published(
        Rules(
            like="pixart",
            by_block=True,
            change=-0.2,
            refresh=("cross_attn", "mlp"),
            ratios=_PIXART,
        ),
        {
            "fresh_ratio": 0.3,
            "ratio_schedule": "pixart",
            "score": "cross-attention",
            "bonus": {"weight": 0.4, "cell": 4},
        },
    ),
    "flux": Published(
        Rules(
            like="flux",
            first=3,
            full="counter",
            refresh=("mlp", "fused"),
            last_block=27,
            ratios=_FLUX,
        ),
        {
            "interval": 4,
            "fresh_ratio": 0.1,
            "ratio_schedule": "flux",
            "score": "attention",
            "bonus": {"weight": 0.0},
        },
    ),
    "opensora": Published(
        Rules(
            like="opensora",
            first=3,
            first_without_tokens=3,
            periods=_PERIODS,
            refresh=("cross_attn", "mlp"),
            ratios=_OPENSORA,
        ),
        {
            "interval": 3,
            "fresh_ratio": 0.1,
            "ratio_schedule": "opensora",
            "score": "cross-attention",
            "bonus": {"weight": 0.0},
        },
    ),
}
DUCA: Mapping[str, Published] = {
    "dit": Published(
        TOCA["dit"].rules.model_copy(update={"ratios": {**_DIT, "toca": _DIT["ddim50"]}}),
        {
            "fresh_ratio": 0.05,
            "ratio_schedule": "toca",
            "score": "kv-norm",
            "bonus": {"weight": 0.8, "cell": 2},
        },
    ),
    "pixart": Published(
        TOCA["pixart"].rules.model_copy(
            update={"change": 0.0, "ratios": {**_PIXART, "toca": _PIXART["pixart"]}}
        ),
        {
            "fresh_ratio": 0.75,
            "ratio_schedule": "toca",
            "score": "cross-attention",
            "bonus": {"weight": 0.4, "cell": 4},
        },
    ),
    "opensora": Published(
        TOCA["opensora"].rules.model_copy(
            update={"refresh": ("mlp",), "ratios": {**_OPENSORA, "toca": _OPENSORA["opensora"]}}
        ),
        {
            "interval": 3,
            "fresh_ratio": 0.1,
            "ratio_schedule": "toca",
            "score": "kv-norm",
            "bonus": {"weight": 0.0},
        },
    ),
}
