"""Lowered graphs as programs of ``torch.export``, which is what ahead-of-time compilers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from cachegraph.spec import TensorSpec


def export_graph(
    module: fx.GraphModule,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    device: torch.device | str = "cpu",
) -> ExportedProgram:
    """Export a lowered graph; its weights are buffers under their own names.

    Args:
        module: the graph.
        inputs: spec of each input; symbolic sizes stay dynamic.
        sizes: an example for each symbolic size; not 0 or 1, which torch takes for constants.
        device: that the graph runs on.
    """
    example = tuple(torch.zeros(s.sizes(sizes), dtype=s.dtype, device=device) for s in inputs)
    varying = tuple(
        {i: Dim.AUTO for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs
    )
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=varying, strict=False)
