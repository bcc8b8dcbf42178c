"""Compile the graphs with torch.compile, one whole graph a variant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cachegraph.runtime.known import StepFunction
from cachegraph.spec import TensorSpec

from . import InMemory


class Inductor(InMemory):
    """torch.compile with inductor; a variant is compiled at its first call."""

    name = "inductor"

    def load(self, module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> StepFunction:
        """A function that compiles at its first call and never again for other sizes.

        Sizes of one are compiled apart, such as a batch of one: torch treats them as constants. All
        other symbolic sizes, such as numbers of tokens, vary there too.
        """
        dynamic = [
            (i, dim)
            for i, spec in enumerate(inputs)
            for dim, size in enumerate(spec.shape)
            if not isinstance(size, int)
        ]
        compiled = dict[frozenset[tuple[int, int]], StepFunction]()  # by which sizes are one

        def call(*given: Tensor) -> Sequence[Tensor]:
            # torch compiles anew for a view that begins elsewhere in its storage.
            tensors = [t.clone() if t.storage_offset() else t for t in given]
            single = frozenset((i, dim) for i, dim in dynamic if tensors[i].shape[dim] == 1)
            if single not in compiled:
                automatic = False if single else None
                compiled[single] = torch.compile(module, fullgraph=True, dynamic=automatic)
                # Marks stay on a tensor, and these are the sampler's: mark aliases of them.
                tensors = [t.detach() for t in tensors]
                for i, dim in dynamic:
                    if (i, dim) in single:
                        continue
                    # An expression may have one value only: (2*batch)//batch.
                    plain = str(inputs[i].shape[dim]).isidentifier()
                    mark = torch._dynamo.mark_dynamic if plain else torch._dynamo.maybe_mark_dynamic
                    mark(tensors[i], dim)
            return compiled[single](*tensors)

        return call
