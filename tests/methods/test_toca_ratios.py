"""ToCa and DuCa: when a step is what, and how many tokens it recomputes, as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegraph.methods import ratios
from cachegraph.methods.duca import Duca
from cachegraph.methods.tokens import TokenMethod
from cachegraph.model.site import SiteKind
from tests.fake_sites import FULL_50_3, kinds_of, policy_of

# When a step is what.


def test_250_steps() -> None:
    found = kinds_of(250, method="toca", interval=4, ratio_schedule="ddpm250")
    assert {kind: len(steps) for kind, steps in found.items()} == {"FF": 72, "FP": 2, "PP": 176}
    assert found["FP"] == [245, 155]


def test_interval_changes_where_the_published_code_changes_it() -> None:
    policy = policy_of(250, method="toca", interval=4, ratio_schedule="ddpm250")
    full = [249 - s for s, p in enumerate(policy.step_types(250)) if "F" in p[0].name[0]]
    seen = {at: ratios.interval(policy, at, 250) for at in full}
    changes = [
        at
        for before, at in zip([None, *full[:-1]], full, strict=True)
        if before is None or seen[at] != seen[before]
    ]
    assert {at: seen[at] for at in changes} == {249: 7, 245: 6, 210: 5, 155: 4, 96: 2, 48: 3}


def test_interval_is_rounded_half_to_even_in_float32() -> None:
    policy = policy_of(50, method="toca", interval=7)
    assert ratios.interval(policy, 25, 50) == 7
    pixart = policy_of(8, method="toca", interval=2, rules="pixart")
    assert ratios.interval(pixart, 0, 8) == 2  # 2 / 0.8 is 2.5 and rounds to even
    assert ratios.interval(policy_of(20, method="toca", interval=6, rules="pixart"), 0, 20) == 8


def test_50_steps() -> None:
    three = kinds_of(50, method="toca", interval=3)
    assert three["FF"] == FULL_50_3
    assert three["FP"] == [45, 32]
    assert len(three["PP"]) == 30
    four = kinds_of(50, method="toca", interval=4)
    assert (len(four["FF"]), four["FP"], len(four["PP"])) == (14, [42, 30, 8], 33)


def test_without_quirks_no_step_is_mixed() -> None:
    for policy in ({"method": "toca"}, {"method": "duca"}):
        assert "FP" in kinds_of(50, interval=3, **policy)
        assert (
            {"FF", "PP"}
            <= set(kinds_of(50, interval=3, quirks=False, **policy))
            <= {*("FF", "PP", "SS")}
        )


def test_no_fresh_tokens_is_a_fixed_interval() -> None:
    found = kinds_of(50, method="toca", interval=3, fresh_ratio=0)
    assert found["FF"] == [49, *range(48, -1, -3)]
    assert set(found) == {"FF", "PP"}


def test_pixart_counts_up() -> None:
    three = kinds_of(20, method="toca", interval=3, rules="pixart")
    assert (three["FF"], three["FP"]) == ([0, 6, 9, 12, 15, 18], [4])
    two = kinds_of(20, method="toca", interval=2, rules="pixart")
    assert (two["FF"], two["PP"]) == (list(range(0, 20, 2)), list(range(1, 20, 2)))


def test_duca_skips_every_second_step_between() -> None:
    found = kinds_of(50, method="duca", interval=3)
    assert found["FF"] == FULL_50_3
    assert (found["FP"], found["FS"]) == ([45], [32])
    assert (len(found["PP"]), len(found["SS"])) == (22, 8)
    pixart = kinds_of(20, method="duca", interval=3, rules="pixart")
    assert pixart["FF"] == list(range(0, 20, 3))  # a fixed interval
    assert pixart["SS"] == list(range(2, 20, 3))


# How many tokens.


def share(kind: str, at: int, steps: int, block: int, **policy: Any) -> float:
    made = policy_of(steps, **policy)
    return ratios.ratio(made, SiteKind(kind), at, steps, block, 28)


@pytest.mark.parametrize(
    ("policy", "at", "block", "expected"),
    [
        ({"ratio_schedule": "ddpm250"}, 10, 9, 0.1 * (1.4 - 0.16) * (1.8 - 1.6 / 3) * 2.5),
        ({"ratio_schedule": "linear-layerwise"}, 10, 9, 0.1 * 1.24 * (1.8 - 1.6 / 3) * 2.5),
        ({"ratio_schedule": "ddim50"}, 10, 9, 0.1 * (3 - 0.8) * (0.8 + 0.4 / 3) * 2.5),
        ({"ratio_schedule": "constant"}, 10, 9, 0.1),
        ({"ratio_schedule": "linear"}, 10, 9, 0.1 * (1.9 - 0.36)),
        ({"ratio_schedule": "exp"}, 10, 9, 0.1 * 0.9**0.2),
        ({"ratio_schedule": "linear-mode"}, 10, 9, 0.1 * (1.54 + 0.1 * (1 / 3 - 0.5))),
        ({"ratio_schedule": "layerwise"}, 10, 9, 0.1 * (1.9 - 0.6)),
        ({"rules": "pixart"}, 10, 9, 0.1 * (1.9 - 0.36) * (1.6 - 0.4) * 1.6),
        (
            {"rules": "pixart", "ratio_schedule": "linear-layerwise"},
            *(10, 9, 0.1 * 1.54 * 1.2 * 1.6),
        ),
    ],
)
def test_ratio_schedules(policy: dict[str, Any], at: int, block: int, expected: float) -> None:
    found = share("mlp", at, 50, block, method="toca", interval=3, fresh_ratio=0.1, **policy)
    assert found == pytest.approx(expected, rel=1e-12)


def test_cross_attention_recomputes_less() -> None:
    keys: dict[str, Any] = {"method": "toca", "interval": 3, "fresh_ratio": 0.1, "rules": "pixart"}
    assert share("cross_attn", 0, 20, 0, **keys) == pytest.approx(0.1 * 1.9 * 1.6 * 0.6)


def test_duca_calls_its_schedule_toca() -> None:
    for rules, same in (("dit", "ddim50"), ("pixart", "pixart")):
        keys: dict[str, Any] = {"method": "duca", "interval": 3, "rules": rules}
        a, b = (share("mlp", 7, 50, 5, ratio_schedule=name, **keys) for name in ("toca", same))
        assert a == b


def test_tokens_are_counted_in_float32() -> None:
    """In double precision the published setting would recompute 31 of 64 tokens here."""
    keys: dict[str, Any] = {"method": "duca", "interval": 3, "fresh_ratio": 0.75}
    at_ten = share("cross_attn", 10, 20, 11, rules="pixart", **keys)
    assert (int(at_ten * 64), ratios.token_count(at_ten, 64)) == (31, 32)
    assert [ratios.token_count(x, 64) for x in (-0.5, 0, 0.999, 1.0, 7.0)] == [0, 0, 63, 64, 64]


def test_blocks_are_spread_over_any_depth() -> None:
    policy = policy_of(50, method="toca", interval=3, ratio_schedule="layerwise")
    ends = [ratios.ratio(policy, SiteKind.MLP, 0, 50, block, 4) for block in (0, 3)]
    assert ends == pytest.approx([0.07 * 1.9, 0.07 * 0.1])
    assert ratios.ratio(policy, SiteKind.MLP, 0, 50, 0, 1) == ends[0]


# The published control flow.


def as_published(policy: TokenMethod, steps: int, depth: int) -> list[list[str]]:
    """The published control flow, block by block: types of the blocks per step."""
    down, duca = policy.rules == "dit", isinstance(policy, Duca)
    adapts = policy.fresh_ratio != 0 and (down or not duca)
    weight = (0.4 if down else -0.2) if adapts else 0.0
    table, threshold = [], torch.tensor(0.0)
    for at in range(steps - 1, -1, -1) if down else range(steps):
        row = []
        for _ in range(depth):
            if at == (steps - 1 if down else 0) or at % threshold == 0:
                row.append("F")
                factor = torch.tensor(1 + weight - 2 * weight * at / steps)
                threshold = torch.round(policy.interval / factor)
                if adapts and down and int(steps * 0.2) <= at < int(steps * 0.4):
                    threshold = torch.tensor(2.0)
            elif duca and (at % threshold) % 2 == 0:
                row.append("S")
            else:
                row.append("P")
        table.append(row)
    return table


@settings(max_examples=60)
@given(
    steps=st.integers(1, 120),
    interval=st.integers(1, 12),
    ratio=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    method=st.sampled_from(["toca", "duca"]),
    rules=st.sampled_from(["dit", "pixart"]),
)
def test_types_are_those_of_the_published_loop(
    steps: int, interval: int, ratio: float, method: str, rules: str
) -> None:
    keys: dict[str, Any] = {
        "interval": interval,
        "fresh_ratio": ratio,
        "method": method,
        "rules": rules,
    }
    policy = policy_of(steps, **keys)
    found = policy.step_types(steps)
    spread = [[pair[min(b, 1)].name[0] for b in range(3)] for pair in found]
    assert spread == as_published(policy, steps, 3)
