"""Calls that fit the trajectory, and calls that do not: sessions, branches, steps, memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import SessionError
from cachegraph.plan.plan import Plan
from cachegraph.runtime.known import Prologues
from tests.models import (
    Call,
    Compiled,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    play,
    refused,
    same,
    tiny_dit,
)

STEPS = 10
TIMES = [1000 - 15 * (step + 1) for step in range(STEPS)]  # of dit_steps


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(STEPS)


@pytest.fixture
def run(compiled: Compiled) -> cg.Runner:
    return compiled.runner()


def image(seed: int, steps: int = STEPS, batch: int = 2) -> list[Call]:
    return dit_steps(steps, batch=batch, seed=seed)


# --- one image after another


def test_a_second_image(compiled: Compiled, run: cg.Runner) -> None:
    for seed in (1, 2, 3):
        assert same(play(run, image(seed)), compiled.wanted(image(seed)))


@pytest.mark.parametrize("at", [0, 7])
def test_an_aborted_image_does_not_leak_into_the_next(
    compiled: Compiled, run: cg.Runner, at: int
) -> None:
    play(run, image(1)[: at + 1])
    second = image(2)
    with pytest.warns(UserWarning, match=f"the last one ended after {at + 1} of 10 steps"):
        first = run(*second[0])
    assert same([first, *play(run, second[1:])], compiled.wanted(second))


def test_reset(compiled: Compiled, run: cg.Runner) -> None:
    play(run, image(1)[:5])
    with run.cache_context("uncond"):
        play(run, image(1)[:5])
    assert run.cache_bytes() > 0
    run.reset()
    assert run.cache_bytes() == 0
    assert same(play(run, image(2)), compiled.wanted(image(2)))  # and no warning
    with run.cache_context("uncond"):
        assert same(play(run, image(2)), compiled.wanted(image(2)))


def test_another_batch_in_the_next_image(compiled: Compiled, run: cg.Runner) -> None:
    for batch in (2, 3, 1):
        calls = image(batch, batch=batch)
        assert same(play(run, calls), compiled.wanted(calls))


# --- several at a time


def test_interleaved_sessions(compiled: Compiled, run: cg.Runner) -> None:
    images = [image(1), image(2, batch=3)]
    sessions = [run.session(), run.session()]
    found: list[list[Tensor]] = [[], []]
    for calls in zip(*images, strict=True):
        for outputs, session, call in zip(found, sessions, calls, strict=True):
            outputs.append(session(*call))
    for outputs, calls in zip(found, images, strict=True):
        assert same(outputs, compiled.wanted(calls))
    assert same(play(run, image(3)), compiled.wanted(image(3)))  # the runner's own is apart


def test_sessions_in_threads(compiled: Compiled, run: cg.Runner) -> None:
    together = threading.Barrier(2)

    def sample(thread: int) -> list[list[Tensor]]:
        session, found = run.session(), []
        for number in range(5):
            together.wait(timeout=60)
            found.append(play(session, image(10 * thread + number)))
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(sample, (0, 1)))
    for thread, images in enumerate(results):
        for number, outputs in enumerate(images):
            assert same(outputs, compiled.wanted(image(10 * thread + number)))


def test_two_models_in_one_process(compiled: Compiled, run: cg.Runner) -> None:
    other = Compiled(STEPS, seed=5)
    run_other = other.runner(interval=2)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for call in image(1):
        found[0].append(run(*call))
        found[1].append(run_other(*call))
    assert same(found[0], compiled.wanted(image(1)))
    assert same(found[1], other.wanted(image(1), interval=2))
    assert not same(found[0], found[1])


def test_cond_and_uncond_in_calls_of_their_own(compiled: Compiled, run: cg.Runner) -> None:
    images = {"cond": image(1), "uncond": image(2)}
    found: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    for step in range(STEPS):
        for branch in images:
            with run.cache_context(branch):
                found[branch].append(run(*images[branch][step]))
    for branch, calls in images.items():
        assert same(found[branch], compiled.wanted(calls))


def test_an_error_leaves_the_cache_context(compiled: Compiled, run: cg.Runner) -> None:
    first = play(run, image(1)[:4])
    with pytest.raises(SessionError), run.cache_context("cond"):
        run(*image(1)[4], step=4)
    assert same([*first, *play(run, image(1)[4:])], compiled.wanted(image(1)))


# --- which step a call is


def test_a_repeated_timestep_names_cache_context(compiled: Compiled, run: cg.Runner) -> None:
    calls = image(1)
    found = play(run, calls[:4])
    refused(lambda: run(*calls[3]), "step 3: timestep 940 is called twice", "cache_context('cond')")
    assert same([*found, *play(run, calls[4:])], compiled.wanted(calls))  # nothing was lost


def test_one_call_too_many(compiled: Compiled) -> None:
    run = compiled.runner(steps=50)
    calls = image(1, steps=51)
    assert same(play(run, calls[:50]), compiled.wanted(calls[:50], steps=50))
    refused(lambda: run(*calls[50]), "call 51 of 50", "expected a trajectory of 50 steps")


def test_skipped_step_with_timesteps_in_the_schedule(compiled: Compiled) -> None:
    run = compiled.runner(timesteps=TIMES)
    calls = image(1)
    refused(lambda: run(*calls[4]), "step 4 is out of order; expected step 0 (timestep 985)")
    found = play(run, calls[:3])
    refused(lambda: run(*calls[4]), "step 4 is out of order", "expected step 3 (timestep 940)")
    refused(lambda: run(*calls[2]), "step 2 is out of order", "expected step 3 (timestep 940)")
    x, t, y = calls[3]
    refused(lambda: run(x, t - 5, y), "timestep 935 is not one of the schedule's", "nearest 940")
    assert same([*found, *play(run, calls[3:])], compiled.wanted(calls))


def test_skipped_step_where_the_sampler_says_the_step(compiled: Compiled, run: cg.Runner) -> None:
    calls = image(1)
    refused(lambda: run(*calls[3], step=3), "step 3 is the first call", "expected step 0")
    found = [run(*calls[step], step=step) for step in range(3)]
    refused(lambda: run(*calls[4], step=4), "step 4 is out of order", "expected step 3")
    refused(lambda: run(*calls[2], step=2), "step 2 is out of order", "expected step 3")
    for step in (-1, 10, True, 1.0):
        refused(lambda step=step: run(*calls[3], step=step), "no such step", "expected 0 to 9")
    found += [run(*calls[step], step=step) for step in range(3, STEPS)]
    assert same(found, compiled.wanted(calls))


def test_a_given_step_makes_timesteps_irrelevant(compiled: Compiled, run: cg.Runner) -> None:
    calls = [(x, torch.tensor([700, 600]), y) for x, _, y in image(1)]
    found = [run(*call, step=step) for step, call in enumerate(calls)]
    assert same(found, compiled.wanted(calls))


def test_ascending_timesteps(compiled: Compiled) -> None:
    run = compiled.runner(order="ascending")
    calls = [(x, 1000 - t, y) for x, t, y in image(1)]
    for _ in range(2):
        assert same(play(run, calls), compiled.wanted(calls, order="ascending"))
    play(run, calls[:2])
    with pytest.warns(UserWarning, match="ended after 2 of 10 steps"):
        run(*calls[0])


def test_counting_takes_every_call_for_the_next_step(compiled: Compiled) -> None:
    run = cg.load(compiled.artifact(), track="count")
    calls = [(x, torch.tensor([700, 600]), y) for x, _, y in image(1)]
    for _ in range(2):
        assert same(play(run, calls), compiled.wanted(calls))
    refused(lambda: cg.load(compiled.artifact(), track="guess"), "'timestep' or 'count'", "'guess'")


def test_timesteps_that_differ_within_a_batch(run: cg.Runner) -> None:
    x, _, y = image(1)[0]
    refused(
        lambda: run(x, torch.tensor([700, 600]), y),
        "cannot be told from its timestep",
        "one finite timestep for the whole batch",
        "found 600, 700",
        "step=s",
    )


# --- the form of a call


def test_arguments_by_position_and_by_name(compiled: Compiled, run: cg.Runner) -> None:
    found = []
    for step, (x, t, y) in enumerate(image(1)):
        ways = [lambda: run(x, t, y), lambda: run(x, y=y, t=t), lambda: run(y=y, t=t, x=x)]  # noqa: B023
        found.append(ways[step % 3]())
    assert same(found, compiled.wanted(image(1)))


def test_wrong_arguments(compiled: Compiled, run: cg.Runner) -> None:
    x, t, y = image(1)[0]
    refused(lambda: run(x, t, label=y), "unknown argument 'label'", "expected t, x, y")
    refused(lambda: run(x, t, y, yy=y), "unknown argument 'yy'", "did you mean 'y'?")
    refused(lambda: run(x, t), "the call lacks 'y'", "x: f32[", "y: i64[")
    refused(lambda: run(x, t, y, y), "4 positional arguments", "at most 3")
    refused(lambda: run(x, t, y, x=x), "argument 'x' is given twice")
    refused(lambda: run(x, 985, y), "argument t is a int", "expected a tensor")
    assert same(play(run, image(1)), compiled.wanted(image(1)))


class Scaled(nn.Module):
    """A model with arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = tiny_dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: float = 1.0, mode: str = "a") -> Any:
        return self.dit(x * scale, t, y)


def test_a_constant_argument_that_changed() -> None:
    call = image(1)[0]
    artifact = cg.compile(
        Scaled().eval(), fora(STEPS, 3), call, {"scale": 2.0}, backend="eager", dynamic_batch=False
    )
    run = cg.load(artifact)
    run(*call, 2.0)
    refused(lambda: run(*call, 3.0), "scale differs from the traced one", "expected 2.0; found 3.0")
    refused(lambda: run(*call), "the call lacks 'scale'")
    refused(lambda: run(*call, 2), "scale differs from the traced one")
    refused(lambda: run(*call, 2.0, mode="b"), "mode differs from the traced one", "'a'; found 'b'")
    three = image(1, batch=3)[0]
    run.reset()
    refused(lambda: run(*three, 2.0), "input 'x' does not fit", "the batch is fixed")


@pytest.mark.parametrize("what", ["batch", "dtype", "shape", "device"])
def test_inputs_that_change_in_mid_trajectory(
    compiled: Compiled, run: cg.Runner, what: str
) -> None:
    calls = image(1)
    x, t, y = calls[3]
    changed: dict[str, tuple[Call, str]] = {
        "batch": ((x[:1], t[:1], y[:1]), "(1, 4, 8, 8)"),
        "dtype": ((x.double(), t, y), "float64"),
        "shape": ((x[..., :6], t, y), "(2, 4, 8, 6)"),
        "device": ((x.to("meta"), t, y), "meta"),
    }
    call, shown = changed[what]
    found = play(run, calls[:3])
    refused(
        lambda: run(*call),
        "step 3: input 'x' changed in the middle of a trajectory",
        "expected (2, 4, 8, 8) torch.float32 cpu",
        shown,
        "begin a new trajectory",
    )
    assert same([*found, *play(run, calls[3:])], compiled.wanted(calls))


def test_inputs_that_never_fitted(run: cg.Runner) -> None:
    x, t, y = image(1)[0]
    for wrong, remedy in (
        (x.double(), "another dtype; cast it: .to(torch.float32), or compile the model in torch.f"),
        (x[..., :6], "axis 3 is 6 instead of 8; sizes are fixed, but for the batch: compile with"),
        (x[0], "3 dimensions instead of 4; give it as it was traced"),
        (x.to("meta"), "another device; move it: .to('cpu'), or load the artifact there"),
    ):
        refused(lambda x=wrong: run(x, t, y), "input 'x' does not fit the compiled graphs", remedy)
    refused(lambda: run(x, t, y[:1]), "input 'y' does not fit", "expected i64[", "found i64[1]")
    refused(lambda: run(x, t, y[:1]), "axis 0 is 1 instead of 2 (s", "give all inputs the same b")
    refused(lambda: run(x, t.float(), y), "cast it: .to(torch.int64)")
    fixed = cg.compile(tiny_dit(), fora(3, 2), (x, t, y), backend="eager", dynamic_batch=False)
    refused(lambda: cg.load(fixed)(x[:1], t[:1], y[:1]), "the batch is fixed: compile with example")


# --- failures and memory


class FailsAt:
    """A step function that fails at one of its calls."""

    def __init__(self, graph: Callable[..., Any], call: int) -> None:
        self.graph, self.left = graph, call

    def __call__(self, *tensors: Tensor) -> Any:
        self.left -= 1
        if self.left == -1:
            raise RuntimeError("out of memory")
        return self.graph(*tensors)


def failing_once(artifact: cg.Artifact, variant: int, call: int) -> cg.Runner:
    functions: list[Callable[..., Any]] = list(artifact.graphs)
    functions[variant] = FailsAt(functions[variant], call)
    before = Prologues.of(artifact.program, artifact.prologues, batched=False)
    return cg.Runner(artifact.program, functions, artifact.weights, prologues=before)


@pytest.mark.parametrize(("variant", "call"), [(0, 0), (0, 1), (1, 0), (1, 3)])
def test_a_step_that_failed_can_be_repeated(compiled: Compiled, variant: int, call: int) -> None:
    run = failing_once(compiled.artifact(), variant, call)
    found, failures = [], 0
    for one in image(1):
        try:
            found.append(run(*one))
        except RuntimeError:
            failures += 1
            found.append(run(*one))
    assert failures == 1
    assert same(found, compiled.wanted(image(1)))


def test_memory_that_runs_out_is_told(compiled: Compiled) -> None:
    artifact = compiled.artifact()

    def greedy(*_: Tensor) -> Any:
        return torch.empty(2**55)

    before = Prologues.of(artifact.program, artifact.prologues, batched=False)
    run = cg.Runner(artifact.program, [greedy] * 2, artifact.weights, prologues=before)
    refused(lambda: run(*image(1)[0]), "step 0: not enough memory; found RuntimeError: ", "sample")


def test_a_first_step_that_failed_has_begun_its_trajectory(compiled: Compiled) -> None:
    run = failing_once(compiled.artifact(), variant=0, call=1)
    play(run, image(1)[:2])
    with pytest.warns(UserWarning, match="ended after 2 of"), pytest.raises(RuntimeError):
        run(*image(2)[0])
    assert run.cache_bytes() == 0
    assert same(play(run, image(2)), compiled.wanted(image(2)))  # without another warning


@pytest.mark.parametrize("batch", [2, 3])
def test_only_what_is_still_needed_is_kept(compiled: Compiled, run: cg.Runner, batch: int) -> None:
    plan: Plan = compiled.artifact().program.plan
    symbol = compiled.traced.batch
    assert symbol is not None
    predicted = plan.cache_bytes({symbol: batch})
    assert max(predicted) == 4 * batch * 16 * 32 * 4  # sites, batch, tokens, width, bytes
    found = []
    for call in image(1, batch=batch):
        run(*call)
        found.append(run.cache_bytes())
    assert tuple(found) == predicted
    assert found[-1] == 0


def test_runners_stay_where_they_are(run: cg.Runner) -> None:
    assert not run(*image(1)[0]).requires_grad
    assert run.to("cpu") is run
    assert run.to(torch.float32) is run
    refused(lambda: run.to(torch.float64), "cannot be moved or cast", "torch.float32 on cpu")
    refused(lambda: run.half(), "cannot be moved or cast", "found torch.float16")
