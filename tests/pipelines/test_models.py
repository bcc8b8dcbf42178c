"""What is done to a model that is accelerated: weights, layers, devices, hooks, files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.errors import InputError, ModelError
from cachegraph.pipelines.denoiser import denoiser_of
from cachegraph.pipelines.modelstate import tensors_of
from tests.pipes import FORA, FULL, PIPELINES, model, traced_once
from tools.pipeline_matrix import Reference, relative_error

DIT = PIPELINES["DiT"]
STEPS = 4


class Parts(SimpleNamespace):
    """Of a pipeline."""


class Dit:
    """A DiT pipeline that is accelerated, and what was said meanwhile."""

    def __init__(self, pipe: Any = None) -> None:
        self.pipe, self.said = pipe or DIT.build(), list[str]()

    def accelerate(self, schedule: Any = FULL, **options: Any) -> None:
        options = {"backend": "eager", "strict": True, "progress": self.said.append} | options
        cg.accelerate(self.pipe, schedule, **options)

    def draw(self, **options: Any) -> Tensor:
        return DIT.draw(self.pipe, **{"steps": STEPS} | options)

    @property
    def compiled(self) -> int:
        return sum("compiling" in line for line in self.said)

    def check(self) -> None:
        """The image is that of the model as it is now."""
        found = self.draw()
        model = self.pipe.transformer
        around = {n: vars(model).pop(n) for n in ("forward", "cache_context") if n in vars(model)}
        plain = self.draw()
        vars(model).update(around)
        assert torch.equal(found, plain)


@pytest.fixture
def dit() -> Iterator[Dit]:
    """One that a test may change."""
    found = Dit()
    yield found
    cg.restore(found.pipe)


@cache
def shared_pipe() -> Any:
    return DIT.build()


@pytest.fixture
def same_dit() -> Iterator[Dit]:
    """One that is traced once for all tests, which leave its model as it is."""
    with traced_once():
        yield Dit(shared_pipe())
    cg.restore(shared_pipe())


# --- the model stays what it is


def test_everything_else_is_the_models(same_dit: Dit, tmp_path: Path) -> None:
    model, before = same_dit.pipe.transformer, dict(vars(same_dit.pipe.transformer))
    same_dit.accelerate()
    assert same_dit.pipe.transformer is model
    assert model.config.sample_size == 8
    assert same_dit.pipe.components["transformer"] is model
    same_dit.draw()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    cg.restore(same_dit.pipe)
    assert vars(model).keys() - {"_diffusers_hook"} == before.keys()


def test_restoring_what_is_not_accelerated_changes_nothing(same_dit: Dit) -> None:
    before = dict(vars(same_dit.pipe.transformer))
    assert cg.restore(same_dit.pipe) is same_dit.pipe
    assert vars(same_dit.pipe.transformer) == before
    with pytest.raises(InputError, match="not accelerated"):
        cg.summary(same_dit.pipe)


def test_with_restores_after_an_error(same_dit: Dit) -> None:
    with suppress(ZeroDivisionError), cg.accelerated(same_dit.pipe, FULL, backend="eager") as pipe:
        assert denoiser_of(pipe.transformer) is not None
        raise ZeroDivisionError
    assert "forward" not in vars(same_dit.pipe.transformer)


def test_accelerating_again_replaces_the_schedule(same_dit: Dit) -> None:
    same_dit.accelerate(FORA)
    same_dit.accelerate(FULL)
    same_dit.check()
    cg.restore(same_dit.pipe)
    assert "forward" not in vars(same_dit.pipe.transformer)


# --- weights


def test_weights_written_in_place_are_used_from_the_next_image_on(dit: Dit) -> None:
    """As a LoRA that is fused does; nothing is compiled again."""
    dit.accelerate()
    dit.check()
    with torch.no_grad():
        for block in dit.pipe.transformer.transformer_blocks:
            block.attn1.to_q.weight.mul_(1.5)
            block.ff.net[2].weight.mul_(0.5)
    dit.check()
    assert dit.compiled == 1


def test_weights_that_are_other_tensors_now_are_used(dit: Dit) -> None:
    dit.accelerate()
    dit.check()
    state = {n: t.clone() * 1.25 for n, t in dit.pipe.transformer.state_dict().items()}
    dit.pipe.transformer.load_state_dict(state, assign=True)
    dit.check()
    assert dit.compiled == 1


class Lora(nn.Module):
    """A linear layer with an update of low rank beside it, as peft puts in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        self.scaling = {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling["default"]


def test_a_lora_that_is_loaded_scaled_and_unloaded(dit: Dit) -> None:
    dit.accelerate()
    first = dit.draw()
    attention = dit.pipe.transformer.transformer_blocks[0].attn1
    base = attention.to_q
    attention.to_q = Lora(base).eval()
    dit.check()
    attention.to_q.scaling["default"] = 0.5
    dit.check()
    assert not torch.equal(dit.draw(), first)
    attention.to_q = base
    dit.check()
    assert torch.equal(dit.draw(), first)
    assert dit.compiled == 4


@pytest.mark.slow
def test_projections_that_are_fused(dit: Dit) -> None:
    dit.accelerate()
    dit.check()
    for block in dit.pipe.transformer.transformer_blocks:
        block.attn1.fuse_projections()
    dit.check()
    assert dit.compiled == 2


@pytest.mark.slow
def test_another_dtype(dit: Dit) -> None:
    dit.accelerate()
    dit.check()
    dit.pipe.to(torch.float64)
    dit.check()
    dit.pipe.to(torch.float32)
    dit.check()


# --- hooks


def offload(model: nn.Module, moves: list[str]) -> None:
    """What ``accelerate`` does for ``enable_model_cpu_offload``: other memory for every call."""

    def move() -> None:
        moves.append("there")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()

    old = model.forward
    model._old_forward = old
    model._hf_hook = object()

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        move()
        return module._old_forward(*args, **kwargs)

    model.forward = partial(forward, model)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_that_are_moved_before_the_model_is_called(dit: Dit, first: bool) -> None:
    moves: list[str] = []
    model = dit.pipe.transformer
    if first:
        offload(model, moves)
        dit.accelerate(FORA)
    else:
        dit.accelerate(FORA)
        offload(model, moves)
    plain = DIT.build()
    for seed in (1, 2):
        found = dit.draw(seed=seed, steps=6)
        _, wanted = Reference(plain, dit.pipe).draw(DIT.draw, 1, seed=seed)
        assert relative_error(found, wanted) <= 1e-5
    assert len(moves) == 12
    assert dit.compiled == 1
    cg.restore(dit.pipe)
    assert denoiser_of(model) is None
    assert torch.equal(dit.draw(), DIT.draw(plain, steps=STEPS))


def test_hooks_that_change_what_modules_do_are_refused(dit: Dit) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = dit.pipe.transformer.transformer_blocks
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(blocks[0])
    registry.register_hook(diffusers.hooks.ModelHook(), "mine")
    with pytest.raises(ModelError, match="hooks of diffusers: mine"):
        dit.accelerate()
    registry.remove_hook("mine")
    dit.accelerate()
    blocks[1]._hf_hook = object()  # as enable_sequential_cpu_offload leaves one in each module
    with pytest.raises(ModelError, match="remove_hook_from_module"):
        dit.draw()


def test_the_caches_of_diffusers_are_refused() -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = Parts(transformer=model("FluxTransformer"), scheduler=None)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ModelError, match=r"FirstBlockCacheConfig.*disable_cache"):
        cg.accelerate(pipe, FORA)
    pipe.transformer.disable_cache()
    cg.restore(cg.accelerate(pipe, FORA))


def test_a_pipeline_without_a_transformer_is_refused(same_dit: Dit) -> None:
    with pytest.raises(ModelError, match=r"no pipeline whose denoiser.*cachegraph.compile"):
        cg.accelerate(same_dit.pipe.transformer, FORA)


def test_a_model_of_two_pipelines_is_refused_by_the_second(same_dit: Dit) -> None:
    same_dit.accelerate()
    other = copy.copy(same_dit.pipe)
    with pytest.raises(ModelError, match="accelerated in another pipeline"):
        cg.accelerate(other, FORA)


# --- on disk


def test_what_was_compiled_is_found_again(dit: Dit, tmp_path: Path) -> None:
    dit.accelerate(FORA, out=tmp_path)
    first = [dit.draw(), dit.draw(steps=5)]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert len({(folder / "weights.safetensors").stat().st_ino for folder in kept}) == 1
    again = Dit()
    again.accelerate(FORA, out=tmp_path)
    assert all(map(torch.equal, [again.draw(), again.draw(steps=5)], first))
    assert again.compiled == 0
    form = denoiser_of(again.pipe.transformer).forms.compiled[0]
    own = {tensor.data_ptr() for tensor in tensors_of(again.pipe.transformer).values()}
    assert {w.data_ptr() for w in form.artifact.weights.values()} <= own
    cg.load(kept[0])  # an artifact like any other
    with torch.no_grad():
        again.pipe.transformer.proj_out_1.weight.mul_(2)
    again.accelerate(FORA, out=tmp_path)
    again.draw()
    assert again.compiled == 1
    cg.restore(again.pipe)


def test_a_damaged_artifact_is_compiled_anew(same_dit: Dit, tmp_path: Path) -> None:
    same_dit.accelerate(FORA, out=tmp_path)
    first = same_dit.draw()
    (folder,) = tmp_path.iterdir()
    (folder / "schedule.yaml").write_text("something else")
    same_dit.accelerate(FORA, out=tmp_path)
    with pytest.warns(UserWarning, match="compiled anew"):
        assert torch.equal(same_dit.draw(), first)
    same_dit.accelerate(FORA, out=tmp_path)
    assert torch.equal(same_dit.draw(), first)
    assert same_dit.compiled == 2
