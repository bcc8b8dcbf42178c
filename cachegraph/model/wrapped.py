"""Models inside of something else, told apart by what they carry: the wrapper is not traced."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cachegraph.errors import ModelError


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a wrapper, or hooks that move weights while the model runs.

    Raises:
        ModelError: with what to give instead.
    """
    remedy = ""
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        remedy = "give model.module"
    elif "_orig_mod" in model._modules:
        remedy = "give the model before torch.compile: model._orig_mod"
    elif hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        remedy = "give model.merge_and_unload()"
    elif any(hasattr(module, "_hf_hook") for module in model.modules()):
        remedy = (
            "remove the hooks of accelerate first: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if remedy:
        raise ModelError(
            f"{type(model).__name__} is wrapped, or hooks move its weights",
            expected="the model itself, with its weights in place",
            remedy=remedy,
        )
