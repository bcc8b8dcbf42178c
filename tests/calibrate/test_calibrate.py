"""Calibration: what is measured of a model, and the command with its files and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cachegraph.calibrate.measure import (
    Calibration,
    calibrate,
    load_sampler,
)
from cachegraph.calibrate.plot import plot_calibration
from cachegraph.calibrate.recorder import graph_with_values
from cachegraph.errors import InputError
from tests.models import (
    DATA,
    build,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
    trajectory,
)
from tests.tiny import BATCH, STEPS, TOKENS, WIDTH, drift, tiny, traced

DISTANCE = 2
SITES = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")


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
    wanted = np.full((4, STEPS), np.nan)
    wanted[:, 2:] = 0
    for seed in range(3):
        with watched(tiny()) as seen, torch.no_grad():
            drift(tiny(), seed)
        for i, name in enumerate(SITES):
            means = torch.stack(seen[name]).double().mean(1).flatten(1)
            for s in range(2, STEPS):
                change, before = means[s] - means[s - 1], means[s - 1] - means[s - 2]
                wanted[i, s] += float(change @ before / change.norm() / before.norm()) / 3
    np.testing.assert_allclose(measured.cosines.numpy(), wanted, rtol=1e-6)
    assert np.nanmin(wanted) < np.nanmax(wanted) - 0.1


def test_directions_of_the_mean_over_all_trajectories(measured: Calibration) -> None:
    found = calibrate(tiny(), drift, STEPS, max_distance=DISTANCE, trajectories=3, average=True)
    total: dict[str, Tensor] = {}
    for seed in range(3):
        with watched(tiny()) as seen, torch.no_grad():
            drift(tiny(), seed)
        for name in SITES:
            means = torch.stack(seen[name]).double().mean(1).flatten(1)
            total[name] = total.get(name, torch.zeros(())) + means
    wanted = np.full((4, STEPS), np.nan)
    for i, name in enumerate(SITES):
        change = total[name].diff(dim=0)
        wanted[i, 2:] = torch.cosine_similarity(change[1:], change[:-1], dim=1)
    np.testing.assert_allclose(found.cosines.numpy(), wanted, rtol=1e-4)
    assert np.nanmax(np.abs(wanted - measured.cosines.numpy())) > 0.01
    assert torch.equal(found.errors.nan_to_num(), measured.errors.nan_to_num())


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
    kept: list[int] = []

    def sampler(recorder: Any, seed: int) -> None:
        def counted(*args: Tensor) -> Tensor:
            out = recorder(*args)
            kept.append(len(recorder._branches[""].values))
            return out

        drift(counted, seed, steps=9)

    calibrate(tiny(), sampler, 9, max_distance=2, trajectories=2)
    assert kept == 2 * [1, 2, 2, 2, 2, 2, 2, 2, 2]


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


@pytest.mark.filterwarnings("ignore")  # diffusers warns about itself
def test_sites_of_several_values_are_measured_as_one() -> None:
    pytest.importorskip("diffusers")
    config = read_configs(DATA / "diffusers_tiny.json")["FluxTransformer"]
    model = build(config)
    results: list[Any] = []

    def sampler(model_fn: Any, seed: int) -> None:
        results.extend(model_fn(**inputs) for inputs in trajectory(config, 3, seed=seed))

    measured = calibrate(model, sampler, 3, max_distance=2, trajectories=1)
    with torch.no_grad():
        for found, inputs in zip(results, trajectory(config, 3), strict=True):
            assert relative_error(found, model(**inputs)) == 0
    assert max(len(site.values) for site in measured.sites) == 2
    assert measured.errors[:, 0, :2].isfinite().all()
    assert (measured.errors[:, 0, :2] > 0.01).all()


# --- samplers and plots


def test_samplers_are_found_by_name() -> None:
    assert load_sampler("tests.tiny:drift").__name__ == "drift"
    assert fails(load_sampler, "drift") == "drift: not a sampler; expected module:function"
    assert fails(load_sampler, "no_such:drift") == (
        "no_such:drift: module 'no_such' cannot be imported; found No module named 'no_such'"
    )
    assert fails(load_sampler, "tests.tiny:drif") == (
        "tests.tiny:drif: module 'tests.tiny' has no function 'drif'; "
        "expected a function of the model and a seed; did you mean 'drift'?"
    )


def test_plot_of_one_distance_and_no_bound(tmp_path: Path, measured: Calibration) -> None:
    path = tmp_path / "s.png"
    plot_calibration(measured, path)
    assert path.stat().st_size > 5000
