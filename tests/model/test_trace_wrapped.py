"""Wrapped models are refused with what to give instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cachegraph.errors import ModelError
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


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.DataParallel, "give model.module"),
        (torch.compile, "model._orig_mod"),
        (Peft, "model.merge_and_unload()"),
        (offloaded, "remove_hook_from_module"),
    ],
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], remedy: str) -> None:
    with pytest.raises(ModelError, match=r"is wrapped, or hooks move its weights") as caught:
        trace(wrap(tiny_dit()).eval(), dit_steps(1)[0])
    assert remedy in str(caught.value)
