"""What follows from measured changes: SmoothCache lists, schedules, and GOC's steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachegraph.calibrate.result import (
    Calibration,
    goc_steps,
    smoothcache_lists,
    smoothcache_schedule,
)
from cachegraph.methods.method import resolve
from cachegraph.model.site import Site, SiteKind
from cachegraph.plan.action import Compute, Row
from cachegraph.plan.plan import make_plan
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule


def made(features: dict[str, Sequence[Sequence[float]]], max_distance: int = 3) -> Calibration:
    """A calibration of sites with these values, a vector a step."""
    sites = tuple(
        Site(name, SiteKind(name.rpartition(".")[2]), values=(), module=None, anchors=())
        for name in features
    )
    values = torch.tensor(list(features.values()), dtype=torch.float64)
    steps = values.shape[1]
    errors = torch.full((len(sites), max_distance, steps), torch.nan, dtype=torch.float64)
    for s in range(steps):
        for k in range(1, min(max_distance, steps - s - 1) + 1):
            change = (values[:, s] - values[:, s + k]).abs().sum(-1)
            errors[:, k - 1, s] = change / values[:, s + k].abs().sum(-1)
    cosines = torch.full((len(sites), steps), torch.nan, dtype=torch.float64)
    changes = values.diff(dim=1)
    cosines[:, 2:] = torch.cosine_similarity(changes[:, 1:], changes[:, :-1], dim=-1)
    return Calibration(sites, steps, 1, errors, cosines)


def reusing(calibration: Calibration, steps: dict[str, Sequence[int]]) -> tuple[Row, ...]:
    """Rows that reuse the sites of a kind at its steps."""
    table = [
        [s not in steps.get(site.kind, ()) for site in calibration.sites]
        for s in range(calibration.steps)
    ]
    return resolve(table)


def published_scan(rows: Sequence[Sequence[float]], steps: int, threshold: float) -> list[int]:
    """A transcription of ``calibration_helper.py``'s scan."""
    schedule: list[int | None] = [None] * steps
    i = 0
    while i < steps:
        found = False
        for row in range(len(rows) - 1, -1, -1):
            if i >= len(rows[row]):
                continue
            if rows[row][i] <= threshold:
                schedule[i] = 1
                for skip in range(1, row + 2):
                    if i + skip < steps:
                        schedule[i + skip] = 0
                i += row + 2
                found = True
                break
        if not found:
            schedule[i] = 1
            i += 1
    schedule[0] = schedule[-1] = 1
    return [1 if one is None else one for one in schedule]


@given(st.integers(0, 10_000), st.integers(2, 24), st.floats(0, 1.2))
def test_lists_are_those_of_the_published_scan(seed: int, steps: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = min(3, steps - 1)
    errors = torch.rand(4, distances, steps, generator=generator, dtype=torch.float64)
    for r in range(distances):
        errors[:, r, steps - r - 1 :] = torch.nan
    kinds = (SiteKind.ATTN, SiteKind.MLP) * 2
    sites = tuple(Site(f"b.{i}", kind, (), None, ()) for i, kind in enumerate(kinds))
    lists = smoothcache_lists(Calibration(sites, steps, 1, errors, torch.empty(0)), bound)
    assert set(lists) == {"attn", "mlp"}
    for kind, first in (("attn", 0), ("mlp", 1)):
        mean = ((errors[first] + errors[first + 2]) / 2).numpy()
        rows = [list(mean[r, : steps - r - 1]) for r in range(distances)]
        assert lists[kind] == published_scan(rows, steps, bound)
        assert lists[kind][0] == lists[kind][-1] == 1


def test_lists_at_the_ends_of_bounds() -> None:
    still = made({"blocks.0.attn": [[1.0]] * 10, "blocks.0.mlp": [[2.0**-s] for s in range(10)]})
    assert smoothcache_lists(still, 0.0) == {
        "attn": [1, 0, 0, 0, 1, 0, 0, 0, 1, 1],
        "mlp": [1] * 10,
    }
    assert smoothcache_lists(still, 1.0)["mlp"] == [1, 0, 1, 0, 1, 0, 1, 0, 1, 1]
    assert smoothcache_lists(still, math.inf)["mlp"] == [1, 0, 0, 0, 1, 0, 0, 0, 1, 1]


def test_the_schedule_stands_alone_and_carries_the_curves(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((4, 12, 5)).cumsum(1) + 9
    names = [f"blocks.{b}.{kind}" for b in range(2) for kind in ("attn", "mlp")]
    measured = made(dict(zip(names, numbers.tolist(), strict=True)))
    bound = float(measured.errors.nanmean())
    schedule = smoothcache_schedule(measured, bound, model="tiny")
    path = tmp_path / "s.yaml"
    path.write_text(schedule.to_yaml(), encoding="utf-8")
    assert load_schedule(path) == schedule
    plan = make_plan(measured.sites, make_rows(load_schedule(path), measured.sites))
    lists = smoothcache_lists(measured, bound)
    for i, site in enumerate(measured.sites):
        computed = [int(isinstance(row[i], Compute)) for row in plan.rows]
        assert computed == lists[site.kind]
        assert 0 in computed
    assert lists["attn"] != lists["mlp"]
    block = schedule.calibration
    assert block is not None
    assert (block.model, block.trajectories, block.bound) == ("tiny", 1, bound)
    for kind, curves in block.errors:
        for curve, wanted in zip(curves, measured.curves(kind), strict=True):
            np.testing.assert_allclose(curve, wanted, rtol=1e-3)


# --- GOC


def test_goc_is_for_values_that_keep_their_direction() -> None:
    line = [[float(s), 1.0] for s in range(10)]
    turn = [[float(min(s, 10 - s)), 1.0] for s in range(10)]  # turns round at step 5
    zigzag = [[float(s % 2), 1.0] for s in range(10)]
    still = [[1.0, 1.0]] * 10
    for values, reused, wanted in (
        (line, [1, 3, 5, 7, 9], (3, 5, 7, 9)),
        (zigzag, range(1, 10), ()),
        (still, range(1, 10), ()),
        (turn, [2, 3, 5, 6, 7, 9], (2, 3, 5, 7, 9)),
    ):
        measured = made({"b.attn": values})
        assert goc_steps(measured, reusing(measured, {"attn": reused})) == wanted


def test_goc_averages_over_the_sites_that_reuse() -> None:
    line = [[float(s), 1.0] for s in range(6)]
    zigzag = [[3.0 * (s % 2), 1.0] for s in range(6)]
    mostly = made({"a.attn": line, "b.attn": line, "c.mlp": zigzag})
    for steps, wanted in (
        ({"attn": [3], "mlp": [3]}, (3,)),
        ({"attn": [3]}, (3,)),
        ({"mlp": [3]}, ()),
    ):
        assert goc_steps(mostly, reusing(mostly, steps)) == wanted
    hardly = made({"a.attn": line, "b.mlp": zigzag, "c.mlp": zigzag})
    assert goc_steps(hardly, reusing(hardly, {"attn": [3], "mlp": [3]})) == ()
