"""Whether a call's tensors are those that the graphs were made for, and what to do if not."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cachegraph.spec import SIZES, Dim, TensorSpec, evaluate

from .program import Program


def misfit(
    spec: TensorSpec,
    tensor: Tensor,
    sizes: Mapping[str, int],
    device: torch.device,
    program: Program,
) -> tuple[str, str] | None:
    """What is wrong with a tensor, and what to do; None where it fits.

    Args:
        spec: of the graphs' input.
        tensor: of the call.
        sizes: of the symbols, as the first inputs that have them say.
        device: of the graphs.
        program: for which sizes vary, and what they are called.
    """
    if tensor.device.type != device.type:
        return "another device", f"move it: .to({device.type!r}), or load the artifact there"
    if tensor.dtype != spec.dtype:
        others = f"or compile the model in {tensor.dtype}"
        floats = tensor.is_floating_point() and spec.dtype.is_floating_point
        return "another dtype", f"cast it: .to({spec.dtype})" + (f", {others}" if floats else "")
    if tensor.ndim != len(spec.shape):
        return f"{tensor.ndim} dimensions instead of {len(spec.shape)}", "give it as it was traced"
    for axis, (dim, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
        wanted = _size(dim, sizes)
        if wanted == size:
            continue
        found = f"axis {axis} is {size} instead of {'another size' if wanted is None else wanted}"
        if isinstance(dim, str):
            words = re.sub(r"\w+", lambda word: program.names.get(word[0], word[0]), dim)
            return f"{found} ({dim})", f"give all inputs the same {words}"
        if axis == 0 and program.batch is None:
            return found, "the batch is fixed: compile with example inputs of this size"
        vary = [f"the {name}" for name in SIZES if name in program.names.values()]
        but = f", but for {' and '.join(vary)}" if vary else ""
        return found, (
            f"sizes are fixed{but}: compile with dynamic=... "
            f"(--dynamic {','.join(SIZES)}), or with example inputs of this size, an artifact for "
            "each, or pad the input where the model takes a mask"
        )
    return None


def _size(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    try:
        return dim if isinstance(dim, int) else evaluate(dim, sizes)
    except (KeyError, ZeroDivisionError):
        return None
