"""ToCa and DuCa: what each step does at each site, and what does not fit a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegraph.errors import PlanError, ScheduleError
from cachegraph.methods import ratios
from cachegraph.methods.tokens import StepType, TokenMethod, _stack_column
from cachegraph.model.site import Site, blocks_of
from cachegraph.plan.action import Compute, Refresh, Reuse, Row, makes_value, sources
from cachegraph.plan.selection import Score, Selection
from cachegraph.schedule.rows import make_rows, make_selection
from cachegraph.schedule.schedule import load_schedule, presets
from tests.fake_sites import (
    DIT,
    FULL_50_3,
    PIXART,
    flux_sites,
    kinds_of,
    make,
    make_site,
    make_sites,
    policy_of,
)

# Rows.


def column(rows: tuple[Row, ...], sites: list[Site], name: str) -> list[Any]:
    index = [site.name for site in sites].index(name)
    return [row[index] for row in rows]


def test_rows_of_the_published_ddim50() -> None:
    sites = make_sites()
    rows = make_rows(make(50, method="toca", interval=3), sites)
    attn, mlp = column(rows, sites, "blocks.5.attn"), column(rows, sites, "blocks.5.mlp")
    full = {49 - at for at in FULL_50_3}
    assert {s for s, a in enumerate(attn) if a == Compute()} == full
    assert attn[4] == mlp[4] == Reuse(0)  # step 45: mixed, and the ratio is below 0
    first = column(rows, sites, "blocks.0.mlp")
    assert [s for s, a in enumerate(first) if a == Compute()] == sorted(full | {4, 17})
    assert mlp[5] == Compute()
    # The interval of 8 from step 9 (40): steps 10 and 11 (39, 38) choose nothing, yet age.
    assert mlp[9:12] == [Compute(), Reuse(9), Reuse(9)]
    k = ratios.token_count(0.07 * (3 - 4 * 37 / 50) * (0.8 + 0.4 * 5 / 27) * 2.5, 256)
    assert mlp[12] == Refresh(9, k, scored=9, age=2)
    assert isinstance(rows[18][3], Refresh)
    nothing = [all(a.__class__ is Reuse for a in row[2:]) for row in rows]
    assert sum(nothing) == 9


def test_values_and_ages_follow_the_steps_of_a_site() -> None:
    sites = make_sites()
    rows = make_rows(make(250, method="toca", interval=4, ratio_schedule="ddpm250"), sites)
    mlp = column(rows, sites, "blocks.27.mlp")
    assert mlp[7:11] == [  # 242, 241, 240, 239: N is 6 since 245, which is no full step here
        *(Refresh(6, mlp[7].tokens, 0, 6), Refresh(7, mlp[8].tokens, 0, 7), Compute()),
        Refresh(9, mlp[10].tokens, 9, 0),
    ]
    assert min(a.tokens for row in rows for a in row if isinstance(a, Refresh)) == 5
    assert max(a.tokens for row in rows for a in row if isinstance(a, Refresh)) == 112


def test_pixart_recomputes_cross_attention_too() -> None:
    sites = make_sites(PIXART)
    rows = make_rows(make(20, method="toca", interval=3, rules="pixart"), sites)
    attn, cross, mlp = (column(rows, sites, f"blocks.0.{kind}") for kind in PIXART)
    assert attn[1:3] == [Reuse(0), Reuse(0)]
    assert cross[1] == Refresh(0, ratios.token_count(0.3 * 1.6 * 1.81 * 0.6, 256), 0, 0)
    assert cross[2] == Refresh(1, ratios.token_count(0.3 * 1.6 * 1.72 * 0.6, 256), 0, 1)
    assert mlp[1:4] == [Compute(), Compute(), Compute()]  # the ratio is above 1
    assert mlp[15:18] == [Compute(), Refresh(15, 90, 15, 0), Refresh(16, 72, 15, 1)]


def test_all_tokens_make_all_young_and_leave_the_score_of_a_full_step() -> None:
    sites = make_sites(PIXART)
    for score, scored in (("attention", 6), ("similarity", 7)):
        keys: dict[str, Any] = {"method": "toca", "interval": 4, "rules": "pixart"}
        keys["score"] = score
        mlp = column(make_rows(make(20, fresh_ratio=0.4, **keys), sites), sites, "blocks.9.mlp")
        scored_at = [(a.scored, a.age) if isinstance(a, Refresh) else a for a in mlp]
        at = next(s for s in range(1, 20) if mlp[s - 1] == Compute() and mlp[s] != Compute())
        assert scored_at[at][1] == 0, mlp
        full = kinds_of(20, fresh_ratio=0.4, **keys)["FF"]
        last_full = max(f for f in full if f < at)
        assert last_full < at - 1  # so a partial step computed all tokens
        assert scored_at[at][0] == (last_full if score == "attention" else at - 1), scored


def test_orders_that_cannot_be_foreseen_are_refused() -> None:
    sites = make_sites(depth=1)
    keys: dict[str, Any] = {"method": "toca", "interval": 5, "ratio_schedule": "linear-mode"}
    with pytest.raises(PlanError, match=r"order at step 386 cannot be made"):
        make_rows(make(400, fresh_ratio=0.536, **keys), sites)
    make_rows(make(400, fresh_ratio=0.536, score="norm", **keys), sites)


def test_duca_skips_the_stack() -> None:
    sites = make_sites(stack=True)
    rows = make_rows(make(50, method="duca", interval=3), sites)
    stack = column(rows, sites, "blocks")
    skipped = [49 - s for s, a in enumerate(stack) if a != Compute()]
    assert skipped == [47, 42, 38, 34, 32, 29, 26, 23, 20]
    assert all(a in (Compute(), Reuse(s - 1)) for s, a in enumerate(stack))
    mixed = rows[49 - 32]
    assert set(mixed[:2]) == {Compute()}
    assert all(isinstance(a, Reuse) for a in mixed[2:])
    # Steps that are skipped make nothing older.
    mlp = column(rows, sites, "blocks.3.mlp")
    ages = [(49 - s, a.age) for s, a in enumerate(mlp) if isinstance(a, Refresh)]
    assert ages[:4] == [(37, 1), (35, 0), (33, 1), (31, 2)]


def test_two_skipped_steps_in_a_row_take_the_same_value() -> None:
    kinds = [StepType.FULL, StepType.SKIP, StepType.SKIP, StepType.PARTIAL]
    assert _stack_column(kinds) == [Compute(), Reuse(0), Reuse(0), Compute()]


@pytest.mark.parametrize("policy", [{"method": "fora"}, {"method": "toca"}])
def test_others_compute_the_stack(policy: dict[str, Any]) -> None:
    sites = make_sites(stack=True, depth=4)
    rows = make_rows(make(50, interval=3, **policy), sites)
    assert {row[-1] for row in rows} == {Compute()}
    assert {type(row[-2]) for row in rows} > {Compute}


def test_sites_left_out_are_computed() -> None:
    sites = make_sites(depth=4)
    rows = make_rows(make(50, {"exclude": ["blocks.0.*"]}, method="toca", interval=3), sites)
    assert {a for row in rows for a in row[:2]} == {Compute()}
    stacked = make_sites(depth=4, stack=True)
    with pytest.raises(PlanError, match="cannot leave out sites") as caught:
        make_rows(make(50, {"kinds": ["mlp"]}, method="duca", interval=3), stacked)
    assert caught.value.place == "schedule: sites"


@settings(max_examples=60)
@given(
    steps=st.integers(1, 60),
    interval=st.integers(1, 9),
    ratio=st.floats(0, 1),
    method=st.sampled_from(["toca", "duca"]),
    rules=st.sampled_from(["dit", "pixart"]),
    quirks=st.booleans(),
)
def test_rows_use_only_the_newest_value(
    steps: int, interval: int, ratio: float, method: str, rules: str, quirks: bool
) -> None:
    keys: dict[str, Any] = {
        "interval": interval,
        "fresh_ratio": ratio,
        "method": method,
        "rules": rules,
    }
    sites = make_sites(PIXART, depth=3, stack=True, tokens=64, channels=8)
    rows = make_rows(make(steps, score="random", quirks=quirks, **keys), sites)
    for actions in zip(*rows, strict=True):
        newest = -1
        for step, action in enumerate(actions):
            assert sources(action) in ((), (newest,))
            if isinstance(action, Refresh):
                assert 1 <= action.tokens < 64
                assert actions[action.scored] == Compute()
                assert 0 <= action.age < step - action.scored
            newest = step if makes_value(action) else newest


# The choice of tokens, and what is refused.


def test_selection_of_the_published_settings() -> None:
    assert make_selection(make(50, method="toca", interval=3), make_sites()) == Selection(
        score=Score.ATTENTION, age_weight=0.25 / 3, bonus=0.6, cell=2, grid=(16, 16)
    )
    pixart = make_selection(make(20, method="toca", interval=3, rules="pixart"), make_sites(PIXART))
    assert pixart == Selection(Score.CROSS_ATTENTION, 0.25 / 3, 0.4, 4, (16, 16))
    duca = make_selection(make(50, method="duca", interval=4), make_sites())
    assert duca == Selection(Score.KV_NORM, 0.0625, 0.8, 2, (16, 16))
    assert make_selection(make(50, method="fora", interval=3), make_sites()) is None


def test_without_tokens_there_is_nothing_to_choose() -> None:
    schedule, odd = make(50, method="toca", interval=3, fresh_ratio=0), make_sites(tokens=7)
    assert make_selection(schedule, odd) is None
    assert not any(isinstance(a, Refresh) for row in make_rows(schedule, odd) for a in row)


def test_selection_of_a_given_grid_and_of_no_bonus() -> None:
    wide = make_sites(tokens=120)
    keys: dict[str, Any] = {"method": "toca", "interval": 3}
    found = make_selection(make(50, grid=[10, 12], **keys), wide)
    assert found is not None
    assert found.grid == (10, 12)
    bare = make_selection(make(50, bonus={"weight": 0}, **keys), make_sites(tokens=7))
    assert bare is not None
    assert (bare.bonus, bare.cell, bare.grid) == (0, 1, (1, 7))
    drawn = make_selection(make(50, score="random", seed=5, **keys), make_sites())
    assert drawn is not None
    assert (drawn.score, drawn.seed) == (Score.RANDOM, 5)


@pytest.mark.parametrize(
    ("policy", "sites", "message"),
    [
        (
            {"grid": [10, 10]},
            make_sites(),
            "schedule: policy.grid: a grid of 10 x 10 does not hold 256 tokens; "
            "expected two numbers whose product is 256; found 100",
        ),
        (
            {},
            make_sites(tokens=120),
            "schedule: policy: 120 tokens form no square; expected the grid of tokens; "
            "add 'grid: [height, width]' to the policy, or 'bonus: {weight: 0}'",
        ),
        (
            {"bonus": {"cell": 3}},
            make_sites(),
            "schedule: policy.bonus.cell: 16 x 16 tokens do not divide into cells of 3 x 3; "
            "expected a cell that divides 16 and 16; found 3; "
            "choose another cell, or 'bonus: {weight: 0}' for no bonus",
        ),
        (
            {"score": "cross-attention"},
            make_sites(),
            "schedule: policy.score: no score 'cross-attention': the model has no cross_attn site; "
            "expected a score that the model can give (56 sites: blocks.0.attn (attn), "
            "blocks.0.mlp (mlp), blocks.1.attn (attn), ..., blocks.27.attn (attn), "
            "blocks.27.mlp (mlp)); "
            "choose another: attention, kv-norm, similarity, norm, random",
        ),
        (
            {},
            [make_site("blocks.0.attn", "attn"), make_site("blocks.0.mlp", "mlp", "s1")],
            "schedule: policy: the tokens of blocks.0.mlp cannot be counted; expected one value "
            "of shape (batch, tokens, channels), the tokens a number; found f32[s0, s1, 1152]; "
            "compile for a fixed image size, or leave the site out with 'sites: {exclude}'",
        ),
        (
            {},
            [
                make_site("b.0.attn", "attn"),
                make_site("b.0.mlp", "mlp", 16),
                make_site("b.1.mlp", "mlp", 64),
            ],
            "schedule: policy: the sites to refresh have no common number of tokens; expected at "
            "least one site of kind mlp, and as many tokens in all of them; "
            "found b.0.mlp: 16, b.1.mlp: 64; 'sites: {exclude: ...}' leaves sites out",
        ),
    ],
)
def test_what_does_not_fit_the_model(
    policy: dict[str, Any], sites: list[Site], message: str
) -> None:
    schedule = make(50, method="toca", interval=3, **policy)
    for wanted in (make_rows, make_selection):
        with pytest.raises(PlanError) as caught:
            wanted(schedule, sites)
        assert str(caught.value) == message


def test_duca_needs_a_stack() -> None:
    with pytest.raises(PlanError, match="no site for all of them together"):
        make_rows(make(50, method="duca", interval=3), make_sites())
    make_rows(make(50, method="duca", interval=2, fresh_ratio=0), make_sites())  # skips nothing


def test_blocks_are_found_by_the_parents_of_their_sites() -> None:
    names = ["a.0.attn", "a.0:mlp", "a.1.attn", "a.1.mlp", "a.1.mlp@1"]
    sites = [make_site(name, "attn" if "attn" in name else "mlp") for name in names]
    found = blocks_of([*sites, make_site("a", "stack")])
    assert [[site.name for site in block] for block in found] == [names[:2], names[2:]]


# The schedule.


def test_defaults_follow_the_rules() -> None:
    policy = policy_of(20, method="toca", interval=3, rules="pixart", bonus={"weight": 1})
    assert (policy.fresh_ratio, policy.ratio_schedule) == (0.3, "pixart")
    assert (policy.score, policy.bonus.weight, policy.bonus.cell) == ("cross-attention", 1, 4)
    duca = policy_of(20, method="duca", interval=3, fresh_ratio=0.2)
    assert (duca.fresh_ratio, duca.ratio_schedule, duca.bonus.weight) == (0.2, "toca", 0.8)


@pytest.mark.parametrize("method", ["toca", "duca"])
@pytest.mark.parametrize("rules", ["dit", "pixart"])
@pytest.mark.parametrize("score", ["random", "norm"])
def test_round_trip(method: str, rules: str, score: str, tmp_path: Any) -> None:
    schedule = make(20, method=method, interval=3, rules=rules, score=score, grid=[8, 8])
    path = tmp_path / "again.yaml"
    path.write_text(schedule.to_yaml())
    assert load_schedule(path) == schedule
    assert load_schedule(path).digest() == schedule.digest()


def test_ratio_above_one_is_refused_with_its_place() -> None:
    with pytest.raises(ScheduleError, match=r"policy.fresh_ratio.*0 to 1.*found 1.5"):
        make(20, method="toca", interval=3, fresh_ratio=1.5)


# The presets.

PRESETS = {  # steps that compute everything
    "toca-n3": 18,
    "toca-n4": 14,
    "toca-n4-250": 72,
    "duca-n3": 18,
    "toca-n3-pixart": 6,
    "toca-n2-pixart": 10,
    "duca-n3-pixart": 7,
    "toca-n4-flux": 14,
    "toca-n5-flux": 12,
    "toca-n6-flux": 10,
    "toca-opensora": 7,
    "duca-opensora": 7,
}


@pytest.mark.parametrize(("name", "full"), PRESETS.items())
def test_presets_compute_as_many_steps_as_they_say(name: str, full: int) -> None:
    schedule = load_schedule(name)
    sites = make_sites(DIT, stack=True)
    if "pixart" in name or "opensora" in name:
        sites = make_sites(PIXART, stack=True)
    elif "flux" in name:
        sites = flux_sites()
    rows = make_rows(schedule, sites)
    assert sum(all(a == Compute() for a in row) for row in rows) == full
    assert any(isinstance(a, Refresh) for row in rows for a in row)
    text = (toca_presets()[name]).read_text(encoding="utf-8")
    assert f"computes {full} of them in full" in text
    assert isinstance(schedule.policy, TokenMethod)
    assert f"N={schedule.policy.interval}" in text


def toca_presets() -> dict[str, Any]:
    return {name: path for name, path in presets().items() if name[:4] in ("toca", "duca")}


def test_every_preset_is_counted_above() -> None:
    assert set(toca_presets()) == set(PRESETS)
