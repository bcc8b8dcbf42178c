"""The Hermite forecast against a plain loop and against recordings of its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.polynomial.hermite import hermval
from safetensors.numpy import load_file

from cachegraph.errors import ScheduleError
from cachegraph.methods.hermite import Hermite
from cachegraph.methods.method import Ruled
from cachegraph.plan.action import Compute, Row
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule, presets
from tests.fake_sites import make_sites
from tests.methods.test_methods import used


def rows(steps: int, sites: int = 2, **keys: float) -> tuple[Row, ...]:
    model = make_sites(depth=sites // 2)
    made = Hermite(method="hermite", **keys)
    return made.make_rows(steps, Ruled(model, [site.name for site in model]))


def plain_loop(fresh: np.ndarray, full: set[int], order: int, sigma: float) -> np.ndarray:
    """The definition, counted up; the history begins with the last of two computed at first."""
    result, factors, last = np.zeros_like(fresh), [], 0
    for step, value in enumerate(fresh):
        if step not in full:
            result[step] = sum(
                factor
                * sigma**j
                * hermval(sigma * (step - last), [0] * j + [1])
                / math.factorial(j)
                for j, factor in enumerate(factors)
            )
            continue
        updated = [value]
        for old in factors[:order]:
            updated.append((updated[-1] - old) / (step - last))
        factors, last = updated, step
        result[step] = value
    return result


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(("interval", "order"), [(2, 1), (3, 2), (4, 3)])
def test_against_a_plain_loop(interval: int, order: int, sigma: float) -> None:
    made = rows(30, interval=interval, order=order, sigma=sigma, warmup=1)
    full = {step for step, row in enumerate(made) if row[0] == Compute()}
    fresh = np.random.default_rng(0).standard_normal((30, 2))
    wanted = plain_loop(fresh, full, order, sigma)
    np.testing.assert_allclose(used(made, fresh), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interval", [3, 5])
@pytest.mark.parametrize("order", [1, 2])
def test_against_the_recordings(shared: Path, interval: int, order: int) -> None:
    recorded = load_file(shared / "golden" / "forecasts.safetensors")
    name = f"hermite_n{interval}_o{order}"
    full = set(recorded[f"{name}.full_steps"].tolist())
    made = rows(50, sites=8, interval=interval, order=order)
    computed = {step for step, row in enumerate(made) if row[0] == Compute()}
    assert full - computed <= {49}  # recorded with a last step that is always full
    found = used(made, recorded["v"])
    agreed = [step for step in range(50) if step not in full - computed]
    np.testing.assert_allclose(found[agreed], recorded[f"{name}.forecast"][agreed], atol=1e-6)


def test_sigma_is_above_zero() -> None:
    keys = {"method": "hermite", "interval": 3, "sigma": 0.0}
    with pytest.raises(ScheduleError, match="'sigma' is too small; expected a number above 0"):
        load_schedule({"cachegraph": 1, "steps": 50, "policy": keys})


def test_the_preset_computes_as_its_comment_says() -> None:
    schedule = load_schedule("hermite-n3")
    sites = make_sites(depth=1)
    full = [row for row in make_rows(schedule, sites) if row == (Compute(),) * 2]
    assert f"computes {len(full)} of them" in presets()["hermite-n3"].read_text(encoding="utf-8")
