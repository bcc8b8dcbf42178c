"""Policies and corrections against direct simulations of the published code, on plain numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachegraph.config.yaml_lines import write_yaml
from cachegraph.errors import CachegraphError
from cachegraph.model.site import Site, SiteKind
from cachegraph.plan.action import Compute, Forecast, Reuse, Row, makes_value, sources
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule

ATTN, MLP, CROSS = SiteKind.ATTN, SiteKind.MLP, SiteKind.CROSS_ATTN
Numbers = np.ndarray  # (steps, sites): what each site would compute at each step


def site(name: str, kind: SiteKind) -> Site:
    return Site(name, kind, values=(), module=None, anchors=())


def blocks(depth: int) -> list[Site]:
    return [site(f"blocks.{b}.{kind}", kind) for b in range(depth) for kind in (ATTN, MLP)]


def asked(policy: dict[str, Any], steps: int, **keys: Any) -> dict[str, Any]:
    return {"cachegraph": 1, "steps": steps, "policy": policy, **keys}


def rows_of(keys: dict[str, Any], sites: Sequence[Site]) -> tuple[Row, ...]:
    return make_rows(load_schedule(keys), sites)


def plan_of(keys: dict[str, Any], sites: Sequence[Site]) -> Plan:
    schedule = load_schedule(keys)
    return make_plan(sites, make_rows(schedule, sites), max_variants=schedule.max_variants)


def fails(keys: dict[str, Any], sites: Sequence[Site]) -> str:
    with pytest.raises(CachegraphError) as caught:
        plan_of(keys, sites)
    return str(caught.value)


def fresh_numbers(steps: int, sites: int, seed: int = 0) -> Numbers:
    return np.random.default_rng(seed).standard_normal((steps, sites))


def used(rows: Sequence[Row], fresh: Numbers) -> Numbers:
    """What each site uses at each step, if the rows are carried out."""
    kept: dict[tuple[int, int], float] = {}
    result = np.zeros_like(fresh)
    for step, row in enumerate(rows):
        for i, action in enumerate(row):
            match action:
                case Compute():
                    value = fresh[step, i]
                case Reuse(source):
                    value = kept[i, source]
                case Forecast(steps, coefficients):
                    pairs = zip(steps, coefficients, strict=True)
                    value = math.fsum(kept[i, s] * c for s, c in pairs)
            if makes_value(action):
                kept[i, step] = value
            result[step, i] = value
    return result


# --- TaylorSeer


def published_taylorseer(
    fresh: Sequence[float], interval: int, order: int, first_enhance: int
) -> tuple[list[float], list[int]]:
    """A transcription of ``cal_type`` and ``taylor_utils``, in the terms of its DiT code.

    Returns:
        What is used at each call, and the steps that are computed.
    """
    total = len(fresh)
    counter, activated = 0, [49]
    factors: dict[int, float] = {}
    results, full = [], []
    for step in range(total - 1, -1, -1):
        output = fresh[total - 1 - step]
        if step > total - first_enhance - 1 or counter == interval - 1:
            counter = 0
            activated.append(step)
            distance = activated[-1] - activated[-2]
            updated = {0: output}
            for i in range(order):
                if factors.get(i) is None or not step < total - first_enhance + 1:
                    break
                updated[i + 1] = (updated[i] - factors[i]) / distance
            factors = updated
            full.append(total - 1 - step)
            results.append(output)
        else:
            counter += 1
            x = step - activated[-1]
            results.append(sum(f * x**i / math.factorial(i) for i, f in factors.items()))
    return results, full


@pytest.mark.parametrize(
    ("interval", "full"), [(3, 18), (4, 14), (5, 11)], ids=lambda number: str(number)
)
def test_taylorseer_computes_as_many_steps_as_published(interval: int, full: int) -> None:
    keys = asked({"method": "taylorseer", "interval": interval, "order": 3}, 50)
    plan = plan_of(keys, blocks(1))
    computed = [s for s, row in enumerate(plan.rows) if all(isinstance(a, Compute) for a in row)]
    assert computed == [0, *range(1, 50, interval)]
    assert plan.full_steps() == len(computed) == full


@pytest.mark.parametrize("warmup", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("interval", "order", "steps"),
    [(4, 4, 50), (3, 3, 50), (5, 3, 50), (6, 1, 50), (6, 2, 50), (2, 8, 50), (3, 0, 10), (1, 2, 9)],
)
def test_taylorseer_is_the_published_recursion(
    interval: int, order: int, steps: int, warmup: int
) -> None:
    policy = {"method": "taylorseer", "interval": interval, "order": order, "warmup": warmup}
    fresh = fresh_numbers(steps, 2)
    rows = rows_of(asked(policy, steps), blocks(1))
    found = used(rows, fresh)
    for i in range(2):
        expected, full = published_taylorseer(list(fresh[:, i]), interval, order, warmup)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9, atol=1e-9)
        assert full == [s for s, row in enumerate(rows) if isinstance(row[i], Compute)]
    assert len(plan_of(asked(policy, steps), blocks(1)).variants) <= order + 2


def test_taylorseer_needs_no_more_history_than_its_order() -> None:
    keys = asked({"method": "taylorseer", "interval": 4, "order": 4}, 50)
    deepest = [len(sources(row[0])) for row in rows_of(keys, blocks(1))]
    assert max(deepest) == 5
    assert deepest[2:5] == [2, 2, 2]  # steps 0 and 1 are there
    assert len(plan_of(keys, blocks(14)).variants) == 5
    assert len(plan_of(keys, blocks(14)).variants[-1].constants) == 1  # all sites share it


def test_taylorseer_of_order_0_is_reuse_and_of_interval_1_is_full() -> None:
    plan = plan_of(asked({"method": "taylorseer", "interval": 4, "order": 0}, 50), blocks(2))
    assert len(plan.variants) == 2
    assert plan.rows[2] == (Reuse(1),) * 4
    plan = plan_of(asked({"method": "taylorseer", "interval": 1, "order": 2}, 8), blocks(2))
    assert plan.full_steps() == 8
    assert len(plan.variants) == 1


def test_taylorseer_gives_back_a_polynomial_only_at_order_1() -> None:
    """Dividing by the latest gap only is exact for lines; beyond, it is biased as published."""
    keys = asked({"method": "taylorseer", "interval": 4, "order": 1}, 20)
    line = np.arange(20.0)[:, None] * [2.0, -3.0] + 1
    np.testing.assert_allclose(used(rows_of(keys, blocks(1)), line), line)


# --- GOC


def published_goc(
    fresh: Numbers, reused: np.ndarray, weight: float, steps: Sequence[int], both: bool
) -> Numbers:
    """A transcription of the queue of blocks; columns 2l and 2l + 1 are attn and mlp of block l."""
    result = np.zeros_like(fresh)
    for block in range(0, fresh.shape[1], 2):
        queue: list[list[float] | None] = [None, None]
        for step in range(len(fresh)):
            out = []
            whole = all(reused[step, block : block + 2])
            for module in range(2):
                value = fresh[step, block + module]
                newest, older = queue
                if reused[step, block + module]:
                    assert newest is not None
                    value = newest[module]
                    if step in steps and older is not None and (whole or not both):
                        value = newest[module] + weight * (newest[module] - older[module])
                out.append(value)
                result[step, block + module] = value
            queue = [out, queue[0]]
    return result


def reused_by(rows: Sequence[Row]) -> np.ndarray:
    return np.array([[not isinstance(a, Compute) for a in row] for row in rows])


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("weight", [1.2, 0.8, -0.5])
@pytest.mark.parametrize(
    "policy",
    [
        {"method": "fora", "interval": 2},
        {"method": "fora", "interval": 3},
        {"method": "fora", "interval": 5, "count": "up"},
        {"method": "table", "reuse_steps": [1, 3, 5, 7, 9]},
        {"method": "table", "reuse_steps": [1, 2, 4, 5, 6, 9, 10]},
    ],
)
def test_goc_is_the_published_queue(policy: dict[str, Any], weight: float, steps: int) -> None:
    fresh = fresh_numbers(steps, 4)
    reused = reused_by(rows_of(asked(policy, steps), blocks(2)))
    chosen = [s for s in range(2, 16) if reused[s].any()]
    keys = asked(policy, steps, correction={"method": "goc", "weight": weight, "steps": chosen})
    found = used(rows_of(keys, blocks(2)), fresh)
    expected = published_goc(fresh, reused, weight, chosen, both=False)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not np.allclose(found, used(rows_of(asked(policy, steps), blocks(2)), fresh))


def mask_file(folder: Path, runs: np.ndarray) -> str:
    """A mask with these runs: [step][site], sites in the order attn, mlp, attn, mlp, ..."""
    rows = [{"attn": row[0::2].tolist(), "mlp": row[1::2].tolist()} for row in runs.astype(int)]
    path = folder / "mask.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_goc_on_a_router_is_the_published_queue(tmp_path: Path, both: bool, seed: int) -> None:
    """With ``both_modules``, a block of which one module runs is reused without correction."""
    runs = np.random.default_rng(seed).random((20, 6)) < 0.4
    runs[0::2] = True  # as Learning-to-Cache has it
    runs[19] = True  # there is nothing to correct at a step of the published list
    policy = {"method": "router", "file": mask_file(tmp_path, runs)}
    chosen = [3, 5, 7, 9, 11, 13, 15, 19]
    keys = asked(
        policy,
        20,
        correction={"method": "goc", "weight": 0.8, "steps": chosen, "both_modules": both},
    )
    fresh = fresh_numbers(20, 6, seed)
    found = used(rows_of(keys, blocks(3)), fresh)
    np.testing.assert_allclose(found, published_goc(fresh, ~runs, 0.8, chosen, both), atol=1e-9)
    other = published_goc(fresh, ~runs, 0.8, chosen, not both)
    assert not np.allclose(found, other)


def test_goc_blocks_are_told_by_the_name_of_their_sites() -> None:
    """``blocks.0:attn`` and ``blocks.0:mlp`` belong together, and not to ``blocks.1``."""
    sites = [site(f"blocks.{b}:{kind}", kind) for b in range(2) for kind in (ATTN, MLP)]
    rows = [[1] * 4, [1] * 4, [0, 1, 0, 0]]
    correction = {"method": "goc", "weight": 1.0, "steps": [2], "both_modules": True}
    keys = asked({"method": "table", "rows": rows}, 3, correction=correction)
    found = rows_of(keys, sites)[2]
    corrected = Forecast((1, 0), (2.0, -1.0), keeps=True)
    assert found == (Reuse(1), Compute(), corrected, corrected)
    named = [site(f"blocks.{b}.{kind}", kind) for b in range(2) for kind in (ATTN, MLP)]
    assert rows_of(keys, named)[2] == found


def test_goc_on_smoothcache_corrects_each_kind_where_it_reuses() -> None:
    policy = {"method": "smoothcache", "lists": {"attn": [1, 1, 0, 1, 0], "mlp": [1, 1, 1, 0, 0]}}
    correction = {"method": "goc", "weight": 0.5, "steps": [2, 3, 4]}
    rows = rows_of(asked(policy, 5, correction=correction), blocks(1))
    assert rows[2] == (Forecast((1, 0), (1.5, -0.5), keeps=True), Compute())
    assert rows[3] == (Compute(), Forecast((2, 1), (1.5, -0.5), keeps=True))
    assert rows[4] == tuple(Forecast((3, 2), (1.5, -0.5), keeps=True) for _ in range(2))


def test_goc_without_a_change_to_follow_is_a_reuse() -> None:
    correction = {"method": "goc", "weight": 1.2, "steps": [2, 4]}
    keys = asked({"method": "table", "reuse_steps": [1, 2, 4]}, 5, correction=correction)
    rows = rows_of(keys, blocks(1))
    assert rows[2] == (Reuse(0),) * 2  # steps 0 and 1 used the same value
    assert rows[4] == (Forecast((3, 0), (2.2, -1.2), keeps=True),) * 2
    zero = {"method": "goc", "weight": 0.0, "steps": [4]}
    assert rows_of(keys | {"correction": zero}, blocks(1))[4] == (Reuse(3),) * 2


@pytest.mark.parametrize("name", ["goc-fora-25", "goc-fora-50"])
def test_goc_on_fora_needs_at_most_5_variants(name: str) -> None:
    assert len(plan_of(load_schedule(name).model_dump(exclude_none=True), blocks(28)).variants) <= 5


def test_goc_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    correction = {"method": "goc", "weight": 1.2, "steps": [3, 5]}
    keys = asked({"method": "table", "reuse_steps": [2, 4]}, 8, correction=correction)
    end = "found 3, 5; cachegraph plan shows what each step does"
    assert fails(keys, blocks(2)) == (
        "schedule: correction.steps: the correction changes nothing: none of its steps reuses a "
        f"value; expected steps at which the policy reuses; {end}"
    )
    path = tmp_path / "s.yaml"
    rows = [[1, 1], [1, 1], [1, 1], [0, 1], [1, 1], [1, 0]]
    keys = asked({"method": "table", "rows": rows}, 6)
    text = "correction:\n  method: goc\n  both_modules: true\n  weight: 1\n  steps: [3, 5]\n"
    path.write_text(write_yaml(keys) + text, encoding="utf-8")
    schedule = load_schedule(path)
    with pytest.raises(CachegraphError) as caught:
        make_rows(schedule, blocks(1))
    line = path.read_text(encoding="utf-8").splitlines().index("  steps: [3, 5]") + 1
    assert str(caught.value) == (
        f"{path}:{line}: the correction changes nothing: none of its steps reuses a value; "
        f"expected steps at which the policy reuses attn and mlp of one block; {end}"
    )


# --- routers as policy


def published_router(fresh: Numbers, runs: np.ndarray, drops: Sequence[int]) -> Numbers:
    """Run the masks as the published code does: features are dropped before some steps, and what
    is stored is what was used."""
    stored: list[float | None] = [None] * fresh.shape[1]
    result = np.zeros_like(fresh)
    for step, mask in enumerate(runs):
        for i in range(fresh.shape[1]):
            feature = None if step in drops else stored[i]
            result[step, i] = fresh[step, i] if mask[i] or feature is None else feature
            stored[i] = result[step, i]
    return result


@pytest.mark.parametrize("dropping", [True, False], ids=["l2c", "harmonica"])
def test_router_reuses_what_the_published_code_stored(tmp_path: Path, dropping: bool) -> None:
    runs = np.random.default_rng(3).random((12, 8)) < 0.5
    drops = range(0, 12, 2) if dropping else [0]
    runs[list(drops)] = True
    keys = asked({"method": "router", "file": mask_file(tmp_path, runs)}, 12)
    fresh = fresh_numbers(12, 8)
    found = used(rows_of(keys, blocks(4)), fresh)
    np.testing.assert_array_equal(found, published_router(fresh, runs, drops))


def test_router_leaves_cross_attention_alone(tmp_path: Path) -> None:
    runs = np.array([[True, True], [False, False]])
    keys = asked({"method": "router", "file": mask_file(tmp_path, runs)}, 2)
    sites = [site("b.attn", ATTN), site("b.cross", CROSS), site("b.mlp", MLP)]
    assert rows_of(keys, sites)[1] == (Reuse(0), Compute(), Reuse(0))


@pytest.mark.parametrize(("name", "steps", "most"), [("20", 20, 11), ("50", 50, 26)])
def test_published_routers_need_few_variants(
    shared: Path, name: str, steps: int, most: int
) -> None:
    file = str(shared / f"routers/DDIM{name}_router.pt")
    keys = asked({"method": "router", "file": file}, steps)
    plan = plan_of(keys, blocks(28))
    assert len(plan.variants) <= most
    assert plan.full_steps() >= steps // 2
    computed = sum(isinstance(a, Compute) for row in plan.rows for a in row)
    assert computed == {20: 872, 50: 2136}[steps]


def test_max_variants_lists_the_distinct_rows(tmp_path: Path) -> None:
    runs = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]) == 1
    path = tmp_path / "s.yaml"
    keys = asked({"method": "router", "file": mask_file(tmp_path, runs)}, 4, max_variants=2)
    path.write_text(write_yaml(keys), encoding="utf-8")
    schedule = load_schedule(path)
    with pytest.raises(CachegraphError) as caught:
        make_plan(
            blocks(2),
            make_rows(schedule, blocks(2)),
            max_variants=schedule.max_variants,
            place=schedule.where("max_variants"),
        )
    line = path.read_text(encoding="utf-8").splitlines().index("max_variants: 2") + 1
    assert str(caught.value) == (
        f"{path}:{line}: the schedule needs 3 variants; expected at most 2 (max_variants); found "
        "steps 0, 2: 4 compute; steps 1: 2 reuse, 2 compute; steps 3: 4 reuse; "
        "raise max_variants or make rows alike"
    )
