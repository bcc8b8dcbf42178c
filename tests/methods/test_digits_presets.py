"""The presets calibrated on digits: what they compute, and what they gain over plain reuse."""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import pytest
from torch import Tensor

from cachegraph.compiler import pipeline
from cachegraph.compiler.compile import assemble, build
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Compute
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import Schedule, load_schedule, presets
from cachegraph.zoo import load_digits_model, sample_digits
from cachegraph.zoo.digits_quality import psnr
from tests.models import one_thread  # noqa: F401

LABELS = (3, 8)
# Steps that a site computes on average.
COMPUTED = {
    "digits-smoothcache": Fraction(35, 2),
    "digits-goc": Fraction(18),
    "digits-harmonica-10": Fraction(143, 24),
    "digits-harmonica-20": Fraction(279, 24),
    "digits-taylorseer": Fraction(18),
}
GAIN = {"digits-goc": 5.0, "digits-taylorseer": 6.0}  # dB over fora-n3


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    model = load_digits_model()
    return trace(model, *model.example_inputs(2 * len(LABELS)), dynamic_batch=False)


def test_every_preset_of_digits_is_listed_here() -> None:
    assert {name for name in presets() if name.startswith("digits")} == set(COMPUTED)


@pytest.mark.parametrize(("name", "computed"), [*COMPUTED.items(), ("fora-n3", Fraction(18))])
def test_presets_compute_as_much_as_fora(
    traced: TracedModel, name: str, computed: Fraction
) -> None:
    rows = make_rows(load_schedule(name), traced.sites)
    runs = sum(isinstance(action, Compute) for row in rows for action in row)
    assert Fraction(runs, len(traced.sites)) == computed


def sampled(schedule: Schedule, traced: TracedModel) -> Tensor:
    """Two images of the same noise, through the graphs of the schedule."""
    with mock.patch.object(pipeline, "verify"):  # takes most of the time
        built = build(load_digits_model(), schedule, traced=traced)
    return sample_digits(assemble(built, "eager").runner(), LABELS, seed=7)


def test_forecasts_and_corrections_are_closer_than_reuse(traced: TracedModel) -> None:
    uncached = sample_digits(load_digits_model(), LABELS, seed=7)
    reuse = psnr(sampled(load_schedule("fora-n3"), traced), uncached)
    assert reuse > 30
    for name, gain in GAIN.items():
        found = psnr(sampled(load_schedule(name), traced), uncached)
        assert found > reuse + gain, f"{name}: {found:.1f} dB, fora-n3: {reuse:.1f} dB"
