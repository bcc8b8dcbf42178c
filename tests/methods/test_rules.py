"""The rules of ToCa and DuCa for FLUX and Open-Sora, and rules that a schedule writes itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cachegraph.errors import PlanError, ScheduleError
from cachegraph.methods import ratios
from cachegraph.methods.rules import DUCA, TOCA, Rules
from cachegraph.methods.tokens import StepType
from cachegraph.model.site import Site
from cachegraph.plan.action import Action, Compute, Refresh, Reuse
from cachegraph.plan.selection import Score
from cachegraph.schedule.rows import make_rows, make_selection
from cachegraph.schedule.schedule import load_schedule
from tests.fake_sites import PIXART, flux_sites, make, make_sites, policy_of

FLUX = {"method": "toca", "rules": "flux", "interval": 4, "fresh_ratio": 0.1}
OPENSORA = {"method": "toca", "rules": "opensora", "fresh_ratio": 0.1}


def columns(steps: int, sites: list[Site], **policy: Any) -> dict[str, list[Action]]:
    rows = make_rows(make(steps, **policy), sites)
    found = zip(*rows, strict=True)
    return {site.name: list(column) for site, column in zip(sites, found, strict=True)}


def full(actions: list[Action]) -> list[int]:
    return [step for step, action in enumerate(actions) if action == Compute()]


# FLUX: by counter, ratios by kind of block.


@pytest.mark.parametrize(("interval", "count"), [(1, 50), (2, 26), (4, 14), (5, 12), (6, 10)])
def test_flux_counts_from_the_third_step_on(interval: int, count: int) -> None:
    made = columns(50, flux_sites(2, 2), **{**FLUX, "interval": interval})
    assert full(made["double_blocks.1:attn"]) == [0, 1, *range(2, 50, interval)]
    assert len(full(made["single_blocks.0:attn"])) == count


def test_flux_without_tokens_begins_with_one_full_step() -> None:
    made = columns(9, flux_sites(1, 1), **{**FLUX, "fresh_ratio": 0})
    assert full(made["double_blocks.0:attn"]) == [0, 4, 8]


def test_flux_recomputes_both_mlps_and_the_fused_blocks() -> None:
    made = columns(50, flux_sites(), **FLUX)
    assert made["double_blocks.7:attn"][3:6] == [Reuse(2)] * 3
    for name, block, factor, tokens in (
        ("double_blocks.7.img_mlp", 7, 0.4, 4096),
        ("double_blocks.7.txt_mlp", 7, 0.4, 512),
        ("single_blocks.37:attn", 37, 1.6, 4608),
    ):
        k = ratios.token_count(0.1 * (1.5 - block / 27) * factor, tokens)
        wanted = [Refresh(2 + age, k, 2, age) for age in range(3)]
        assert made[name][3:6] == wanted
    without = columns(50, flux_sites(), **FLUX, quirks=False)
    [*_, last] = [a for a in without["single_blocks.37:attn"] if isinstance(a, Refresh)]
    assert last.tokens == ratios.token_count(0.1 * 0.5 * 1.6, 4608)


def test_all_tokens_of_a_fused_block_are_no_full_step() -> None:
    """Its attention stays what it was when the block was computed."""
    made = columns(7, flux_sites(1, 1), **{**FLUX, "fresh_ratio": 1})
    assert made["single_blocks.0:attn"][3:5] == [Refresh(2, 4608, 2, 0), Refresh(3, 4608, 2, 1)]


def test_flux_needs_no_common_grid_but_a_bonus_does() -> None:
    chosen = make_selection(make(50, **FLUX), flux_sites(2, 2))
    assert chosen is not None
    assert (chosen.score, chosen.bonus, chosen.grid) == (Score.ATTENTION, 0, None)
    assert chosen.age_weight == 0.25 / 4
    with pytest.raises(PlanError, match=r"no common number of tokens.*img_mlp: 4096") as caught:
        make_rows(make(50, **FLUX, bonus={"weight": 0.4}), flux_sites(2, 2))
    assert caught.value.place == "schedule: policy"
    assert caught.value.remedy


def test_a_fused_block_that_cannot_be_split_is_refused() -> None:
    sites = flux_sites(1, 1, split=False)
    with pytest.raises(PlanError, match=r"single_blocks\.0:attn cannot be split") as caught:
        make_rows(make(50, **FLUX), sites)
    assert caught.value.place == "schedule: policy.rules"
    assert "sites: {exclude: ...}" in caught.value.remedy
    reused = columns(50, sites, **{**FLUX, "rules": {"like": "flux", "refresh": ("mlp",)}})
    assert {type(a) for a in reused["single_blocks.0:attn"]} == {Compute, Reuse}


# Open-Sora: periods by kind of site.


def test_opensora_has_periods_by_kind() -> None:
    made = columns(30, make_sites(PIXART, depth=2), **OPENSORA)
    attn, cross, mlp = (made[f"blocks.1.{kind}"] for kind in PIXART)
    assert full(attn) == full(mlp) == [0, 1, 2, *range(3, 30, 3)]
    assert full(cross) == [0, 1, 2, *range(6, 30, 6)]
    assert {type(a) for a in cross} == {Compute, Reuse}  # its ratio is below 0
    k = ratios.token_count(0.1 * 1.495, 256)
    assert mlp[3:6] == [Compute(), Refresh(3, k, 3, 0), Refresh(4, k, 3, 1)]


def test_opensora_interval_scales_the_age_alone() -> None:
    made = [make(30, **OPENSORA, interval=n) for n in (3, 5)]
    sites = make_sites(PIXART, depth=2)
    assert make_rows(made[0], sites) == make_rows(made[1], sites)
    chosen = [make_selection(one, sites) for one in made]
    assert [one.age_weight for one in chosen if one is not None] == [0.25 / 3, 0.25 / 5]
    assert [one.score for one in chosen if one is not None] == [Score.CROSS_ATTENTION] * 2


def test_duca_on_opensora_skips_the_second_step_of_three() -> None:
    sites = make_sites(PIXART, depth=2, stack=True)
    made = columns(30, sites, **{**OPENSORA, "method": "duca"})
    skipped = [s for s, action in enumerate(made["blocks"]) if action != Compute()]
    assert skipped == list(range(5, 30, 3))
    mlp = made["blocks.0.mlp"]
    assert [s for s, a in enumerate(mlp) if isinstance(a, Refresh)] == list(range(4, 30, 3))
    policy = policy_of(30, **{**OPENSORA, "method": "duca"})
    types = Counter(first for first, _ in policy.step_types(30, "cross_attn"))
    assert types == {StepType.FULL: 7, StepType.PARTIAL: 14, StepType.SKIP: 9}


# Data.


def test_four_sets_stand_side_by_side() -> None:
    assert list(TOCA) == ["dit", "pixart", "flux", "opensora"]
    assert set(DUCA) < set(TOCA)
    assert all(one.rules.like == name for name, one in TOCA.items())


def test_a_fifth_set_is_written_in_a_schedule(tmp_path: Path) -> None:
    rules = {"like": "flux", "first": 1, "ratios": {"flux": {"kinds": {"mlp": 1, "fused": 0}}}}
    policy = {**FLUX, "rules": rules}
    made = columns(9, flux_sites(2, 1), **policy)
    assert full(made["double_blocks.1:attn"]) == [0, 4, 8]
    assert made["double_blocks.1.txt_mlp"][1] == Refresh(0, 51, 0, 0)
    assert made["single_blocks.0:attn"][1] == Reuse(0)
    schedule = make(9, **policy)
    path = tmp_path / "again.yaml"
    path.write_text(schedule.to_yaml(), encoding="utf-8")
    assert load_schedule(path) == schedule
    kept = policy_of(9, **policy).rule_set
    assert isinstance(kept, Rules)
    assert "linear-layerwise" in kept.ratios  # what is not said stays


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("flx", r"policy\.rules: unknown word 'flx' for 'rules'.*did you mean 'flux'"),
        ({"like": "flx"}, r"policy\.rules\.like: unknown word 'flx' for 'like'.*'flux'"),
        ({"like": "flux", "frist": 2}, r"policy\.rules\.frist: unknown key .*did you mean 'first'"),
        ({"like": "flux", "first": 0}, r"policy\.rules\.first: 'first' is too small"),
        ({"like": "flux", "sensitive": (0.2,)}, r"rules\.sensitive: 'sensitive' is no pair"),
        (3, r"'rules' has the wrong type; expected one of dit, flux, opensora, pixart, or a map"),
    ],
)
def test_wrong_rules_are_refused_with_their_place(rules: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        make(50, method="toca", rules=rules)
    assert "interval" not in str(caught.value)


def test_ratio_schedules_belong_to_rules() -> None:
    with pytest.raises(ScheduleError, match=r"ddim50.*with 'rules: flux'.*for 'rules: dit'"):
        make(50, **FLUX, ratio_schedule="ddim50")
    with pytest.raises(ScheduleError, match=r"linear-layerwise.*with 'rules: opensora'"):
        make(50, **OPENSORA, ratio_schedule="linear-layerwise")
