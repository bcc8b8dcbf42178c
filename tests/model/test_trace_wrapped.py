"""Wrapped models are refused with what to give instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachegraph.errors import ModelError, TraceError
from cachegraph.model.trace import trace
from tests.models import dit_steps, tiny_dit


class Peft(nn.Module):
    """As a model of PEFT looks from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.peft_config = model, {"default": None}

    def merge_and_unload(self) -> nn.Module:
        return self.base_model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.base_model(x, t, y)


def offloaded(model: nn.Module) -> nn.Module:
    model.blocks[0]._hf_hook = object()  # what accelerate leaves on a module
    return model


def in_fp8(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    return model


def in_groups(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("diffusers.hooks")
    here = torch.device("cpu")
    hooks.apply_group_offloading(model, here, here, offload_type="leaf_level")
    return model


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.DataParallel, "give model.module"),
        (torch.compile, "model._orig_mod"),
        (Peft, "model.merge_and_unload()"),
        (offloaded, "remove_hook_from_module"),
        (in_fp8, "compile it before enable_layerwise_casting()"),
        (in_groups, "compile it before enable_group_offload()"),
    ],
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], remedy: str) -> None:
    with pytest.raises(ModelError, match=r"is wrapped, or hooks move its weights") as caught:
        trace(wrap(tiny_dit()).eval(), dit_steps(1)[0])
    assert remedy in str(caught.value)


class Pipeline:
    """As a pipeline of diffusers looks from outside."""

    def __init__(self) -> None:
        self.components = {"vae": None, "transformer": tiny_dit()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Pipeline, "Pipeline is no model that can be traced; .*give the model in it: pipe.transf"),
        (lambda: 3, "int is no model that can be traced; expected a torch.nn.Module in Python$"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), "give the module that it was s"),
    ],
)
def test_what_is_no_model(given: Callable[[], Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        found = given()
    with pytest.raises(ModelError, match=message):
        trace(found, dit_steps(1)[0])


def test_torch_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x @ torch.ones(3, 3)

    with pytest.raises(TraceError, match=r"return x @ torch.ones\(3, 3\): torch.export cannot"):
        trace(Broken().eval(), dit_steps(1)[0])
    assert capfd.readouterr() == ("", "")


def test_inputs_in_another_dtype() -> None:
    with pytest.raises(TraceError, match=r"model is in torch\.float16: give example inputs in"):
        trace(tiny_dit().half(), dit_steps(1)[0])
