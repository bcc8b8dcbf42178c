"""Calls of a pipeline's transformer that are not the next step of everything: what becomes of each.

A model of two blocks in a pipeline of a few lines, so that every call is in sight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import InputError, SessionError
from tests.pipes import FORA, FULL, noise, traced_once
from tests.tiny import TOKENS, WIDTH, Block

STEPS = 6
INTERVAL = 3


class Texts(nn.Module):
    """``hidden_states (B, N, C)``, ``timestep (B,)`` and ``text (B, C)`` to ``(B, N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, scale: float = 1.0
    ) -> Tensor:
        c = self.time(timestep.view(-1, 1, 1) / 1000) + self.text(text).unsqueeze(1)
        for block in self.blocks:
            hidden_states = block(hidden_states, c)
        return self.head(hidden_states) * scale


@cache
def texts() -> Texts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Texts().eval()


class Scheduler:
    """Euler's; like those of diffusers it makes a new tensor of timesteps for every image."""

    def set_timesteps(self, times: Sequence[float]) -> None:
        self.timesteps = torch.tensor(times)

    def step(self, output: Tensor, x: Tensor) -> Tensor:
        return x - 0.1 * output


class IndexedScheduler(Scheduler):
    """It says how far it is, as most do."""

    def set_timesteps(self, times: Sequence[float]) -> None:
        super().set_timesteps(times)
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def step(self, output: Tensor, x: Tensor) -> Tensor:
        self.step_index = (
            (self.begin_index or 0) + 1 if self.step_index is None else (self.step_index + 1)
        )
        return super().step(output, x)


class Pipe(SimpleNamespace):
    """A pipeline without diffusers."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(transformer=texts(), scheduler=scheduler, config=SimpleNamespace())


@pytest.fixture(params=[Scheduler, IndexedScheduler])
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    with traced_once():
        pipe = Pipe(request.param())
        yield pipe
    cg.restore(pipe)


def falling(steps: int = STEPS) -> list[float]:
    return [1000 * (1 - step / steps) for step in range(steps)]


@torch.no_grad()
def wanted(calls: Sequence[tuple[Tensor, float, Tensor]], full: Sequence[int]) -> list[Tensor]:
    """What calls return whose attention and mlps are computed at some of them, by hand."""
    model = texts()
    kept: dict[tuple[int, str], Tensor] = {}
    results = []
    for number, (x, t, text) in enumerate(calls):
        c = model.time(torch.full((len(x), 1, 1), t) / 1000) + model.text(text).unsqueeze(1)
        for index, block in enumerate(model.blocks):
            gates = block.gates(c).chunk(2, dim=-1)
            for name, gate in zip(("attn", "mlp"), gates, strict=True):
                if number in full:
                    normed = nn.functional.layer_norm(x, (WIDTH,))
                    kept[index, name] = getattr(block, name)(normed)
                x = x + gate * kept[index, name][: len(x)]
        results.append(model.head(x))
    return results


def computed(steps: int) -> list[int]:
    """The steps that FORA computes, counted down."""
    return [0, *(s for s in range(1, steps) if (steps - 1 - s) % INTERVAL == 0)]


class Loop:
    """A sampler's loop that notes every call and what it returned."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.noted: dict[str, list[tuple[Tensor, float, Tensor]]] = {}
        self.found: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def call(self, branch: str, x: Tensor, t: Tensor, text: Tensor, **more: Any) -> Tensor:
        out = self.pipe.transformer(x, t.expand(len(x)), text, **more)
        self.noted.setdefault(branch, []).append((x.clone(), float(t), text.clone()))
        self.found.setdefault(branch, []).append(out)
        return out

    def check(self, branch: str, full: Sequence[int]) -> None:
        for found, right in zip(self.found[branch], wanted(self.noted[branch], full), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def accelerate(pipe: Pipe, **options: Any) -> Pipe:
    return cg.accelerate(pipe, FORA, **{"backend": "eager", "progress": lambda _: None} | options)


def calls(pipe: Pipe) -> dict[str, int]:
    (one,) = cg.summary(pipe).components
    return {kind: count for kind, count in one.calls.items() if count}


# --- branches


def test_cond_and_uncond_are_told_apart_by_their_text(pipe: Pipe) -> None:
    """In whatever order they come, and though one is left out now and then."""
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps(falling())
    loop, x, both = Loop(pipe), noise(1, TOKENS, WIDTH), [noise(1, WIDTH, seed=s) for s in (1, 2)]
    for number, t in enumerate(pipe.scheduler.timesteps):
        order = ("cond", "uncond") if number % 2 else ("uncond", "cond")
        for name in order:
            out = loop.call(name, x, t, both[name == "uncond"].clone())
        x = pipe.scheduler.step(out, x)
    for name in ("cond", "uncond"):
        loop.check(name, computed(STEPS))


def test_two_calls_that_nothing_tells_apart_are_two_branches(pipe: Pipe) -> None:
    """The negative prompt is the prompt: both calls of a step are the same step."""
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps(falling())
    loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    for t in pipe.scheduler.timesteps:
        for name in ("cond", "uncond"):
            out = loop.call(name, x, t, text)
        x = pipe.scheduler.step(out, x)
    for name in ("cond", "uncond"):
        loop.check(name, computed(STEPS))


@pytest.mark.parametrize("half", [slice(0, 1), slice(1, 2)])
def test_guidance_that_is_switched_off_keeps_the_rows_of_the_other_half(
    pipe: Pipe, half: slice
) -> None:
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps(falling())
    x, both = noise(1, TOKENS, WIDTH), noise(2, WIDTH, seed=1)
    loop = Loop(pipe)
    for number, t in enumerate(pipe.scheduler.timesteps):
        if number < 2:
            out = loop.call("both", torch.cat([x, x]), t, both).mean(0, keepdim=True)
        else:
            out = loop.call("half", x, t, both[half])
        x = pipe.scheduler.step(out, x)
    whole = [(a[half], t, text[half]) for a, t, text in loop.noted["both"]]
    right = wanted([*whole, *loop.noted["half"]], computed(STEPS))
    for found, one in zip(loop.found["half"], right[2:], strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)
    assert calls(pipe) == {"computed": 3, "reused": 3}


# --- calls that begin in mid-image


def test_another_text_in_mid_image_runs_on_the_model_with_one_warning(pipe: Pipe) -> None:
    accelerate(pipe)
    pipe.scheduler.set_timesteps(falling())
    loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    late = noise(1, WIDTH, seed=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, t in enumerate(pipe.scheduler.timesteps):
            out = loop.call("early", x, t, text)
            if number >= 2:
                loop.call("late", x, t, late)
            x = pipe.scheduler.step(out, x)
    assert len(caught) == 1
    assert "run uncached: call 3 of the image has another text" in str(caught[0].message)
    loop.check("early", computed(STEPS))
    loop.check("late", range(STEPS))
    assert calls(pipe) == {"computed": 2, "reused": 4, "uncached": 4} | (
        {"computed": len(computed(STEPS)), "reused": STEPS - len(computed(STEPS))}
    )


def test_strict_refuses_them(pipe: Pipe) -> None:
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps(falling())
    x, text = noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    loop = Loop(pipe)
    first, second, *_ = pipe.scheduler.timesteps
    x = pipe.scheduler.step(loop.call("early", x, first, text), x)
    with pytest.raises(SessionError, match=r"call 2 of the image has another text.*varying="):
        loop.call("late", x, second, noise(1, WIDTH, seed=2))
    with pytest.raises(SessionError, match="has a form that no call had"):
        loop.call("late", x, second, text, scale=0.5)  # as skip-layer guidance does
    loop.call("early", x, second, text)  # what was refused has changed nothing
    loop.check("early", computed(STEPS)[:2])


def test_an_input_that_differs_from_step_to_step_can_be_named(pipe: Pipe) -> None:
    accelerate(pipe, strict=True, varying=["text"])
    pipe.scheduler.set_timesteps(falling())
    loop, x = Loop(pipe), noise(1, TOKENS, WIDTH)
    for number, t in enumerate(pipe.scheduler.timesteps):
        x = pipe.scheduler.step(loop.call("all", x, t, noise(1, WIDTH, seed=number)), x)
    loop.check("all", computed(STEPS))


def test_more_calls_than_the_scheduler_plans_run_uncached(pipe: Pipe) -> None:
    accelerate(pipe)
    loop, text = Loop(pipe), noise(1, WIDTH, seed=1)
    pipe.scheduler.set_timesteps(falling(3))
    for t in pipe.scheduler.timesteps:
        pipe.scheduler.step(loop.call("all", noise(1, TOKENS, WIDTH), t, text), t)
    with pytest.warns(UserWarning, match="number 4 is none of the 3 calls"):
        loop.call("more", noise(1, TOKENS, WIDTH), t - 1, text)
    loop.check("all", computed(3))
    loop.check("more", [0])


# --- images


def test_an_aborted_image_leaves_nothing_behind(pipe: Pipe) -> None:
    """After its first step, too: the next image begins though the timestep is the next one."""
    accelerate(pipe, strict=True)
    for done in (1, 2, 5):
        pipe.scheduler.set_timesteps(falling())
        loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH, seed=done), noise(1, WIDTH)
        for t in pipe.scheduler.timesteps[:done]:
            x = pipe.scheduler.step(loop.call("all", x, t, text), x)
        loop.check("all", computed(STEPS))
    pipe.scheduler.set_timesteps(falling()[1:])
    loop = Loop(pipe)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(loop.call("all", x, t, text), x)
    loop.check("all", computed(STEPS - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that an image was left unfinished is no surprise here
        cg.restore(pipe)


def test_an_image_that_begins_later_has_fewer_steps(pipe: Pipe) -> None:
    """img2img: the first timesteps of the scheduler are left out."""
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps(falling(8))
    if isinstance(pipe.scheduler, IndexedScheduler):
        pipe.scheduler.begin_index = 3
    loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    for t in pipe.scheduler.timesteps[3:]:
        x = pipe.scheduler.step(loop.call("all", x, t, text), x)
    loop.check("all", computed(5))


def test_timesteps_that_are_repeated_are_steps_of_their_own(pipe: Pipe) -> None:
    """Heun calls the model twice at a timestep; rounding to bfloat16 does the same."""
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps([900.0, 900.0, 600.0, 600.0, 300.0, 300.0])
    loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(loop.call("all", x, t, text), x)
    loop.check("all", computed(6))


def test_time_that_turns_back_begins_anew(pipe: Pipe) -> None:
    """What was kept of a cleaner latent is not used for a noisier one."""
    accelerate(pipe, strict=True)
    pipe.scheduler.set_timesteps([900.0, 800.0, 700.0, 900.0, 800.0, 700.0, 600.0])
    loop, x, text = Loop(pipe), noise(1, TOKENS, WIDTH), noise(1, WIDTH, seed=1)
    for number, t in enumerate(pipe.scheduler.timesteps):
        x = pipe.scheduler.step(loop.call("first" if number < 3 else "then", x, t, text), x)
    loop.check("first", computed(3))
    loop.check("then", computed(4))


# --- forms of call


def test_weights_are_those_of_the_model_in_every_form(pipe: Pipe) -> None:
    accelerate(pipe, strict=True)
    loop, text = Loop(pipe), noise(1, WIDTH, seed=1)
    for steps, scale in ((3, 1.0), (4, 1.0), (4, 2.0)):
        pipe.scheduler.set_timesteps(falling(steps))
        for t in pipe.scheduler.timesteps:
            x = noise(1, TOKENS, WIDTH, seed=steps)
            pipe.scheduler.step(loop.call("all", x, t, text, scale=scale), x)
    (forms,) = (one.forms for one in cg.summary(pipe).components)
    assert [form.partition(",")[0] for form in forms] == ["3 steps", "4 steps", "4 steps"]
    from cachegraph.pipelines.denoiser import denoiser_of

    own = {p.data_ptr() for p in pipe.transformer.parameters()}
    for form in denoiser_of(pipe.transformer).forms.compiled:
        assert {w.data_ptr() for w in form.artifact.weights.values()} <= own


def test_forms_that_keep_coming_are_told(pipe: Pipe) -> None:
    said: list[str] = []
    accelerate(pipe, progress=said.append)
    loop, text = Loop(pipe), noise(1, WIDTH, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(1, 7):
            pipe.scheduler.set_timesteps(falling(2))
            loop.call(
                "all", noise(1, TOKENS, WIDTH), torch.tensor(1000.0), text, scale=number * 1.0
            )
    assert len(caught) == 1
    assert "number 5 (scale: 4.0 before, 5.0 now)" in str(caught[0].message)
    assert len(said) == 6
    assert said[0] == "compiling for 2 steps, hidden_states f32[1, 4, 8], timestep f32[1], " + (
        "text f32[1, 8]"
    )


# --- schedules


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ({"method": "table", "rows": [{"steps": [0, 2, 3, 4], "sites": "*"}]}, {}),
        ({"method": "fora", "interval": 3}, {"timesteps": [5.0, 4.0, 3.0, 2.0, 1.0]}),
        (
            {"method": "fora", "interval": 3},
            {"correction": {"method": "goc", "weight": 0.5, "steps": [4]}},
        ),
    ],
)
def test_a_schedule_that_fixes_its_steps_is_refused_before_the_model_is_called(
    pipe: Pipe, policy: Any, more: Any
) -> None:
    if policy["method"] == "table":
        policy = {"method": "smoothcache", "lists": {"attn": [1, 0, 1, 0, 1]}}
    cg.accelerate(pipe, {"cachegraph": 1, "steps": 5, "policy": policy, **more}, backend="eager")
    called: list[int] = []
    hook = pipe.transformer.head.register_forward_hook(lambda *_: called.append(1))
    pipe.scheduler.set_timesteps(falling(6))
    with pytest.raises(InputError, match=r"makes 6 steps, and .* fixes .*num_inference_steps=5"):
        Loop(pipe).call(
            "all", noise(1, TOKENS, WIDTH), pipe.scheduler.timesteps[0], noise(1, WIDTH)
        )
    hook.remove()
    assert not called


def test_misspelt_keys_are_refused_at_once(pipe: Pipe) -> None:
    with pytest.raises(InputError, match="did you mean 'interval'"):
        cg.accelerate(pipe, {"cachegraph": 1, "policy": {"method": "fora", "intervall": 3}})
    with pytest.raises(InputError, match="inductor"):
        cg.accelerate(pipe, FULL, backend="inductr")
    assert "forward" not in vars(pipe.transformer)
