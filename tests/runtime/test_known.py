"""Values known before a step runs: computed ahead where they can be, never of a changed input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph.graph.interface import Role
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
    relative_error,
    same,
    shared_dit,
)
from tests.tiny import call, tiny, traced

STEPS = 6
TIMES = [1000 - 15 * (step + 1) for step in range(STEPS)]  # of dit_steps
FULL, REUSED = [0, 2, 5], [1, 3, 4]  # steps of the two variants


@dataclass
class Runs:
    """What prologues were run for."""

    alone: list[int] = field(default_factory=list)  # variant of each run for one step
    ahead: list[list[float]] = field(default_factory=list)  # timesteps of each run for several


def watched(artifact: cg.Artifact, runs: Runs, batched: bool) -> Prologues:
    """The artifact's prologues, which note down when they run."""
    plain = Prologues.of(artifact.program, artifact.prologues, batched=batched)

    def alone(variant: int, module: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            runs.alone.append(variant)
            return module(*inputs)

        return run

    def ahead(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            runs.ahead.append(inputs[1][:, 0].tolist())
            return function(*inputs)

        return run

    steps: Any = tuple(alone(i, module) for i, module in enumerate(plain.steps) if module)
    return Prologues(plain.request, steps, tuple(f and ahead(f) for f in plain.ahead))


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(STEPS)


@pytest.fixture(params=[True, False], ids=["batched", "single"])
def batched(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def runner(
    compiled: Compiled,
    runs: Runs | None = None,
    *,
    batched: bool = True,
    track: Track = "timestep",
    load_times: Sequence[float] | None = None,
    **schedule: Any,
) -> cg.Runner:
    artifact = compiled.artifact(**schedule)
    before = watched(artifact, runs or Runs(), batched)
    graphs, weights = artifact.graphs, artifact.weights
    return cg.Runner(artifact.program, graphs, weights, track, before, load_times)


def image(seed: int, batch: int = 2) -> list[Call]:
    return dit_steps(STEPS, batch=batch, seed=seed)


def play_steps(run: Callable[..., Tensor], calls: Sequence[Call], first: int = 0) -> list[Tensor]:
    return [run(*call, step=step) for step, call in enumerate(calls, first)]


# --- inputs that have to stay


def another_tensor(y: Tensor) -> Tensor:
    return (y + 1) % 10


def written_in_place(y: Tensor) -> Tensor:
    return y.copy_((y + 1) % 10)


@pytest.mark.parametrize("change", [another_tensor, written_in_place])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("inference", [False, True])
def test_a_class_that_changes_in_mid_trajectory_is_refused(
    compiled: Compiled,
    batched: bool,
    change: Callable[[Tensor], Tensor],
    step: int,
    inference: bool,
) -> None:
    run, calls = runner(compiled, batched=batched), image(1)
    wanted = compiled.wanted(calls)
    with torch.inference_mode(inference):
        y = calls[0][2].clone()
        assert y.is_inference() == inference
        before = y.clone()
        found = [run(x, t, y) for x, t, _ in calls[:step]]
        x, t, _ = calls[step]
        changed = change(y)
        refused(
            lambda: run(x, t, changed),
            f"step {step}: input 'y' changed in the middle of a trajectory",
            "compile with varying=['y'] if it differs from step to step",
            "run.session()",
        )
        # Nothing is lost: the same contents in another tensor are the same input.
        found += [run(x, t, before.clone()) for x, t, _ in calls[step:]]
    assert same(found, wanted)


def test_an_input_that_is_said_to_vary() -> None:
    (model, exported), calls = shared_dit(), image(1)
    calls = [(x, t, (y + step) % 10) for step, (x, t, y) in enumerate(calls)]
    artifact = compile_traced(model, exported, fora(STEPS, 3), varying=["y"])
    assert artifact.program.lasting == ()
    assert artifact.prologues  # the timestep's embedding is known all the same
    plan = artifact.program.plan
    reference = cg.ReferenceRunner.of_plan(model, exported, plan, artifact.schedule)
    wanted = play(reference, calls)
    for batched in (True, False):
        before = Prologues.of(artifact.program, artifact.prologues, batched=batched)
        run = cg.Runner(artifact.program, artifact.graphs, artifact.weights, prologues=before)
        for _ in range(2):
            assert same(play(run, calls), wanted)


# --- when values are computed


def times(steps: Sequence[int], shift: float = 0) -> list[float]:
    return [TIMES[step] + shift for step in steps]


def later(calls: Sequence[Call], shift: float) -> list[Call]:
    return [(x, t + shift, y) for x, t, y in calls]


@pytest.mark.parametrize("where", ["schedule", "load"])
@pytest.mark.parametrize("track", ["timestep", "count"])
def test_timesteps_that_are_said_are_computed_ahead_from_the_start(
    compiled: Compiled, runs: Runs, where: str, track: Track
) -> None:
    if where == "schedule":
        run = runner(compiled, runs, track=track, timesteps=TIMES)
    else:
        run = runner(compiled, runs, track=track, load_times=TIMES)
    for seed in (1, 2):
        assert same(play(run, image(seed)), compiled.wanted(image(seed)))
    assert runs == Runs(ahead=2 * [times(FULL), times(REUSED)])
    exact = Runs()
    play(runner(compiled, exact, batched=False, timesteps=TIMES), image(1))
    assert exact == Runs(alone=[step in REUSED for step in range(STEPS)])


def test_without_timesteps_the_first_trajectory_teaches_them(
    compiled: Compiled, runs: Runs
) -> None:
    run = runner(compiled, runs)
    assert same(play(run, image(1)), compiled.wanted(image(1)))
    assert runs == Runs(alone=[step in REUSED for step in range(STEPS)])
    for seed in (2, 3):
        assert same(play(run, image(seed)), compiled.wanted(image(seed)))
    assert len(runs.alone) == STEPS
    assert runs.ahead == 2 * [times(FULL), times(REUSED)]


def test_a_sampler_that_changes_its_timesteps(compiled: Compiled, runs: Runs) -> None:
    run = runner(compiled, runs)
    play(run, image(1))
    calls = later(image(2), -3)
    assert same(play(run, calls), compiled.wanted(calls))
    assert len(runs.alone) == 2 * STEPS
    assert runs.ahead == []
    # Timesteps that agree at first and differ later: what was computed ahead for those is not used.
    mixed = [*later(image(3)[:3], -3), *later(image(3)[3:], -5)]
    assert same(play_steps(run, mixed), compiled.wanted(mixed))
    assert runs.ahead == [times(FULL, -3), times(REUSED, -3)]
    assert runs.alone[2 * STEPS :] == [1, 1, 0]
    assert same(play_steps(run, mixed), compiled.wanted(mixed))
    assert len(runs.alone) == 2 * STEPS + 3


def test_timesteps_that_the_schedule_rounds_are_learned_once(runs: Runs) -> None:
    drawn = [10.0 - step for step in range(STEPS)]  # of tiny's calls
    schedule = fora(STEPS, 3, timesteps=[round(time + 4e-4, 4) for time in drawn])
    artifact = compile_traced(tiny(), traced(), schedule)
    before = watched(artifact, runs, batched=True)
    run = cg.Runner(artifact.program, artifact.graphs, artifact.weights, prologues=before)
    plan = artifact.program.plan
    reference = cg.ReferenceRunner.of_plan(tiny(), traced(), plan, artifact.schedule)
    for trajectory in range(3):
        for step in range(STEPS):
            assert relative_error(run(*call(step)), reference(*call(step))) <= 1e-6
        assert len(runs.alone) == STEPS
        assert len(runs.ahead) == 2 * trajectory
    assert runs.ahead[0] == [drawn[step] for step in FULL]


def test_counting_without_timesteps_looks_at_those_of_each_call(
    compiled: Compiled, runs: Runs
) -> None:
    run = runner(compiled, runs, track="count")
    for shift in (0, -3, 7):
        calls = later(image(1), shift)
        assert same(play(run, calls), compiled.wanted(calls))
    assert runs.alone == 3 * [step in REUSED for step in range(STEPS)]
    assert runs.ahead == []


def test_timesteps_that_differ_within_a_batch(compiled: Compiled, batched: bool) -> None:
    run = runner(compiled, batched=batched, timesteps=TIMES)
    apart = torch.tensor([0, 40])
    calls = [(x, t - apart, y) for x, t, y in image(1)]
    for _ in range(2):
        assert same(play_steps(run, calls), compiled.wanted(calls))
    assert same(play(run, image(2)), compiled.wanted(image(2)))


def test_another_batch_in_the_next_trajectory(compiled: Compiled, batched: bool) -> None:
    for said in ({}, {"timesteps": TIMES}):
        run = runner(compiled, batched=batched, **said)
        for batch in (2, 3, 1, 3):
            calls = image(batch, batch)
            assert same(play(run, calls), compiled.wanted(calls))


# --- sessions, branches, failures


def test_sessions_and_branches_are_independent(compiled: Compiled, batched: bool) -> None:
    run = runner(compiled, batched=batched)
    other = run.session()
    images = {"cond": image(1), "uncond": later(image(2, 3), -4), "other": later(image(3), 5)}
    for _ in range(2):
        found: dict[str, list[Tensor]] = {name: [] for name in images}
        for step in range(STEPS):
            for branch in ("cond", "uncond"):
                with run.cache_context(branch):
                    found[branch].append(run(*images[branch][step]))
            found["other"].append(other(*images["other"][step]))
        for name, calls in images.items():
            assert same(found[name], compiled.wanted(calls))


def test_an_aborted_image_leaves_nothing_to_the_next(compiled: Compiled, batched: bool) -> None:
    """Not even where the next one begins at another timestep and goes on at the same ones."""
    run = runner(compiled, batched=batched, timesteps=TIMES)
    first, second = image(1), [*later(image(2)[:2], -1), *image(2)[2:]]
    assert not torch.equal(first[0][2], second[0][2])
    play(run, first[:2])
    with pytest.warns(UserWarning, match="ended after 2 of 6 steps"):
        found = play_steps(run, second)
    assert same(found, compiled.wanted(second))


@pytest.mark.parametrize("at", range(STEPS))
def test_a_failed_call_can_be_repeated(compiled: Compiled, batched: bool, at: int) -> None:
    artifact = compiled.artifact(timesteps=TIMES)
    failing: set[float] = {TIMES[at]}

    def fails_once(graph: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            if (time := float(tensors[1][0])) in failing:
                failing.remove(time)
                raise RuntimeError("out of memory")
            return graph(*tensors)

        return run

    before = Prologues.of(artifact.program, artifact.prologues, batched=batched)
    functions = [fails_once(graph) for graph in artifact.graphs]
    run = cg.Runner(artifact.program, functions, artifact.weights, prologues=before)
    calls = image(1)
    found = play(run, calls[:at])
    with pytest.raises(RuntimeError, match="out of memory"):
        run(*calls[at])
    assert same([*found, *play(run, calls[at:])], compiled.wanted(calls))


def test_a_prologue_that_failed_can_be_repeated(compiled: Compiled) -> None:
    """What was computed ahead for another timestep is not taken for what the call needs."""
    artifact, armed = compiled.artifact(), [False]
    plain = Prologues.of(artifact.program, artifact.prologues, batched=True)

    def fails_once(module: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            if armed[0]:
                armed[0] = False
                raise RuntimeError("out of memory")
            return module(*inputs)

        return run

    steps: Any = tuple(fails_once(module) for module in plain.steps if module)
    before = Prologues(plain.request, steps, plain.ahead)
    run = cg.Runner(artifact.program, artifact.graphs, artifact.weights, prologues=before)
    play(run, image(1))
    calls = [*image(1)[:4], *later(image(1)[4:], -3)]
    found = play(run, calls[:4])
    armed[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run(*calls[4], step=4)
    assert same([*found, *play_steps(run, calls[4:], 4)], compiled.wanted(calls))


# --- memory


@pytest.mark.parametrize("batch", [2, 3])
def test_bytes_held_are_those_predicted(compiled: Compiled, batch: int) -> None:
    artifact = compiled.artifact(timesteps=TIMES)
    assert compiled.traced.batch is not None
    held, rows = [], []

    def watch(variant: int) -> Callable[..., Any]:
        layout = artifact.program.variants[variant]

        def call(*tensors: Tensor) -> Any:
            ports = layout.interface.inputs
            own = [t for t, p in zip(tensors, ports, strict=True) if p.role is Role.STEP]
            rows.append(sum(t.nbytes for t in own))
            held.append(session.known_bytes() + rows[-1])
            return artifact.graphs[variant](*tensors)

        return call

    before = Prologues.of(artifact.program, artifact.prologues, batched=True)
    functions = [watch(i) for i in range(len(artifact.graphs))]
    session = cg.Runner(artifact.program, functions, artifact.weights, prologues=before).session()
    play(session, image(1, batch))
    predicted = artifact.program.cost.known_bytes  # for the batch of 2 that it was traced with
    assert held == [number * batch // 2 for number in predicted]
    # 6 chunks of modulation of each block and 2 of the last layer; 2 gates are left of a block.
    assert rows == [batch * 32 * 4 * (6 if step in REUSED else 14) for step in range(STEPS)]
    assert session.known_bytes() == 0  # nothing is left of a trajectory that has ended
