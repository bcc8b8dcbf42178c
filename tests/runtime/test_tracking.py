"""Which step a call is: what a whole trajectory teaches, steps that are said, timesteps at load."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import cachegraph as cg
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.tracking import Track
from tests.models import (
    Call,
    Compiled,
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    play,
    refused,
    same,
)
from tests.tiny import call, tiny, traced

STEPS = 6
TIMES = [900, 800, 700, 600, 500, 400]
SIGMAS = [14.6, 9.87, 3.21, 1.05, 0.31, 0.03]
RISING = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(STEPS)


@pytest.fixture
def run(compiled: Compiled) -> cg.Runner:
    return compiled.runner()


def image(seed: int, times: Sequence[float] = TIMES) -> list[Call]:
    calls = zip(times, dit_steps(len(times), seed=seed), strict=True)
    y = dit_steps(1)[0][2]  # the same class for all, so that it cannot tell images apart
    return [(x, torch.full_like(t, time), y) for time, (x, t, _) in calls]


# --- an aborted image, and what the one before taught


@pytest.mark.parametrize("at", [1, 3])
def test_an_aborted_image_is_not_continued_by_one_that_begins_lower(
    compiled: Compiled, run: cg.Runner, at: int
) -> None:
    play(run, image(1))
    found = play(run, image(2)[:at])
    second = image(3, [TIMES[at] - 50, *range(300, 290, -2)])
    refused(
        lambda: run(*second[0]),
        f"step {at - 1}: timestep {TIMES[at] - 50} is not the next one of the trajectory before",
        f"expected step {at} (timestep {TIMES[at]}), or step 0 (timestep 900) for a new trajectory",
        "call reset() if",
        "timesteps=[...]",
        "step=s",
    )
    # Nothing was lost, and the remedy works.
    assert same([*found, *play(run, image(2)[at:])], compiled.wanted(image(2)))
    with pytest.warns(UserWarning, match=f"ended after {at} of 6 steps"):
        play(run, image(2)[:at]), run(*image(3)[0])
    run.reset()
    assert same(play(run, second), compiled.wanted(second))


def test_the_reference_refuses_it_too(compiled: Compiled) -> None:
    run = cg.ReferenceRunner(compiled.model, fora(STEPS, 3))
    play(run, image(1))
    run(*image(2)[0])
    refused(lambda: run(*image(3, [650])[0]), "timestep 650 is not the next one")


@pytest.mark.parametrize("first", [650, 950])
def test_a_sampler_that_is_set_otherwise_begins_at_another_timestep(
    compiled: Compiled, run: cg.Runner, first: int
) -> None:
    for times in (TIMES, [first, *TIMES[3:], 300, 200], TIMES):
        for seed in (1, 2):
            calls = image(seed, times)
            assert same(play(run, calls), compiled.wanted(calls))


def test_time_that_goes_back_begins_anew_also_at_another_timestep(
    compiled: Compiled, run: cg.Runner
) -> None:
    play(run, [*image(1), *image(2)[:4]])
    calls = image(3, [time + 50 for time in TIMES])
    with pytest.warns(UserWarning, match="ended after 4 of 6 steps"):
        assert same(play(run, calls), compiled.wanted(calls))


@pytest.mark.parametrize("times", [SIGMAS, RISING])
def test_fractional_timesteps_are_learned(times: list[float]) -> None:
    order = "ascending" if times is RISING else "descending"
    run = cg.load(compile_traced(tiny(), traced(), fora(STEPS, 3, order=order)))
    calls = [(call(step)[0], torch.full((2,), time)) for step, time in enumerate(times)]
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            for x, t in calls:
                run(x, t)
    for x, t in calls[:2]:
        run(x, t)
    x, t = calls[3]
    refused(
        lambda: run(x, t),
        f"is not the next one of the trajectory before; expected step 2 (tim"
        f"estep {times[2]:g}), or step 0 (timestep {times[0]:g})",
    )


def test_a_first_step_that_failed_forgets_nothing(
    run: cg.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(run, image(1))
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*image(2)[0])
    run(*image(2)[0])
    refused(lambda: run(*image(3, [650])[0]), "expected step 1 (timestep 800)")


def test_branches_learn_by_themselves(compiled: Compiled, run: cg.Runner) -> None:
    lower = [time - 25 for time in TIMES]
    for _ in range(2):
        for cond, uncond in zip(image(1), image(2, lower), strict=True):
            with run.cache_context("cond"):
                run(*cond)
            with run.cache_context("uncond"):
                run(*uncond)
    with run.cache_context("uncond"):
        run(*image(2, lower)[0])
        refused(lambda: run(*image(2)[2]), "expected step 1 (timestep 775)")


# --- steps that are said


def test_an_image_by_timesteps_after_one_by_steps(compiled: Compiled, run: cg.Runner) -> None:
    gc.collect()  # what earlier sessions left unfinished is told then
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", "the latent of step 1")  # these have nothing in common
        for seed in (1, 2):
            found = [run(*call, step=step) for step, call in enumerate(image(seed))]
            assert same(found, compiled.wanted(image(seed)))
            assert same(play(run, image(seed)), compiled.wanted(image(seed)))


def test_an_aborted_image_by_steps_is_not_continued_either(
    compiled: Compiled, run: cg.Runner
) -> None:
    play(run, image(1))
    for step in range(2):
        run(*image(2)[step], step=step)
    refused(lambda: run(*image(3, [650])[0]), "expected step 2 (timestep 700), or step 0 (timeste")
    with pytest.warns(UserWarning, match="ended after 2 of 6 steps"):
        assert same(play(run, image(3)), compiled.wanted(image(3)))


def test_steps_of_numpy(compiled: Compiled, run: cg.Runner) -> None:
    calls = image(1)
    found = [run(*call, step=step) for step, call in zip(np.arange(STEPS), calls, strict=True)]
    assert same(found, compiled.wanted(calls))
    for step in (np.bool_(True), np.float64(1), np.int64(6), "1", [0]):
        refused(lambda step=step: run(*calls[0], step=step), "no such step; expected 0 to 5")


# --- samplers that call a timestep twice


def test_a_sampler_that_repeats_timesteps_is_told_what_to_do(compiled: Compiled) -> None:
    times = [900, 800, 800, 700, 700, 600]
    ways = ("track='count' or step=",)
    for said in ({}, {"timesteps": TIMES}):
        run = compiled.runner(**said)
        play(run, image(1, times)[:2])
        refused(lambda run=run: run(*image(1, times)[2]), "cache_context('cond')", *ways)
    refused(lambda: cg.load(compiled.artifact(), timesteps=times), "found 800 after 800", *ways)
    run = cg.load(compiled.artifact(), track="count")
    assert same(play(run, image(1, times)), compiled.wanted(image(1, times)))


# --- timesteps at load


def test_timesteps_given_at_load_are_checked(compiled: Compiled) -> None:
    artifact = compiled.artifact()

    def refused_times(given: list[float], *parts: str, of: cg.Artifact = artifact) -> None:
        what = "the timesteps do not fit the schedule; expected 6 finite numbers that"
        refused(lambda: cg.load(of, timesteps=given), what, *parts)

    refused_times(TIMES[:-1], "fall, one a step", "found 5")
    refused_times(TIMES[::-1], "fall", "found 500 after 400", "order:")
    refused_times([*TIMES[:-1], TIMES[-2]], "found 500 after 500")
    refused_times([*TIMES[:-1], float("nan")], "found nan")
    refused_times(TIMES, "rise", "found 800 after 900", of=compiled.artifact(order="ascending"))
    assert cg.load(artifact, timesteps=torch.tensor(TIMES)).program.timesteps == tuple(TIMES)
    assert artifact.program.timesteps is None  # the artifact itself is as it was
    x, t, y = image(1)[0]
    run = cg.load(artifact, timesteps=TIMES)
    refused(lambda: run(x, t - 5, y), "timestep 895 is not one of the schedule's", "nearest 900")


@pytest.mark.parametrize("track", ["count", "timestep"])
def test_whole_timesteps_are_rounded_not_cut_off(compiled: Compiled, track: Track) -> None:
    artifact = compiled.artifact()
    before = Prologues.of(artifact.program, artifact.prologues, batched=True)

    def runner(shift: float) -> cg.Runner:
        times = [time + shift for time in TIMES]
        return cg.Runner(
            artifact.program, artifact.graphs, artifact.weights, track, before, timesteps=times
        )

    for shift in (0.0, -5e-5, 5e-5):
        assert same(play(runner(shift), image(1)), compiled.wanted(image(1)))
    for shift in (-0.1, 0.02, 0.5):
        refused(
            lambda shift=shift: runner(shift),
            "input 't' takes whole timesteps; expected i64[",
            f"found {900 + shift}",
        )
