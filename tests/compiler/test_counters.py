"""The published code's way of counting FLOPs gives the published totals."""

from __future__ import annotations

from typing import Any

import pytest

from cachegraph.compiler.counters import toca_flops
from cachegraph.errors import PlanError
from cachegraph.plan.action import Compute, Refresh, Reuse
from cachegraph.schedule.rows import make_rows
from tests.fake_sites import DIT, PIXART, flux_sites, make, make_site, make_sites

FULL = 474_705_624_064  # one forward of DiT-XL/2 at 256 px, batch of 2


def flops(steps: int, *, stack: bool = False, **policy: Any) -> tuple[int, ...]:
    sites = make_sites(stack=stack)
    return toca_flops(make_rows(make(steps, **policy), sites), sites, batch=2, heads=16)


def test_uncached() -> None:
    assert flops(2, method="full") == (FULL, FULL)
    assert round(250 * FULL / 1e12, 3) == 118.676


@pytest.mark.parametrize(
    ("steps", "policy", "total"),
    [
        (250, {"interval": 4, "ratio_schedule": "ddpm250"}, 43_420574_210048),
        (250, {"interval": 1, "ratio_schedule": "ddpm250"}, 103_549585_270784),
        (50, {"interval": 3, "ratio_schedule": "ddim50"}, 10_232809_588736),
    ],
)
def test_published_totals(steps: int, policy: dict[str, Any], total: int) -> None:
    assert sum(flops(steps, method="toca", fresh_ratio=0.07, **policy)) == total


@pytest.mark.parametrize(
    ("steps", "policy", "total"),
    [
        (250, {"interval": 4, "ratio_schedule": "ddpm250"}, 44.2604),
        (250, {"interval": 1, "ratio_schedule": "ddpm250"}, 103.9534),
        (50, {"interval": 3, "ratio_schedule": "ddim50"}, 11.1252),
    ],
)
def test_totals_without_mixed_steps(steps: int, policy: dict[str, Any], total: float) -> None:
    counted = flops(steps, method="toca", fresh_ratio=0.07, quirks=False, **policy)
    assert round(sum(counted) / 1e12, 4) == total


def test_published_ratio_of_duca() -> None:
    total = sum(flops(50, method="duca", interval=3, fresh_ratio=0.05, stack=True))
    assert round(total / 1e12, 3) == 9.575
    assert round(50 * FULL / total, 2) == 2.48


@pytest.mark.parametrize(("interval", "ratio"), [(4, 2.94), (5, 3.30), (6, 3.76)])
def test_published_ratios_of_flux(interval: int, ratio: float) -> None:
    """FLUX.1-dev at 1024 px: 3719.5 T over 50 steps, and what ToCa leaves of it."""
    sites = flux_sites()
    rows = make_rows(make(50, method="toca", rules="flux", interval=interval), sites)
    total = sum(toca_flops(rows, sites, batch=1, heads=24))
    [full] = toca_flops(make_rows(make(1, method="full"), sites), sites, batch=1, heads=24)
    assert 50 * full / 1e12 == pytest.approx(3719.5, rel=1e-3)
    assert 50 * full / total == pytest.approx(ratio, rel=3e-3)


def test_what_a_step_counts() -> None:
    sites = make_sites(stack=True)
    reused = Reuse(0)
    computed, kept = (Compute(),) * 57, (*(reused,) * 56, Compute())
    skipped, mixed = (reused,) * 57, (Compute(), Compute(), *(reused,) * 55)
    partial = (reused, Refresh(0, 3, 0, 0), *(reused,) * 54, Compute())
    full, none, some, skip, one = toca_flops(
        (computed, kept, partial, skipped, mixed), sites, batch=2, heads=16
    )
    assert (full, skip, one) == (FULL, 0, FULL // 28)
    assert none == 28 * (2 * 1152 + 6 * 2 * 1152**2 + 2 * 2 * 256 * 1152)
    assert some - none == 16 * 2 * 3 * 1152**2 + 24 * 2 * 3 * 1152


def test_other_models_are_refused() -> None:
    sites = make_sites(PIXART)
    with pytest.raises(PlanError, match="does not fit the model; expected blocks of one attn"):
        toca_flops([(Compute(),) * 84], sites, batch=2, heads=16)
    odd = [make_site(f"b.{kind}", kind, "s1", 8) for kind in DIT]
    with pytest.raises(PlanError, match=r"b.mlp: .* found f32\[s0, s1, 8\]"):
        toca_flops([(Compute(),) * 2], odd, batch=2, heads=16)
