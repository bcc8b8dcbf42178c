"""Samplers that know nothing of caching draw the same image as with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.model.trace import trace
from cachegraph.zoo import DiT
from tests.models import (
    DATA,
    build,
    compile_traced,
    dit_steps,
    fill_random,
    fora,
    make_inputs,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
    tiny_dit,
)

STEPS = 8
Model = Callable[..., Tensor]


class Case:
    """One model: compiled, carried out by the reference, and uncached."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.model = model
        self.traced = trace(model, args, kwargs)
        self.artifact = compile_traced(model, self.traced, fora(STEPS, 3))

    @property
    def reference(self) -> cg.ReferenceRunner:
        return cg.ReferenceRunner.of_plan(
            self.model, self.traced, self.artifact.program.plan, self.artifact.schedule
        )

    def check(self, sample: Callable[[Any, int], Any], compiled: cg.Runner, oracle: Any) -> None:
        """Two images in a row are the reference's, and not the uncached model's."""
        for seed in (1, 2):
            found, wanted = sample(compiled, seed), sample(oracle, seed)
            assert relative_error(found, wanted) <= 1e-5
            with torch.no_grad():
                assert relative_error(found, sample(self.model, seed)) > 1e-3


@pytest.fixture(scope="module")
def dit() -> Case:
    return Case(tiny_dit(), *dit_steps(1, batch=4)[0])


# --- a loop around a scheduler of diffusers


def test_loop_with_a_scheduler_of_diffusers(dit: Case) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)

    def sample(model: Model, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((2, 4, 8, 8), generator=generator)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            noise = model(x, t.expand(2), torch.tensor([1, 7]))[:, :4]
            x = scheduler.step(noise, t, x, generator=generator, eta=0.5).prev_sample
        return x

    dit.check(sample, cg.load(dit.artifact), dit.reference)


# --- a pipeline of diffusers


class AsTransformer(nn.Module):
    """The reference where a pipeline wants a module."""

    def __init__(self, reference: cg.ReferenceRunner) -> None:
        super().__init__()
        self.call = reference
        self.config = reference.model.config
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def test_pipeline_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = read_configs(DATA / "diffusers_tiny.json")["DiTTransformer2D"]
    config["init"]["num_embeds_ada_norm"] = 1000  # the pipeline's null class
    transformer = build(config)
    case = Case(transformer, **make_inputs(config, batch=4))
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = diffusers.DiTPipeline(transformer, fill_random(vae), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample(model: nn.Module, seed: int) -> Tensor:
        pipe.transformer = model
        pipe.to("cpu")
        made = pipe(
            [1, 7],
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=STEPS,
            output_type="pt",
        )
        return made.images

    run = cg.load(case.artifact.save(tmp_path / "dit.cgraph"))
    case.check(sample, run, AsTransformer(case.reference))
    assert pipe.transformer is transformer
    sample(run, 1)
    assert pipe.transformer is run


# --- the sampling loops of the published code of DiT


class Diffusion:
    """Ancestral and DDIM sampling with a learned variance, on some of 1000 timesteps.

    In the manner of facebookresearch/DiT (``diffusion/gaussian_diffusion.py``, ``respace.py``): the
    loop counts down, calls ``model(x, t, **model_kwargs)`` and maps its own step to a timestep.
    """

    def __init__(self, steps: int) -> None:
        kept = torch.linspace(0, 999, steps, dtype=torch.float64).round().long()
        products = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[kept]
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
        self.products, self.timesteps = products, kept
        self.betas = 1 - products / self.before
        self.smallest = self.betas * (1 - self.before) / (1 - products)

    def prediction(
        self, model: Model, x: Tensor, i: int, model_kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The noise and the log of the variance at step i."""
        t = torch.tensor([i] * x.shape[0])
        noise, fraction = model(x, self.timesteps[t], **model_kwargs).chunk(2, dim=1)
        low, high = self.smallest.clamp(min=1e-6)[i].log(), self.betas[i].log()
        fraction = (fraction + 1) / 2
        return noise, (fraction * high + (1 - fraction) * low).float()

    def p_sample_loop(
        self, model: Model, noise: Tensor, generator: torch.Generator, **model_kwargs: Any
    ) -> Tensor:
        x = noise
        for i in range(len(self.products))[::-1]:
            predicted, log_variance = self.prediction(model, x, i, model_kwargs)
            start = self.start(x, predicted, i)
            a = self.betas[i] * self.before[i].sqrt() / (1 - self.products[i])
            b = (1 - self.before[i]) * (1 - self.betas[i]).sqrt() / (1 - self.products[i])
            x = (a * start + b * x).float()
            if i:
                drawn = torch.randn(x.shape, generator=generator)
                x = x + torch.exp(0.5 * log_variance) * drawn
        return x

    def ddim_sample_loop(
        self, model: Model, noise: Tensor, generator: torch.Generator, **model_kwargs: Any
    ) -> Tensor:
        x = noise
        for i in range(len(self.products))[::-1]:
            predicted, _ = self.prediction(model, x, i, model_kwargs)
            start = self.start(x, predicted, i)
            x = (self.before[i].sqrt() * start + (1 - self.before[i]).sqrt() * predicted).float()
        return x

    def start(self, x: Tensor, noise: Tensor, i: int) -> Tensor:
        return ((x - (1 - self.products[i]).sqrt() * noise) / self.products[i].sqrt()).clamp(-1, 1)


def with_cfg(model: Model) -> Model:
    """The published ``forward_with_cfg`` around any model."""

    def forward_with_cfg(x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = model(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :3].chunk(2)
        noise = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([noise, noise]), out[:, 3:]], dim=1)

    return forward_with_cfg


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("guided", [True, False])
def test_loops_of_the_published_code(dit: Case, loop: str, guided: bool) -> None:
    diffusion = Diffusion(STEPS)

    def sample(model: Model, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((2, 4, 8, 8), generator=generator)
        draw = getattr(diffusion, loop)
        if not guided:
            return draw(model, noise, generator, y=torch.tensor([1, 7]))
        y = torch.tensor([1, 7, 10, 10])
        noise = torch.cat([noise, noise])
        return draw(with_cfg(model), noise, generator, y=y, cfg_scale=4.0)

    dit.check(sample, cg.load(dit.artifact), dit.reference)


def test_guidance_of_the_model_itself(dit: Case) -> None:
    """What the loops above are compared with is the published ``forward_with_cfg``."""
    assert isinstance(dit.model, DiT)
    x, t, _ = dit_steps(1, batch=4)[0]
    y = torch.tensor([1, 7, 10, 10])
    with torch.no_grad():
        wanted = dit.model.forward_with_cfg(x, t, y, cfg_scale=4.0)
        assert torch.equal(with_cfg(dit.model)(x, t, y, cfg_scale=4.0), wanted)


# --- cond and uncond in calls of their own


def branches(model: Any) -> Iterator[Callable[..., Tensor]]:
    """The model as cond, then as uncond."""
    for name in ("cond", "uncond"):

        def call(*args: Any, branch: str = name) -> Tensor:
            with model.cache_context(branch):
                return model(*args)

        yield call


def test_loop_with_cond_and_uncond_apart(dit: Case) -> None:
    diffusion = Diffusion(STEPS)

    def sample(models: Any, seed: int) -> Tensor:
        cond, uncond = models

        def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            without = uncond(x, t, torch.full_like(y, 10))
            return without + 4.0 * (cond(x, t, y) - without)

        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((2, 4, 8, 8), generator=generator)
        return diffusion.ddim_sample_loop(guided, noise, generator, y=torch.tensor([1, 7]))

    found = sample(tuple(branches(cg.load(dit.artifact))), 1)
    assert relative_error(found, sample((dit.reference, dit.reference), 1)) <= 1e-5
    with torch.no_grad():
        assert relative_error(found, sample((dit.model, dit.model), 1)) > 1e-3
