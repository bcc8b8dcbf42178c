"""Whether a call's tensors are those that the graphs were made for, and what to do if not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cachegraph.spec import Dim, TensorSpec, evaluate


def misfit(
    spec: TensorSpec,
    tensor: Tensor,
    sizes: Mapping[str, int],
    device: torch.device,
    batch: str | None,
) -> tuple[str, str] | None:
    """What is wrong with a tensor, and what to do; None where it fits.

    Args:
        spec: of the graphs' input.
        tensor: of the call.
        sizes: of the symbols, as the first inputs that have them say.
        device: of the graphs.
        batch: the symbol of the batch; None where it is fixed.
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
            return (
                f"{found} ({dim})",
                f"give all inputs the same {'batch' if dim == batch else dim}",
            )
        if axis == 0 and batch is None:
            return found, "the batch is fixed: compile with example inputs of this size"
        return found, (
            "sizes are fixed, but for the batch: compile with example inputs of this size, "
            "an artifact for each, or pad the input where the model takes a mask"
        )
    return None


def _size(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    try:
        return dim if isinstance(dim, int) else evaluate(dim, sizes)
    except (KeyError, ZeroDivisionError):
        return None
