"""Pipelines of diffusers from tiny random parts, drawn with options that tests vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from cachegraph.compiler import compile as compiler
from cachegraph.model.trace import TracedModel, trace
from cachegraph.pipelines.forms import in_words
from tests.models import DATA, build, fill_random, read_configs

STEPS = 6
FORA: Mapping[str, object] = {"cachegraph": 1, "policy": {"method": "fora", "interval": 3}}
FULL: Mapping[str, object] = {"cachegraph": 1, "policy": {"method": "full"}}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pipeline:
    """How a pipeline is built and called.

    Attributes:
        build: makes it.
        arguments: of a call, from prompt, batch, prompt length, height and guidance.
        branches: calls a step with guidance.
        has_callback: it takes ``callback_on_step_end``.
    """

    build: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    branches: int = 1
    has_callback: bool = True

    def draw(
        self,
        pipe: Any,
        *,
        seed: int = 0,
        prompt: int = 0,
        steps: int = STEPS,
        guided: bool = True,
        batch: int = 1,
        length: int = 8,
        height: int = 64,
        **more: Any,
    ) -> Tensor:
        """The latents of an image."""
        arguments = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            "return_dict": False,
        }
        arguments |= self.arguments(prompt, batch, length, height, guided)
        pipe.set_progress_bar_config(disable=True)
        return pipe(**arguments | more)[0]


def model(name: str, **sizes: Any) -> nn.Module:
    """A tiny transformer of diffusers with random weights."""
    config = dict(read_configs(DATA / "diffusers_tiny.json")[name])
    config["init"] = config["init"] | sizes
    return build(config)


def _dit() -> Any:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    transformer = model("DiTTransformer2D", num_embeds_ada_norm=1000)
    return diffusers.DiTPipeline(transformer, fill_random(vae), diffusers.DDIMScheduler())


def _dit_call(prompt: int, batch: int, _length: int, _height: int, guided: bool) -> dict[str, Any]:
    return {
        "class_labels": [3 + prompt + i for i in range(batch)],
        "guidance_scale": 4.0 if guided else 1.0,
        "output_type": "pt",
    }


def _flux(**sizes: Any) -> Any:
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    transformer = model("FluxTransformer", in_channels=16, guidance_embeds=True, **sizes)
    return FluxPipeline(scheduler, None, None, None, None, None, transformer)


def _flux_call(prompt: int, batch: int, length: int, height: int, guided: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt_embeds": noise(batch, length, 32, seed=prompt),
        "pooled_prompt_embeds": noise(batch, 32, seed=prompt + 1),
        "height": height,
        "width": 64,
    }
    if guided:
        arguments |= {
            "negative_prompt_embeds": noise(batch, length, 32, seed=prompt + 100),
            "negative_pooled_prompt_embeds": noise(batch, 32, seed=prompt + 101),
            "true_cfg_scale": 4.0,
        }
    return arguments


def _sd3() -> Any:
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    transformer = model("SD3Transformer", patch_size=2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)


def _sd3_call(prompt: int, batch: int, length: int, height: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, length, 32, seed=prompt),
        "pooled_prompt_embeds": noise(batch, 64, seed=prompt + 1),
        "negative_prompt_embeds": noise(batch, length, 32, seed=prompt + 100),
        "negative_pooled_prompt_embeds": noise(batch, 64, seed=prompt + 101),
        "guidance_scale": 4.0 if guided else 1.0,
        "height": height,
        "width": 64,
    }


def _pixart() -> Any:
    pytest.importorskip("transformers")
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    sizes = {"caption_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000}
    sizes |= {"attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = model("PixArtTransformer2D", **sizes)
    return PixArtAlphaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler())


def _pixart_call(prompt: int, batch: int, length: int, height: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, length, 8, seed=prompt),
        "prompt_attention_mask": (torch.arange(length) < length - 2).repeat(batch, 1).float(),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(batch, length, 8, seed=prompt + 100),
        "negative_prompt_attention_mask": torch.ones(batch, length),
        "guidance_scale": 4.5 if guided else 1.0,
        "height": height,
        "width": 64,
        "use_resolution_binning": False,
    }


def _wan(**second: Any) -> Any:
    pytest.importorskip("transformers")
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    transformer = model("WanTransformer3D")
    return WanPipeline(None, None, None, scheduler, transformer=transformer, **second)


def _wan_of_two() -> Any:
    second = fill_random(model("WanTransformer3D"), seed=1)
    return _wan(transformer_2=second, boundary_ratio=0.9)


def _wan_call(prompt: int, batch: int, length: int, height: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, length, 16, seed=prompt),
        "negative_prompt_embeds": noise(batch, length, 16, seed=prompt + 100),
        "guidance_scale": 4.0 if guided else 1.0,
        "height": height,
        "width": 64,
        "num_frames": 5,
    }


PIPELINES = {
    "DiT": Pipeline(_dit, _dit_call, has_callback=False),
    "PixArt": Pipeline(_pixart, _pixart_call, has_callback=False),
    "SD3": Pipeline(_sd3, _sd3_call),
    "Flux": Pipeline(_flux, _flux_call, branches=2),
    "Wan": Pipeline(_wan, _wan_call, branches=2),
    "Wan2.2": Pipeline(_wan_of_two, _wan_call, branches=2),
}


_TRACES: dict[str, tuple[nn.Module, TracedModel]] = {}  # with their models, so that ids are theirs


def trace_once(model: nn.Module, args: Sequence[Any], kwargs: Any, **options: Any) -> TracedModel:
    """As ``trace``, of which every call costs seconds."""
    key = f"{id(model)} {in_words(kwargs)} {options} {model}"
    if key not in _TRACES:
        _TRACES[key] = model, trace(model, args, kwargs, **options)
    return _TRACES[key][1]


def traced_once() -> Any:
    """Tests that accelerate the same model several times trace it once a form of call."""
    return mock.patch.object(compiler, "trace", trace_once)
