"""Calibration: what is measured, the schedules that follow, files and plots."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cachegraph.action import Compute, Forecast
from cachegraph.calibrate import (
    Calibration,
    calibrate,
    goc_steps,
    load_sampler,
    run_calibrate,
    smoothcache_lists,
    smoothcache_schedule,
)
from cachegraph.calibration_plot import plot_calibration
from cachegraph.errors import InputError
from cachegraph.plan import make_plan
from cachegraph.policies import make_rows
from cachegraph.schedule import load_schedule
from cachegraph.site import Site, SiteKind
from cachegraph.site_recorder import graph_with_values
from tests.models import one_thread  # noqa: F401
from tests.tiny import BATCH, TOKENS, WIDTH, tiny, traced

STEPS, DISTANCE = 6, 2
SITES = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")


def drift(model_fn: Callable[..., Tensor], seed: int, *, steps: int = STEPS) -> Tensor:
    """A trajectory whose state follows from the model's outputs, as a sampler's does."""
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = x - 0.2 * model_fn(x, torch.full((BATCH,), 10.0 - step))
    return x


def fails(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# --- what is measured


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules of the sites return, call by call, by hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in SITES}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, n=name: seen[n].append(out)
        )
        for name in SITES
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def measured() -> Calibration:
    return calibrate(tiny(), drift, STEPS, max_distance=DISTANCE, trajectories=3)


def test_errors_are_the_mean_relative_l1_changes(measured: Calibration) -> None:
    wanted = np.full((4, DISTANCE, STEPS), np.nan)
    runs = []
    for seed in range(3):
        with watched(tiny()) as seen, torch.no_grad():
            drift(tiny(), seed)
        runs.append(seen)
    for i, name in enumerate(SITES):
        for r in range(1, DISTANCE + 1):
            for s in range(STEPS - r):
                changes = [
                    float(
                        (run[name][s] - run[name][s + r]).abs().sum() / run[name][s + r].abs().sum()
                    )
                    for run in runs
                ]
                wanted[i, r - 1, s] = sum(changes) / 3
    np.testing.assert_allclose(measured.errors.numpy(), wanted, rtol=1e-5)
    assert [site.name for site in measured.sites] == list(SITES)
    assert 0.01 < wanted[0, 0, 0] < 10


def test_cosines_are_those_of_the_mean_changes(measured: Calibration) -> None:
    runs = []
    for seed in range(3):
        with watched(tiny()) as seen, torch.no_grad():
            drift(tiny(), seed)
        runs.append(seen)
    for i, name in enumerate(SITES):
        means = torch.stack([torch.stack(run[name]).double().mean(1) for run in runs])
        for step, newest, older in ((2, 1, 0), (4, 2, 1), (5, 3, 0)):
            change, before = (
                (means[:, a] - means[:, b]).flatten() for a, b in ((step, newest), (newest, older))
            )
            wanted = float(change @ before / change.norm() / before.norm())
            assert measured.cosine([i], step, newest, older) == pytest.approx(wanted, abs=1e-9)
    several = measured.cosine([0, 2], 3, 2, 1)
    single = [measured.cosine([i], 3, 2, 1) for i in (0, 2)]
    assert several == pytest.approx(sum(single) / 2)


def test_cosines_of_what_was_not_measured_are_refused() -> None:
    short = calibrate(tiny(), drift, STEPS, max_distance=1, trajectories=1)
    assert fails(short.cosine, [0], 5, 4, 1) == (
        "the changes between steps 1, 4 and 5 were not measured; expected steps at most 3 apart; "
        "calibrate with max_distance 2"
    )


def test_the_model_runs_as_it_is_and_is_not_changed() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results: list[Tensor] = []
    calibrate(model, lambda fn, seed: results.append(drift(fn, seed)), STEPS, trajectories=1)
    with torch.no_grad():
        assert torch.equal(results[0], drift(model, 0))
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_graph_returns_every_value_in_site_order() -> None:
    module = graph_with_values(traced())
    x, t = torch.randn(BATCH, TOKENS, WIDTH), torch.full((BATCH,), 3.0)
    with watched(tiny()) as seen, torch.no_grad():
        wanted = tiny()(x, t)
        found = module(x, t)
    assert torch.equal(found[0], wanted)
    assert len(found) == 5
    assert all(torch.equal(a, seen[name][0]) for a, name in zip(found[1:], SITES, strict=True))


def test_only_the_last_values_are_kept() -> None:
    kept: list[tuple[int, int]] = []

    def sampler(recorder: Any, seed: int) -> None:
        def counted(*args: Tensor) -> Tensor:
            out = recorder(*args)
            branch = recorder._branches[""]
            kept.append((len(branch.values), len(branch.means)))
            return out

        drift(counted, seed, steps=9)

    calibrate(tiny(), sampler, 9, max_distance=2, trajectories=2)
    assert kept == 2 * [(1, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (2, 6), (2, 6), (2, 6)]


def test_branches_are_trajectories_of_their_own() -> None:
    def sampler(recorder: Any, seed: int) -> None:
        x, y = (torch.randn(BATCH, TOKENS, WIDTH, generator=g) for g in [torch.Generator()] * 2)
        for step in range(STEPS):
            t = torch.full((BATCH,), 10.0 - step)
            with recorder.cache_context("cond"):
                x = x - 0.2 * recorder(x, t)
            with recorder.cache_context("uncond"):
                y = y - 0.2 * recorder(y, t)

    def one_of(which: int) -> Callable[[Any, int], Tensor]:
        def sampler(model_fn: Any, seed: int) -> Tensor:
            x = [torch.randn(BATCH, TOKENS, WIDTH, generator=g) for g in [torch.Generator()] * 2][
                which
            ]
            for step in range(STEPS):
                x = x - 0.2 * model_fn(x, torch.full((BATCH,), 10.0 - step))
            return x

        return sampler

    both = calibrate(tiny(), sampler, STEPS, trajectories=1)
    single = [calibrate(tiny(), one_of(i), STEPS, trajectories=1).errors for i in range(2)]
    assert not torch.allclose(single[0], single[1], equal_nan=True)
    torch.testing.assert_close(both.errors, (single[0] + single[1]) / 2, equal_nan=True)


def test_progress_is_told_after_every_call() -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(tiny(), drift, STEPS, trajectories=2, progress=lambda *one: told.append(one))
    assert told == [
        (f"trajectory {n} of 2", done, STEPS) for n in (1, 2) for done in range(1, STEPS + 1)
    ]


def test_samplers_that_do_not_fit_are_refused() -> None:
    remedy = (
        "set the number of steps to that of the sampler; where guidance makes calls of its own, "
        'put each into model.cache_context("cond") or ("uncond")'
    )
    start = "the sampler does not call the model once a step"
    assert fails(calibrate, tiny(), drift, 7) == (
        f"{start}; expected 7 calls, one a step; found 6; {remedy}"
    )
    assert fails(calibrate, tiny(), drift, 5) == (
        f"{start}; expected 5 calls, one a step; found more; {remedy}"
    )
    assert fails(calibrate, tiny(), lambda *_: None, 5) == (
        "the sampler does not call the model; expected 5 calls"
    )

    def growing(model_fn: Any, seed: int) -> None:
        for step in range(STEPS):
            batch = BATCH + (step > 2)
            model_fn(torch.zeros(batch, TOKENS, WIDTH), torch.zeros(batch))

    assert fails(calibrate, tiny(), growing, STEPS) == (
        "the sampler changes the shape of an input; expected (2, 4, 8) (2,); found (3, 4, 8) (3,); "
        "sample the same batch in every trajectory"
    )
    for keys, message in (
        ({"trajectories": 0}, "trajectories is too small; expected at least 1; found 0"),
        ({"max_distance": 0}, "max_distance is too small; expected at least 1; found 0"),
        ({"max_distance": 6}, "max_distance is too large; expected less than 6 steps; found 6"),
    ):
        assert fails(calibrate, tiny(), drift, 6, **keys) == message
    assert fails(calibrate, tiny(), drift, 1) == "steps is too small; expected at least 2; found 1"


# --- what follows: SmoothCache


def made(features: dict[str, Sequence[Sequence[float]]], max_distance: int = 3) -> Calibration:
    """A calibration of sites with these values, a vector a step."""
    sites = tuple(
        Site(name, SiteKind(name.rpartition(".")[2]), values=(), module=None, anchors=())
        for name in features
    )
    values = torch.tensor(list(features.values()), dtype=torch.float64)
    steps = values.shape[1]
    errors = torch.full((len(sites), max_distance, steps), torch.nan, dtype=torch.float64)
    products = torch.full((len(sites), 2 * max_distance + 2, steps), torch.nan).double()
    for s in range(steps):
        for k in range(min(products.shape[1], steps - s)):
            products[:, k, s] = (values[:, s] * values[:, s + k]).sum(-1)
            if 1 <= k <= max_distance:
                change = (values[:, s] - values[:, s + k]).abs().sum(-1)
                errors[:, k - 1, s] = change / values[:, s + k].abs().sum(-1)
    return Calibration(sites, steps, 1, errors, products)


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


def test_the_schedule_stands_alone_and_carries_the_curves(
    measured: Calibration, tmp_path: Path
) -> None:
    bound = float(measured.errors[:, 0].nanmean())
    schedule = smoothcache_schedule(measured, bound, model="tiny")
    path = tmp_path / "s.yaml"
    path.write_text(schedule.to_yaml(), encoding="utf-8")
    assert load_schedule(path) == schedule
    plan = make_plan(measured.sites, make_rows(load_schedule(path), measured.sites))
    lists = smoothcache_lists(measured, bound)
    for i, site in enumerate(measured.sites):
        computed = [int(isinstance(row[i], Compute)) for row in plan.rows]
        assert computed == lists[site.kind]
    assert any(0 in rule for rule in lists.values())
    block = schedule.calibration
    assert block is not None
    assert (block.model, block.trajectories, block.bound) == ("tiny", 3, bound)
    for kind, curves in block.errors:
        for curve, wanted in zip(curves, measured.curves(kind), strict=True):
            np.testing.assert_allclose(curve, wanted, rtol=1e-3)


# --- what follows: GOC


def test_goc_is_for_values_that_keep_their_direction() -> None:
    line = [[float(s), 1.0] for s in range(10)]
    turn = [[float(min(s, 10 - s)), 1.0] for s in range(10)]  # turns round at step 5
    zigzag = [[float(s % 2), 1.0] for s in range(10)]
    every_second = [1, 3, 5, 7, 9]
    assert goc_steps(made({"b.attn": line}), every_second) == (3, 5, 7, 9)
    assert goc_steps(made({"b.attn": zigzag}), range(2, 10)) == ()
    assert goc_steps(made({"b.attn": turn}), [2, 3, 4, 6, 8]) == (2, 3, 4, 8)


def test_goc_follows_the_newest_computed_steps() -> None:
    """Step 3 follows f(2) - f(0), as step 1 is reused; that is down, though f(2) - f(1) is up."""
    values = [[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.5, 1.0], [0.0, 1.0]]
    assert goc_steps(made({"b.attn": values}), [1, 3]) == (3,)
    assert goc_steps(made({"b.attn": values}), [3]) == ()


def test_goc_averages_over_the_sites_that_reuse() -> None:
    line = [[float(s), 1.0] for s in range(6)]
    zigzag = [[3.0 * (s % 2), 1.0] for s in range(6)]
    mostly = made({"a.attn": line, "b.attn": line, "c.mlp": zigzag})
    assert goc_steps(mostly, [3]) == (3,)
    assert goc_steps(mostly, {"attn": [3], "mlp": []}) == (3,)
    assert goc_steps(mostly, {"mlp": [3]}) == ()
    assert goc_steps(made({"a.attn": line, "b.mlp": zigzag, "c.mlp": zigzag}), [3]) == ()


def test_goc_leaves_out_steps_without_a_change_before() -> None:
    line = made({"b.attn": [[float(s), 1.0] for s in range(8)]})
    assert goc_steps(line, [1, 2]) == ()  # steps 0 and 1 use one value
    assert goc_steps(line, [2, 3, 4]) == (2, 3, 4)  # step 3 follows the correction of step 2
    bend = [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [2.0, 1.0], [3.0, 1.0]]
    assert goc_steps(made({"b.attn": bend}), [2, 3]) == ()  # at step 3 nothing has moved since 1


# --- as a command


def test_run_writes_schedule_and_plot(tmp_path: Path) -> None:
    out, plot = tmp_path / "s.yaml", tmp_path / "s.png"
    told: list[tuple[str, int, int]] = []
    schedule, measured = run_calibrate(
        "digits",
        out,
        steps=4,
        bound=0.9,
        trajectories=1,
        max_distance=2,
        plot=plot,
        progress=lambda *one: told.append(one),
    )
    assert load_schedule(out) == schedule
    text = out.read_text(encoding="utf-8")
    assert text.splitlines()[0] == (
        "# SmoothCache by relative L1 change for digits: measured over 1 trajectory of 4 steps, "
        "bound 0.9"
    )
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert told[-1] == ("trajectory 1 of 1", 4, 4)
    assert len(measured.sites) == 24
    assert schedule.correction is None


def test_run_adds_a_correction(tmp_path: Path) -> None:
    keys = {"sampler": "tests.test_calibrate:drift", "steps": STEPS, "trajectories": 1}
    out = tmp_path / "s.yaml"
    schedule, measured = run_calibrate("tests.tiny:tiny", out, bound=0.4, goc_weight=0.5, **keys)
    assert load_schedule(out) == schedule
    assert schedule.correction is not None
    assert schedule.correction.weight == 0.5
    rows = make_rows(schedule, measured.sites)
    corrected = {s for s, row in enumerate(rows) if any(isinstance(a, Forecast) for a in row)}
    assert corrected == set(schedule.correction.steps)
    assert corrected


def test_run_takes_any_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_calibrate.py").write_text(
        "from tests.test_calibrate import drift\nfrom tests.tiny import tiny\n"
        "def build(): return tiny()\n"
    )
    schedule, measured = run_calibrate(
        "mine_to_calibrate:build",
        Path("s.yaml"),
        sampler="mine_to_calibrate:drift",
        steps=STEPS,
        bound=5.0,
        trajectories=1,
    )
    assert schedule.steps == measured.steps == STEPS
    assert [site.name for site in measured.sites] == list(SITES)


def test_run_refuses_what_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.yaml"
    assert fails(run_calibrate, "tests.tiny:tiny", out) == (
        "tests.tiny:tiny: only the model digits has a sampler here; give --sampler "
        "module:function, a function of the model and a seed that samples one trajectory"
    )
    assert fails(run_calibrate, "digits", tmp_path / "s.json") == (
        f"{tmp_path}/s.json: schedules are written as YAML; expected a .yaml file"
    )
    assert fails(run_calibrate, "digits", tmp_path / "no/s.yaml") == (
        f"{tmp_path}/no: there is no such folder"
    )
    assert fails(run_calibrate, "digits", out, plot=tmp_path / "s.jpg") == (
        f"{tmp_path}/s.jpg: plots are written as PNG; expected a .png file"
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert fails(run_calibrate, "digits", out, plot=tmp_path / "s.png") == (
        "a plot needs matplotlib; pip install 'cachegraph[eval]', or leave out --plot"
    )
    assert not list(tmp_path.iterdir())


def test_run_says_when_a_bound_is_too_low(tmp_path: Path) -> None:
    keys = {"sampler": "tests.test_calibrate:drift", "steps": STEPS, "trajectories": 1}
    message = fails(run_calibrate, "tests.tiny:tiny", tmp_path / "s.yaml", bound=1e-6, **keys)
    start, _, rest = message.partition("; expected a bound of at least ")
    assert start == "at bound 1e-06 no step can reuse anything"
    least, _, end = rest.partition(", ")
    assert end == "the smallest change that was measured; raise --bound or take more steps"
    run_calibrate("tests.tiny:tiny", tmp_path / "s.yaml", bound=1.05 * float(least), **keys)


def test_samplers_are_found_by_name() -> None:
    assert load_sampler("tests.test_calibrate:drift").__name__ == "drift"
    assert fails(load_sampler, "drift") == "drift: not a sampler; expected module:function"
    assert fails(load_sampler, "no_such:drift") == (
        "no_such:drift: module 'no_such' cannot be imported; found No module named 'no_such'"
    )
    assert fails(load_sampler, "tests.test_calibrate:drif") == (
        "tests.test_calibrate:drif: module 'tests.test_calibrate' has no function 'drif'; "
        "expected a function of the model and a seed; did you mean 'drift'?"
    )


def test_plot_of_one_distance_and_no_bound(tmp_path: Path, measured: Calibration) -> None:
    path = tmp_path / "s.png"
    plot_calibration(measured, path)
    assert path.stat().st_size > 5000
