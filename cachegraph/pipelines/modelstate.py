"""What a traced graph has of a model beside its weights, to tell when it must be traced anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.errors import ModelError
from cachegraph.model.wrapped import refuse_wrapped

_INTERNAL = set(vars(nn.Module()))  # of every module: parameters, hooks, whether it is training
# What is put on a model from outside and changes nothing that it computes.
_OURS = {"forward", "cache_context", "_hf_hook", "_old_forward", "_diffusers_hook"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def structure_of(model: nn.Module) -> tuple[object, ...]:
    """Everything but the numbers in the weights: modules, their settings, forms of their tensors.

    A LoRA that is loaded, projections that are fused, another dtype or device make another one.
    """
    modules = tuple(
        (name, type(module), len(module._forward_hooks) + len(module._forward_pre_hooks), settings)
        for name, module in model.named_modules()
        for settings in [tuple(_settings(module))]
    )
    forms = tuple((n, t.dtype, t.device, tuple(t.shape)) for n, t in tensors_of(model).items())
    return modules, forms


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for key, value in vars(module).items():
        if key not in _INTERNAL and key not in _OURS:
            yield key, _described(value)


def _described(value: Any, deep: int = 3) -> object:
    """Plain data as it is, of all else the type; functions by what they are."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping) and deep:
        return tuple((str(k), _described(v, deep - 1)) for k, v in value.items())
    if isinstance(value, set) and deep:
        return tuple(sorted((_described(v, deep - 1) for v in value), key=repr))
    if isinstance(value, list | tuple) and deep:
        return tuple(_described(v, deep - 1) for v in value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model that is wrapped, or in which something else changes what modules do.

    Raises:
        ModelError: with what to do about it.
    """
    with bare(model):
        refuse_wrapped(model)
    found = remedy = ""
    hooks = sorted({name for module in model.modules() for name in _hooks_of(module)})
    if getattr(model, "_cache_config", None) is not None:
        found = f"a cache of diffusers: {type(model._cache_config).__name__}"
        remedy = "call disable_cache() on it first"
    elif hooks:
        found = f"hooks of diffusers: {', '.join(hooks)}"
        remedy = "load the model without them; pipe.enable_model_cpu_offload() can be used"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        found = "it is compiled as a whole"
        remedy = "do without model.compile(): cachegraph compiles the graphs"
    if found:
        raise ModelError(
            f"{type(model).__name__} cannot be accelerated",
            expected="a model whose modules do what their classes say",
            found=found,
            remedy=remedy,
        )


def _hooks_of(module: nn.Module) -> Iterator[str]:
    registry = vars(module).get("_diffusers_hook")
    yield from getattr(registry, "hooks", ())


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The model as its class has it: without what was put around its ``forward``."""
    covers = {name: vars(model).pop(name) for name in _OURS & set(vars(model))}
    try:
        yield
    finally:
        vars(model).update(covers)
