"""Whether a call is one that the graphs were made for, and what to do if not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachegraph.errors import SessionError
from cachegraph.model.conditions import failed
from cachegraph.spec import SIZES, Dim, TensorSpec, evaluate

from .program import Program


def inputs_of(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> list[Tensor] | None:
    """A call's tensors in graph order, those of its first item where items are taken apart.

    Args:
        program: says what a call has to be.
        args: of the call.
        kwargs: of the call.
        device: of the graphs.

    Returns:
        None where the call has another form: other sizes, constants or arguments.
    """
    signature, items = program.signature, program.items
    try:
        given = signature.bind(args, kwargs)
        if items is not None and items.count(given) > 1:
            given = items.part(given, 0)
        inputs = signature.flatten((), given)
        check_sizes(program, inputs, device)
    except SessionError:
        return None
    return inputs


def check_sizes(
    program: Program,
    inputs: Sequence[Tensor],
    device: torch.device,
    but: Collection[str] = (),
) -> None:
    """Refuse tensors that the graphs were not made for.

    Args:
        program: says which they were made for.
        inputs: the model's, in graph order.
        device: of the graphs.
        but: names of inputs whose sizes are not looked at.

    Raises:
        SessionError: another dtype, rank, size or device.
    """
    _check_kinds(program, inputs, device)
    sizes: dict[str, int] = {}
    for (name, spec), tensor in zip(program.signature.inputs, inputs, strict=True):
        for dim, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                sizes.setdefault(dim, size)
        if name not in but and (found := _other_size(spec, tensor, sizes, program)):
            raise _misfit(name, spec, tensor, device, *found)
    if (broken := failed(program.conditions, sizes)) is not None:
        raise SessionError(
            "the model does something else for inputs of these sizes than was compiled",
            expected=_in_words(broken, program),
            found=_in_words(", ".join(f"{name} = {size}" for name, size in sizes.items()), program),
            remedy="compile it with example inputs of these sizes",
        )


def _check_kinds(program: Program, inputs: Sequence[Tensor], device: torch.device) -> None:
    """Refuse tensors that no size would make right.

    Args:
        program: says what the graphs were made for.
        inputs: the model's, in graph order.
        device: of the graphs.

    Raises:
        SessionError: another dtype, rank or device.
    """
    for (name, spec), tensor in zip(program.signature.inputs, inputs, strict=True):
        if found := _other_kind(spec, tensor, device):
            raise _misfit(name, spec, tensor, device, *found)


def _misfit(
    name: str, spec: TensorSpec, tensor: Tensor, device: torch.device, found: str, remedy: str
) -> SessionError:
    return SessionError(
        f"input {name!r} does not fit the compiled graphs",
        expected=f"{spec} on {device.type}",
        found=f"{TensorSpec.of(tensor)} on {tensor.device.type}: {found}",
        remedy=remedy,
    )


def _in_words(text: str, program: Program) -> str:
    """A condition or size with symbols called as people call them."""
    return re.sub(r"\w+", lambda word: program.names.get(word[0], word[0]), text)


def _other_kind(spec: TensorSpec, tensor: Tensor, device: torch.device) -> tuple[str, str] | None:
    """What is wrong with a tensor whatever its sizes, and what to do; None where nothing is."""
    if tensor.device.type != device.type:
        return "another device", f"move it: .to({device.type!r}), or load the artifact there"
    if tensor.dtype != spec.dtype:
        others = f"or compile the model in {tensor.dtype}"
        floats = tensor.is_floating_point() and spec.dtype.is_floating_point
        return "another dtype", f"cast it: .to({spec.dtype})" + (f", {others}" if floats else "")
    if tensor.ndim != len(spec.shape):
        return f"{tensor.ndim} dimensions instead of {len(spec.shape)}", "give it as it was traced"
    return None


def _other_size(
    spec: TensorSpec, tensor: Tensor, sizes: Mapping[str, int], program: Program
) -> tuple[str, str] | None:
    """What is wrong with a tensor's sizes, and what to do; None where they fit.

    Args:
        spec: of the graphs' input.
        tensor: of the call.
        sizes: of the symbols, as the first inputs that have them say.
        program: for which sizes vary, and what they are called.
    """
    for axis, (dim, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
        wanted = _size(dim, sizes)
        if wanted == size:
            continue
        found = f"axis {axis} is {size} instead of {'another size' if wanted is None else wanted}"
        if isinstance(dim, str):
            return f"{found} ({dim})", f"give all inputs the same {_in_words(dim, program)}"
        if axis == 0 and program.batch is None:
            return found, "the batch is fixed: compile with example inputs of this size"
        vary = [f"the {name}" for name in SIZES if name in program.names.values()]
        but = f", but for {' and '.join(vary)}" if vary else ""
        return found, (
            f"sizes are fixed{but}: compile with dynamic=... "
            f"(--dynamic {','.join(SIZES)}), or with example inputs of this size, too: also=... "
            "(--also), or pad the input where the model takes a mask"
        )
    return None


def _size(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    try:
        return dim if isinstance(dim, int) else evaluate(dim, sizes)
    except (KeyError, ZeroDivisionError):
        return None
