"""Shapes of values, each computed once: passes, variants and blocks have most of them in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

Body = tuple[fx.Graph, list[fx.Node]]  # of a cache operation: its graph, and the graph's inputs


@dataclass
class Shapes:
    """What operations make of shapes, shared by all variants of a model.

    Two calls of one operation on values of the same specs (shape, strides, dtype, device) give
    values of one spec, so the first one's value stands for both.

    Attributes:
        bodies: calls of cache operations -> what they were traced to.
        inputs: names of graph inputs -> a value of their shape; a symbol of theirs means the same
            in every variant.
    """

    bodies: dict[Hashable, Body] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    _values: dict[Hashable, Any] = field(default_factory=dict)
    _specs: dict[Hashable, int] = field(default_factory=dict)
    _known: dict[int, tuple[int, Any]] = field(default_factory=dict)  # id -> spec, the value itself

    def key(self, node: fx.Node) -> Hashable:
        """What decides the shape of a call's value: specs of its inputs, and which are the same.

        Raises:
            KeyError: an input of the node has no recorded value.
        """
        place = {given: i for i, given in enumerate(node.all_input_nodes)}
        call = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: (place[n], self.spec(n.meta["val"]))
        )
        return node.target, repr(call)

    def evaluate(self, node: fx.Node) -> Any:
        """What a call makes of the recorded values of its inputs: shapes only, no data.

        Raises:
            Exception: whatever the operation says of arguments that it cannot take.
        """
        key = self.key(node)
        if key not in self._values:
            self._values[key] = _evaluate(node)
        return self._values[key]

    def body(self, node: fx.Node, trace: Callable[[fx.Node], Body]) -> Body:
        """What a call of a cache operation was traced to, the first time by ``trace``."""
        key = self.key(node)
        if key not in self.bodies:
            self.bodies[key] = trace(node)
        return self.bodies[key]

    def spec(self, value: Any) -> int:
        """A number for the spec of a value; equal specs have equal numbers."""
        known = self._known.get(id(value))
        if known is None:
            number = self._specs.setdefault(_description(value), len(self._specs))
            # The value is kept alive, so that no other gets its id.
            known = self._known[id(value)] = number, value
        return known[0]


def _description(value: Any) -> Hashable:
    leaves, form = _pytree.tree_flatten(value)
    parts = (
        (str(v.shape), str(v.stride()), v.dtype, v.device) if isinstance(v, Tensor) else str(v)
        for v in leaves
    )
    return (str(form), *parts)


def _evaluate(node: fx.Node) -> Any:
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = values
    target: Any = node.target
    inputs = node.graph.find_nodes(op="placeholder")
    modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in inputs)
    mode = next((m for m in modes if m is not None), None)
    with mode or nullcontext(), torch.no_grad():
        return target(*args, **kwargs)
