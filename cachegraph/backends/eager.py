"""Run the graphs operator by operator, bit for bit as the original model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cachegraph.runtime.known import StepFunction
from cachegraph.spec import TensorSpec

from . import InMemory


class Eager(InMemory):
    """torch's eager mode."""

    name = "eager"
    exact = True

    def load(self, module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> StepFunction:
        """The module itself."""
        return module
