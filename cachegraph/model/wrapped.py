"""Models inside of something else, told apart by what they carry: the wrapper is not traced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cachegraph.errors import ModelError

# Hooks of diffusers -> what to do about them.
_HOOKS = {
    "layerwise_casting": "compile it before enable_layerwise_casting(), which keeps weights in "
    "another dtype than it computes in",
    "group_offloading": "compile it before enable_group_offload()",
}


def refuse_wrapped(model: object) -> None:
    """Refuse what is no model, a wrapper, or hooks that move or cast weights while it runs.

    Raises:
        ModelError: with what to give instead.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{name} is no model that can be traced",
            expected="a torch.nn.Module in Python",
            remedy=_instead(model),
        )
    if remedy := _unwrapped(model):
        raise ModelError(
            f"{name} is wrapped, or hooks move its weights",
            expected="the model itself, with its weights in place",
            remedy=remedy,
        )


def _instead(model: object) -> str:
    """What to give for an object that is no model."""
    parts = getattr(model, "components", None)
    if isinstance(parts, Mapping):  # a pipeline of diffusers
        known = next((n for n in ("transformer", "unet") if n in parts), "transformer")
        return f"give the model in it: pipe.{known}"
    if isinstance(model, torch.jit.ScriptModule):
        return "give the module that it was scripted or traced from"
    return ""


def _unwrapped(model: nn.Module) -> str:
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return "give model.module"
    if "_orig_mod" in model._modules:
        return "give the model before torch.compile: model._orig_mod"
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        return "give model.merge_and_unload()"
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            return (
                "remove the hooks of accelerate first: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks:
            if hook in _HOOKS:
                return _HOOKS[hook]
    return ""
