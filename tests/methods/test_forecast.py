"""Forecasts of every basis against plain loops of the published recursions, and recordings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import chebvander
from numpy.polynomial.hermite import hermval
from safetensors.numpy import load_file

from cachegraph.methods.bases import BASES
from cachegraph.methods.forecast import FullSteps
from cachegraph.plan.action import Compute, Forecast, Row, makes_value
from cachegraph.plan.plan import make_plan
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule
from tests.fake_sites import make_sites
from tests.methods.test_methods import used

STEPS = 30
LISTED = [0, 1, 2, 5, 6, 10, 13, 19, 20, 27]
Loop = Callable[[np.ndarray, Sequence[int], int], np.ndarray]


def rows(steps: int = STEPS, sites: int = 2, **keys: Any) -> tuple[Row, ...]:
    policy = {"method": "forecast", **keys}
    schedule = load_schedule({"cachegraph": 1, "steps": steps, "policy": policy})
    return make_rows(schedule, make_sites(depth=sites // 2))


def full_steps(made: Sequence[Row]) -> list[int]:
    return [step for step, row in enumerate(made) if row[0] == Compute()]


# --- plain loops, each with the state that the published code keeps


def differences_loop(factor: Callable[[int, int], float]) -> Loop:
    def loop(fresh: np.ndarray, full: Sequence[int], order: int) -> np.ndarray:
        result, factors, last = np.zeros_like(fresh), [], 0
        for step, value in enumerate(fresh):
            if step in full:
                updated = [value]
                for old in factors[:order]:
                    updated.append((updated[-1] - old) / (step - last))
                factors, last = updated, step
            parts = [factor(j, step - last) * one for j, one in enumerate(factors)]
            result[step] = value if step in full else sum(parts)
        return result

    return loop


def polynomial_loop(fresh: np.ndarray, full: Sequence[int], order: int) -> np.ndarray:
    """The polynomial through the last full steps, by numpy."""
    result = fresh.copy()
    for step in set(range(len(fresh))) - set(full):
        nodes = [s for s in full if s < step][-order - 1 :]
        for column in range(fresh.shape[1]):
            fitted = Polynomial.fit(nodes, fresh[nodes, column], len(nodes) - 1)
            result[step, column] = fitted(step)
    return result


def adams_loop(fresh: np.ndarray, full: Sequence[int], order: int) -> np.ndarray:
    """The last value and the slope's integral by Gauss' rule, which is exact for polynomials."""
    result = fresh.copy()
    points, weights = np.polynomial.legendre.leggauss(8)
    for step in set(range(len(fresh))) - set(full):
        nodes = [s for s in full if s < step]
        slopes = [(fresh[b] - fresh[a]) / (b - a) for a, b in pairwise(nodes)]
        result[step] = fresh[nodes[-1]]
        at, known = nodes[1:][-order:], slopes[-order:]
        half = (step - nodes[-1]) / 2
        for column in range(fresh.shape[1] if known else 0):
            slope = Polynomial.fit(at, [k[column] for k in known], len(at) - 1)
            area = half * (weights * slope(nodes[-1] + half * (points + 1))).sum()
            result[step, column] += area
    return result


def foca_loop(fresh: np.ndarray, full: Sequence[int], order: int) -> np.ndarray:
    """The state of cache-dit's class: two anchors, and two rolling values."""
    result = np.zeros_like(fresh)
    anchor = before = newest = older = None
    last = 0
    for step, value in enumerate(fresh):
        if step in full:
            before, anchor, last = anchor, value, step
            made = value
        elif before is None or older is None:
            made = anchor
        else:
            e = step - last
            made = anchor + min(e, 3) / 2 * ((anchor - before) + (newest - older))
            if e > 3:
                made = anchor + 3 / e * (made - anchor)
        older, newest, result[step] = newest, made, made
    return result


def chebyshev_loop(fresh: np.ndarray, full: Sequence[int], order: int) -> np.ndarray:
    result = fresh.copy()
    for step in set(range(len(fresh))) - set(full):
        nodes = np.array([s for s in full if s < step])
        x, at = chebvander((nodes - 25) / 25, order), chebvander((step - 25) / 25, order)
        kept = np.linalg.inv(x.T @ x + 0.1 * np.eye(order + 1)) @ x.T @ fresh[nodes]
        result[step] = at @ kept
    return result


LOOPS: dict[str, Loop] = {
    "taylor": differences_loop(lambda j, x: x**j / math.factorial(j)),
    "hermite": differences_loop(
        lambda j, x: 0.5**j * hermval(0.5 * x, [0] * j + [1]) / math.factorial(j)
    ),
    "lagrange": polynomial_loop,
    "adams": adams_loop,
    "foca": foca_loop,
    "chebyshev": chebyshev_loop,
}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("basis", BASES)
def test_against_a_plain_loop(basis: str, order: int) -> None:
    keys = {} if BASES[basis].order is None else {"order": order}
    made = rows(basis=basis, full_steps=LISTED, **keys)
    assert full_steps(made) == LISTED
    fresh = np.random.default_rng(order).standard_normal((STEPS, 2))
    wanted = LOOPS[basis](fresh, LISTED, order)
    np.testing.assert_allclose(used(made, fresh), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("basis", BASES)
def test_a_straight_line_goes_on(basis: str) -> None:
    """What every basis but a ridge and scaled polynomials has in common, from two full steps on."""
    made = rows(basis=basis, full_steps=[0, 3, 6, 9, 10, 14])
    line = np.linspace(0, 1, STEPS)[:, None] * np.array([[1.0, -2.0]])
    found = used(made, line)
    exact = {"taylor", "lagrange", "adams"}
    assert np.allclose(found[3:], line[3:]) == (basis in exact)
    assert all(len(set(row)) == 1 for row in made)


RECORDED = {
    "foca_n3": {"basis": "foca"},
    "foca_n5": {"basis": "foca"},
    "hermite_n3_o1": {"basis": "hermite", "order": 1},
    "hermite_n3_o2": {"basis": "hermite", "order": 2},
    "hermite_n5_o1": {"basis": "hermite", "order": 1},
    "hermite_n5_o2": {"basis": "hermite", "order": 2},
    "spectrum_ws2_a075": {
        "basis": "chebyshev",
        "full_steps": {"window": 2.0, "growth": 0.75, "warmup": 5},
    },
    "spectrum_ws2_a3": {
        "basis": "chebyshev",
        "full_steps": {"window": 2.0, "growth": 3.0, "warmup": 5},
    },
    "spectrum_blend05": {
        "basis": "chebyshev",
        "blend": 0.5,
        "full_steps": {"window": 2.0, "growth": 0.75, "warmup": 5},
    },
}


@pytest.mark.parametrize("name", RECORDED)
def test_against_the_recordings(shared: Path, name: str) -> None:
    recorded = load_file(shared / "golden" / "forecasts.safetensors")
    listed = recorded[f"{name}.full_steps"].tolist()
    made = rows(50, sites=8, **{"full_steps": listed, **RECORDED[name]})
    assert full_steps(made) == listed
    tolerance = 2e-5 if name.startswith("spectrum") else 1e-6
    np.testing.assert_allclose(
        used(made, recorded["v"]), recorded[f"{name}.forecast"], rtol=0, atol=tolerance
    )


# --- which steps are full


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({"interval": 4, "warmup": 2}, [0, 1, 5, 9, 13, 17]),
        ({"interval": 5}, [0, 5, 10, 15]),
        ({"window": 3.0}, [0, 3, 6, 9, 12, 15, 18]),
        ({"window": 2.0, "growth": 0.75, "warmup": 3}, [0, 1, 2, 4, 6, 9, 13, 18]),
        ({"window": 2.5, "growth": 10.0, "warmup": 30}, list(range(20))),
    ],
)
def test_rules_for_full_steps(rule: dict[str, Any], wanted: list[int]) -> None:
    assert FullSteps(**rule).steps(20) == wanted


def test_intervals_are_those_of_taylorseer() -> None:
    """The same steps, the same weights, the history of its warmup included."""
    mine = rows(basis="taylor", order=2, full_steps={"interval": 4, "warmup": 3})
    keys = {"method": "taylorseer", "interval": 4, "warmup": 3, "order": 2}
    schedule = load_schedule({"cachegraph": 1, "steps": STEPS, "policy": keys})
    assert mine == make_rows(schedule, make_sites(depth=1))
    listed = rows(basis="taylor", order=2, full_steps=full_steps(mine))
    assert listed != mine  # nothing of a list is a warmup
    assert rows(basis="taylor", order=2, full_steps=full_steps(mine), since=1) == mine


def test_foca_keeps_few_values() -> None:
    """Its recursion runs over what was used, so no more than four values live."""
    made = rows(basis="foca", full_steps=list(range(0, STEPS, 5)))
    assert max(make_plan(make_sites(depth=1), made).history_depths()) <= 4
    forecasts = [row[0] for row in made if isinstance(row[0], Forecast)]
    assert all(makes_value(action) for action in forecasts)


def test_history_limits_the_ridge() -> None:
    made = rows(basis="chebyshev", history=3, full_steps=LISTED)
    counts = {len(row[0].sources) for row in made if isinstance(row[0], Forecast)}
    assert counts == {3}
