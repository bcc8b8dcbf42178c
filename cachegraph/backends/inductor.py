"""Compile the graphs with torch.compile, one whole graph a variant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cachegraph.known import StepFunction
from cachegraph.spec import TensorSpec


class Inductor:
    """torch.compile with inductor; a variant is compiled at its first call."""

    name = "inductor"
    exact = False

    def check(self, graph: fx.Graph) -> list[str]:
        """Nothing is refused: torch.compile takes every functional graph of aten operators."""
        return []

    def load(self, module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> StepFunction:
        """A function that compiles at its first call and never again for another batch.

        A batch of one is compiled apart: torch treats sizes of one as constants.
        """
        dynamic = [
            (i, dim)
            for i, spec in enumerate(inputs)
            for dim, size in enumerate(spec.shape)
            if not isinstance(size, int)
        ]
        one = torch.compile(module, fullgraph=True, dynamic=False)
        many = torch.compile(module, fullgraph=True, dynamic=None)
        marked = False

        def call(*given: Tensor) -> Sequence[Tensor]:
            nonlocal marked
            # torch compiles anew for a view that begins elsewhere in its storage.
            tensors = [t.clone() if t.storage_offset() else t for t in given]
            if any(tensors[i].shape[dim] == 1 for i, dim in dynamic):
                return one(*tensors)
            if not marked:
                # Marks stay on a tensor, and these are the sampler's: mark aliases of them.
                tensors = [t.detach() for t in tensors]
                for i, dim in dynamic:
                    torch._dynamo.mark_dynamic(tensors[i], dim)
                marked = True
            return many(*tensors)

        return call
