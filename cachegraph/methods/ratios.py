"""How far apart full steps are, and how many tokens a partial step recomputes (ToCa, DuCa).

Sources: Shenyi-Z/ToCa and Shenyi-Z/DuCa, ``cache_functions/force_scheduler.py`` and
``fresh_ratio_scheduler.py`` in the folders for DiT and PixArt. A step is given as they count it:
from ``steps - 1`` down to 0 for DiT, from 0 up for PixArt. The order of operations and float32,
where they have it, are kept: they decide whether a number lies just above or just below a whole
one.
"""

from __future__ import annotations

import torch

from cachegraph.model.site import SiteKind

from .token_keys import TokenKeys

_SPREAD = 0.9  # of the schedules that are not named after a setting
_MODE = 0.1
_MLP_SHARE = 0.6  # "estimated from the time and flops of mlp and attn module"

# (rules, ratio schedule) -> weights of step, block and kind of site
_WEIGHTS = {
    ("dit", "linear-layerwise"): (0.4, 0.8, 2.5),
    ("dit", "ddpm250"): (0.4, 0.8, 2.5),
    ("dit", "ddim50"): (2.0, -0.2, 2.5),
    ("dit", "toca"): (2.0, -0.2, 2.5),
    ("pixart", "linear-layerwise"): (0.9, 0.6, 1.0),
    ("pixart", "pixart"): (0.9, 0.6, 1.0),
    ("pixart", "toca"): (0.9, 0.6, 1.0),
}


def interval(policy: TokenKeys, at: int, steps: int) -> int:
    """Steps between full steps, as a full step sets it for those that follow.

    Args:
        policy: names the nominal interval.
        at: number of the full step, as the rules count.
        steps: of the trajectory.
    """
    weight = 0.4 if policy.rules == "dit" else policy.pixart_interval_weight
    weight = weight if policy.fresh_ratio else 0.0  # "FORA"
    factor = torch.tensor(_falling(weight, at, steps), dtype=torch.float32)
    rounded = int(torch.round(policy.interval / factor))  # half to even
    sensitive = range(int(steps * 0.2), int(steps * 0.4))
    if policy.rules == "dit" and policy.fresh_ratio != 0 and at in sensitive:
        return 2
    return rounded


def ratio(policy: TokenKeys, kind: SiteKind, at: int, steps: int, block: int, blocks: int) -> float:
    """Share of a site's tokens that a partial step recomputes; may lie outside of 0 to 1.

    Args:
        policy: names the ratio schedule.
        kind: of the site.
        at: number of the step, as the rules count.
        steps: of the trajectory.
        block: index of the site's block.
        blocks: of the model. The published code divides by 27, the last index in its model.
    """
    last = max(blocks - 1, 1)
    match policy.ratio_schedule:
        case "constant":
            return policy.fresh_ratio
        case "linear":
            return policy.fresh_ratio * _falling(_SPREAD, at, steps)
        case "exp":
            return policy.fresh_ratio * (_SPREAD ** (at / steps))
        case "linear-mode":
            mode = (at % policy.interval) / policy.interval - 0.5
            return policy.fresh_ratio * (_falling(_SPREAD, at, steps) + _MODE * mode)
        case "layerwise":
            return policy.fresh_ratio * _falling(_SPREAD, block, last)
    by_step, by_block, by_kind = _WEIGHTS[policy.rules, policy.ratio_schedule]
    block_factor, step_factor = _falling(by_block, block, last), _falling(by_step, at, steps)
    is_cross = kind == SiteKind.CROSS_ATTN
    kind_factor = 1 - (1 - _MLP_SHARE) * by_kind if is_cross else 1 + _MLP_SHARE * by_kind
    return policy.fresh_ratio * block_factor * step_factor * kind_factor


def _falling(weight: float, at: int, end: int) -> float:
    """From ``1 + weight`` at 0 to ``1 - weight`` at ``end``."""
    return 1 + weight - 2 * weight * at / end


def token_count(share: float, tokens: int) -> int:
    """``share`` of ``tokens``, clamped, in float32 and truncated (``cache_cutfresh.py``)."""
    return int(torch.clamp(torch.tensor(share, dtype=torch.float32), 0, 1) * tokens)
