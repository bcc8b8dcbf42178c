"""Images told apart by their latents, trajectories left unfinished, weights changed afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph.errors import SessionError, UnfinishedWarning
from cachegraph.runtime.continuity import Link, Trail
from tests.models import (
    Compiled,
    dit_steps,
    one_thread,  # noqa: F401
    refused,
    relative_error,
    tiny_dit,
)

STEPS = 6
TIMES = [900, 800, 700, 600, 500, 400]
LABELS = torch.tensor([3, 8])


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(STEPS)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def sample(
    run: Callable[..., Tensor], seed: int, times: Sequence[float] = TIMES, **at: Any
) -> Tensor:
    """As a sampler does: the next latent is made from the last one and the output."""
    x = noise(seed)
    for time in times:
        out = run(x, torch.full((2,), time), LABELS, **at)
        x = 0.95 * x - 0.2 * out[:, :4]
    return x


def wanted(compiled: Compiled, seed: int, times: Sequence[float] = TIMES) -> Tensor:
    reference = cg.ReferenceRunner.of_plan(
        compiled.model, compiled.traced, compiled.artifact().program.plan, fora_of(compiled)
    )
    steps = iter(range(STEPS))
    return sample(lambda *call: reference(*call, step=next(steps)), seed, times)


def fora_of(compiled: Compiled) -> Any:
    return compiled.artifact().schedule


# --- how two latents are related


def linked(following: Callable[[Tensor, Tensor], Tensor], n: int = 32) -> Link:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, n, n, generator=generator)
    out = torch.randn(2, 8, n, n, generator=generator)  # four channels more than the latent
    return Trail.of(x, [out]).link(following(x, out))


def fresh(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("following", "link"),
    [
        (lambda x, out: x, Link.SAME),
        (lambda x, out: 0.9 * x - 0.3 * out[:, :4], Link.FOLLOWS),
        (lambda x, out: 0.5 * x + fresh(x), Link.FOLLOWS),  # DDPM
        (lambda x, out: (7.5 * out[:1] - 6.5 * out[1:])[:, :4].expand(2, -1, -1, -1), Link.FOLLOWS),
        (lambda x, out: 0.17 * out[:, :4] + fresh(x), Link.FOLLOWS),  # LCM at its first step
        (lambda x, out: fresh(x), Link.APART),
        (lambda x, out: fresh(x)[:, :, ::2], Link.UNKNOWN),
        (lambda x, out: x * torch.nan, Link.UNKNOWN),
        (lambda x, out: x.half(), Link.UNKNOWN),
    ],
    ids=["same", "ddim", "ddpm", "guided", "lcm", "another", "shape", "nan", "dtype"],
)
def test_latents(following: Callable[[Tensor, Tensor], Tensor], link: Link) -> None:
    assert linked(following) is link


def test_few_numbers_tell_nothing() -> None:
    assert linked(lambda x, _: fresh(x), n=2) is Link.UNKNOWN


# --- aborted images


@pytest.mark.parametrize("aborted_after", [2, 4])
def test_the_first_image_aborted_is_not_continued_by_one_that_begins_lower(
    compiled: Compiled, aborted_after: int
) -> None:
    run, lower = compiled.runner(), [350, 300, 250, 200, 150, 100]
    sample(run, 1, TIMES[:aborted_after])
    with pytest.warns(UnfinishedWarning, match=f"ended after {aborted_after} of 6 steps"):
        found = sample(run, 2, lower)
    assert relative_error(found, wanted(compiled, 2, lower)) <= 1e-5


def test_an_image_that_begins_at_the_very_next_timestep_is_refused(compiled: Compiled) -> None:
    run = cg.load(compiled.artifact(), timesteps=TIMES)
    sample(run, 1, TIMES[:3])
    refused(
        lambda: sample(run, 2, TIMES[3:]),
        "the latent at timestep 600 was not made from the last call's",
        "another image",
        "call reset()",
    )
    run.reset()
    assert relative_error(sample(run, 2), wanted(compiled, 2)) <= 1e-5


@pytest.mark.parametrize("said", [None, TIMES])
def test_an_image_aborted_after_its_first_step_is_told(
    compiled: Compiled, said: list[float] | None
) -> None:
    """A sampler of fresh noise looks the same, so it is no error."""
    run = cg.load(compiled.artifact(), timesteps=said)
    sample(run, 1, TIMES[:1])
    with pytest.warns(UnfinishedWarning, match=r"the latent of step 1 .* call reset\(\) after one"):
        sample(run, 2, TIMES[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(cg.load(compiled.artifact(), timesteps=said), 2)


def test_time_that_goes_back_while_steps_are_counted_is_told(compiled: Compiled) -> None:
    run = cg.load(compiled.artifact(), track="count")
    sample(run, 1, TIMES[:4])
    with pytest.warns(UnfinishedWarning, match="time goes back at step 4, as steps are counted"):
        sample(run, 2)
    run.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(run, 1, [900, 900, 700, 700, 500, 500])  # Heun's
        sample(run, 2)


def test_a_run_of_too_many_steps_teaches_nothing(compiled: Compiled) -> None:
    run, nine = compiled.runner(), list(range(900, 0, -100))
    refused(lambda: sample(run, 1, nine), "call 7 of 6")
    others = [900, 750, 600, 450, 300, 150]  # not the first six of the nine
    assert relative_error(sample(run, 2, others), wanted(compiled, 2, others)) <= 1e-5


def test_a_sampler_of_fresh_noise_is_not_taken_for_other_images(compiled: Compiled) -> None:
    """LCM: a step keeps nothing of the last latent, and too little of the output to be seen."""
    for said in (None, TIMES):
        run = cg.load(compiled.artifact(), timesteps=said)
        for image in range(2):
            calls = [
                (noise(10 * image + s), torch.full((2,), t), LABELS) for s, t in enumerate(TIMES)
            ]
            plain = compiled.runner()
            for step, call in enumerate(calls):
                assert torch.equal(run(*call), plain(*call, step=step))


# --- timesteps that round to one value


def test_neighbours_that_round_to_one_value_are_steps_apart() -> None:
    model = tiny_dit().bfloat16()
    times = [1000.0, 998.5, 996.0, 994.5, 990.0, 987.0]  # bfloat16 has 1000, 1000, 996, 996, ...
    calls = [
        (noise(1).bfloat16(), torch.full((2,), time, dtype=torch.bfloat16), LABELS)
        for time in times
    ]
    assert calls[0][1][0] == calls[1][1][0]
    schedule = {"cachegraph": 1, "steps": 6, "policy": {"method": "fora", "interval": 3}}
    artifact = cg.compile(model, schedule, calls[0], backend="eager")
    by_step = cg.load(artifact)
    for said in (None, times):
        run, x = cg.load(artifact, timesteps=said), noise(1).bfloat16()
        for step, (_, time, y) in enumerate(calls):
            out = run(x, time, y)
            assert torch.equal(out, by_step(x, time, y, step=step)), (said, step)
            x = x - 0.1 * out[:, :4]


def test_the_same_call_twice_is_still_refused(compiled: Compiled) -> None:
    run = compiled.runner()
    calls = dit_steps(2)
    run(*calls[0]), run(*calls[1])
    refused(lambda: run(*calls[1]), "is called twice")


# --- the context that diffusers gives


def test_the_step_index_of_a_context_is_used(compiled: Compiled) -> None:
    run, plain = compiled.runner(), compiled.runner()
    for step, call in enumerate(dit_steps(STEPS)):
        with run.cache_context("cond", step_index=step, sigma=0.5, num_inference_steps=STEPS):
            assert torch.equal(run(*call), plain(*call))
    with run.cache_context("cond", step_index=2):
        refused(lambda: run(*dit_steps(1)[0]), "step 2 is out of order")


def test_a_step_that_is_said_copies_no_latent(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compiled.artifact().runner()
    made: list[Tensor] = []
    monkeypatch.setattr(Trail, "of", classmethod(lambda _, latent, __: made.append(latent)))
    for step, time in enumerate(TIMES):
        run(noise(0), torch.full((2,), time), LABELS, step=step)
    assert not made
    run(noise(0), torch.full((2,), TIMES[0]), LABELS)
    assert len(made) == 1


def test_a_context_of_another_number_of_steps_is_refused(compiled: Compiled) -> None:
    run = compiled.runner()

    def call() -> None:
        with run.cache_context("cond", num_inference_steps=28):
            run(*dit_steps(1)[0])

    refused(call, "another number of steps", "expected 6; found 28", "steps: 28")


# --- trajectories that end early


def test_an_unfinished_trajectory_is_told_when_it_is_given_up(compiled: Compiled) -> None:
    run = compiled.runner()
    sample(run, 1, TIMES[:4])
    with pytest.warns(UnfinishedWarning, match="ends after 4 of 6 steps; a sampler of 4 steps"):
        run.reset()
    sessions = [run.session()]
    with sessions[0].cache_context("cond"):
        sessions[0](*dit_steps(1)[0])
    with pytest.warns(UnfinishedWarning, match="a trajectory of 'cond' ends after 1 of 6"):
        sessions.clear()


def test_a_whole_trajectory_ends_without_a_word(compiled: Compiled) -> None:
    run = compiled.runner()
    sample(run, 1)
    gc.collect()
    with warnings.catch_warnings(record=True) as seen:
        run.reset()
    assert not seen


def test_an_unfinished_trajectory_is_told_at_exit(compiled: Compiled, tmp_path: Path) -> None:
    folder = compiled.artifact().save(tmp_path / "tiny.cgraph")
    code = (
        "import sys, torch, cachegraph as cg\n"
        "run = cg.load(sys.argv[1])\n"
        "run(torch.zeros(2, 4, 8, 8), torch.full((2,), 900), torch.zeros(2).long())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert found.stderr.count("UnfinishedWarning: a trajectory ends after 1 of 6 steps") == 1


# --- weights that change


def in_place(weight: Tensor) -> None:
    weight.add_(1e-3)


def as_loras_are_fused(weight: Tensor) -> None:
    weight.data += 1e-3


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] += 1e-3


WRITES = [in_place, as_loras_are_fused, through_numpy]


@torch.no_grad()
def changed(model: torch.nn.Module, write: Callable[[Tensor], None] = in_place) -> None:
    write(model.get_parameter("blocks.0.mlp.fc1.weight"))


def compiled_of(model: torch.nn.Module) -> cg.Artifact:
    schedule = {"cachegraph": 1, "steps": 6, "policy": {"method": "fora", "interval": 3}}
    return cg.compile(model, schedule, dit_steps(1)[0], backend="eager")


@pytest.mark.parametrize("write", WRITES)
def test_weights_written_to_afterwards_are_refused(
    write: Callable[[Tensor], None], tmp_path: Path
) -> None:
    model = tiny_dit()
    artifact = compiled_of(model)
    saved = artifact.save(tmp_path / "before.cgraph")
    before, run = sample(cg.load(artifact), 1), cg.load(artifact)
    changed(model, write)
    for use in (lambda: sample(run, 1), lambda: cg.load(artifact), lambda: artifact.save(saved)):
        refused(use, "was changed after it was compiled", "compile the model again")
    assert torch.equal(sample(cg.load(saved), 1), before)  # what was saved has its own


@pytest.mark.parametrize("write", WRITES)
def test_weights_written_to_in_mid_image_are_refused(write: Callable[[Tensor], None]) -> None:
    model = tiny_dit()
    run = cg.load(compiled_of(model))
    sample(run, 1, TIMES[:3])
    changed(model, write)
    refused(lambda: sample(run, 1, TIMES[3:]), "was changed after it was compiled")


def test_new_tensors_in_the_model_do_not_reach_what_was_compiled() -> None:
    model = tiny_dit()
    artifact = compiled_of(model)
    before = sample(cg.load(artifact), 1)
    new = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(new, assign=True)
    assert torch.equal(sample(cg.load(artifact), 1), before)


@pytest.mark.parametrize("name", ["load_state_dict", "load_lora_adapter"])
def test_a_runner_takes_no_weights(compiled: Compiled, name: str) -> None:
    run = compiled.runner()
    with pytest.raises(SessionError, match="keeps the weights that it was compiled with"):
        getattr(run, name)({}, strict=False)


def test_a_runner_has_parameters_to_ask_for_device_and_dtype(compiled: Compiled) -> None:
    first = next(compiled.runner().parameters())
    assert (first.device.type, first.dtype) == ("cpu", torch.float32)
