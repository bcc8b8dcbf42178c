"""What pages say can be typed in: every example runs, and is short."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph.pipelines import accelerate as module
from tests.models import compile_traced, fill_random, fora, relative_error, shared_dit
from tests.pipes import PIPELINES, noise
from tools.pipeline_matrix import Reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OURS = ("quickstart", "samplers-diffusers", "samplers-k-diffusion", "samplers-comfyui")
STEPS = 8
LABELS = torch.tensor([1, 7])


def examples(page: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(page: str, **names: Any) -> dict[str, Any]:
    """What the page's example leaves behind."""
    (code,) = examples(page)
    namespace: dict[str, Any] = {"cg": cg, "torch": torch} | names
    exec(compile(code, f"{page}.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", OURS)
def test_examples_are_short(page: str) -> None:
    for code in examples(page):
        assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_quick_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(module.accelerate.__kwdefaults__, "backend", "eager")
    pipe = PIPELINES["Flux"].build()
    from diffusers import AutoencoderKL, FluxPipeline

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, shift_factor=0.0)
    pipe.register_modules(vae=fill_random(vae))
    pipe.set_progress_bar_config(disable=True)
    encoded = noise(1, 8, 32), noise(1, 32), torch.zeros(8, 3)
    pipe.encode_prompt = lambda **_: encoded
    pipe.to = lambda _: pipe
    pipe.default_sample_size = 8
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pipe)
    made = run("quickstart")
    assert made["image"].size == (8, 8)
    said = capsys.readouterr()
    assert "cachegraph: compiling for 28 steps, hidden_states f32[1, 16, 16]" in said.err
    assert "10 computed, 18 reused" in said.out
    assert "forward" not in vars(pipe.transformer)


def test_loop_around_a_scheduler_of_diffusers() -> None:
    pipe = PIPELINES["DiT"].build()
    torch.manual_seed(0)
    made = run("samplers-diffusers", pipe=pipe)
    assert "forward" not in vars(pipe.transformer)
    labels = torch.tensor([1, 7])

    def draw(pipe: Any) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return made["draw"](pipe, labels, 20)

    cg.accelerate(pipe, "fora-n3", backend="eager", strict=True)
    assert torch.equal(draw(pipe), made["image"])
    plain, wanted = Reference(PIPELINES["DiT"].build(), pipe).draw(draw, 1)
    assert relative_error(made["image"], wanted) <= 1e-5
    assert relative_error(made["image"], plain) > 1e-3
    cg.restore(pipe)


@pytest.fixture(scope="module")
def artifact() -> cg.Artifact:
    return compile_traced(*shared_dit(), fora(STEPS, 3))


def reference(artifact: cg.Artifact) -> cg.ReferenceRunner:
    plan, schedule = artifact.program.plan, artifact.schedule
    return cg.ReferenceRunner.of_plan(*shared_dit(), plan, schedule)


def test_loop_in_the_style_of_k_diffusion(artifact: cg.Artifact) -> None:
    torch.manual_seed(0)
    made = run("samplers-k-diffusion", artifact=artifact, labels=LABELS)
    hooks = reference(artifact)
    made["run"] = hooks  # what the page's functions call
    torch.manual_seed(0)
    start = torch.randn(2, 4, 8, 8) * 10
    wanted = made["sample_euler"](made["denoiser"], start, made["sigmas"])
    assert relative_error(made["image"], wanted) <= 1e-5
    made["run"] = lambda x, t, y, step: shared_dit()[0](x, t, y)
    with torch.no_grad():
        plain = made["sample_euler"](made["denoiser"], start, made["sigmas"])
    assert relative_error(made["image"], plain) > 1e-3


def sample_as_comfyui(call: Any, seed: int, stop: int = STEPS) -> Tensor:
    """Cond and uncond in one list, as its samplers call the wrapper."""
    x, labels = noise(1, 4, 8, 8, seed=seed), torch.tensor([seed, 10])
    for step in range(stop):
        time = torch.full((2,), 900 - 100 * step)
        given = {"input": torch.cat([x, x]), "timestep": time, "c": {"context": labels}}
        with torch.no_grad():
            cond, uncond = call(None, {**given, "cond_or_uncond": [0, 1]})[:, :4].chunk(2)
        x = x - 0.1 * (uncond + 4.0 * (cond - uncond))
    return x


def test_wrapper_in_the_style_of_comfyui(artifact: cg.Artifact) -> None:
    made = run("samplers-comfyui", artifact=artifact)
    hooks = reference(artifact)
    for seed in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cg.errors.UnfinishedWarning)
            found = sample_as_comfyui(made["call"], seed)
        wanted = sample_as_comfyui(
            lambda _, given: hooks(given["input"], given["timestep"], given["c"]["context"]), seed
        )
        assert relative_error(found, wanted) <= 1e-5
        sample_as_comfyui(made["call"], 5, stop=3)  # cancelled; then another image


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in (*OURS, "refused"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
