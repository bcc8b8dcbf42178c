"""How far apart full steps are, and how many tokens a partial step recomputes (ToCa, DuCa).

Sources: Shenyi-Z/ToCa and Shenyi-Z/DuCa, ``cache_functions/force_scheduler.py`` and
``fresh_ratio_scheduler.py`` in the folders for each model. A step is given as they count it: from
``steps - 1`` down to 0 for DiT, from 0 up for the others. The order of operations and float32,
where they have it, are kept: they decide whether a number lies just above or just below a whole
one.
"""

from __future__ import annotations

import torch

from .token_keys import TokenKeys

_SPREAD = 0.9  # of the schedules that are not named after a setting
_MODE = 0.1


def interval(policy: TokenKeys, at: int, steps: int) -> int:
    """Steps between full steps, as a full step sets it for those that follow.

    Args:
        policy: names the nominal interval.
        at: number of the full step, as the rules count.
        steps: of the trajectory.
    """
    rules = policy.rule_set
    weight = rules.change if policy.fresh_ratio else 0.0  # "FORA"
    factor = torch.tensor(_falling(weight, at, steps), dtype=torch.float32)
    rounded = int(torch.round(policy.interval / factor))  # half to even
    if rules.sensitive and policy.fresh_ratio:
        begin, end = (int(steps * share) for share in rules.sensitive)
        rounded = 2 if begin <= at < end else rounded
    return rounded


def ratio(policy: TokenKeys, kind: str, at: int, steps: int, block: int, blocks: int) -> float:
    """Share of a site's tokens that a partial step recomputes; may lie outside of 0 to 1.

    Args:
        policy: names the ratio schedule.
        kind: of the site, as rules name it.
        at: number of the step, as the rules count.
        steps: of the trajectory.
        block: index of the site's block in its stack.
        blocks: of the stack. The published code divides by 27, the last index of DiT, whatever the
            model has; rules say so where it matters, and ``quirks: false`` does without.
    """
    rules = policy.rule_set
    last = rules.last_block if policy.quirks and rules.last_block else max(blocks - 1, 1)
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
    weights = rules.ratios[policy.ratio_schedule]
    block_factor = _falling(weights.block, block, last)
    step_factor = _falling(weights.step, at, steps)
    return policy.fresh_ratio * block_factor * step_factor * weights.kinds.get(kind, 0.0)  # type: ignore[call-overload]


def _falling(weight: float, at: int, end: int) -> float:
    """From ``1 + weight`` at 0 to ``1 - weight`` at ``end``."""
    return 1 + weight - 2 * weight * at / end


def token_count(share: float, tokens: int) -> int:
    """``share`` of ``tokens``, clamped, in float32 and truncated (``cache_cutfresh.py``)."""
    return int(torch.clamp(torch.tensor(share, dtype=torch.float32), 0, 1) * tokens)
