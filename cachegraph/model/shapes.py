"""Shapes of values, each computed once: passes, variants and blocks have most of them in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from cachegraph.spec import spec_text

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
    _texts: dict[int, str] = field(default_factory=dict)  # by spec

    def key(self, node: fx.Node) -> Hashable:
        """What decides the shape of a call's value: specs of its inputs, and which are the same.

        Raises:
            KeyError: an input of the node has no recorded value.
        """
        given = {n: (i, self.spec(n.meta["val"])) for i, n in enumerate(node.all_input_nodes)}
        keywords = tuple((name, frozen(value, given)) for name, value in node.kwargs.items())
        return node.target, frozen(node.args, given), keywords

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

    def text(self, value: Any) -> str:
        """:func:`spec_text`, written once for equal specs: symbols take long to print."""
        number = self.spec(value)
        if number not in self._texts:
            self._texts[number] = spec_text(value)
        return self._texts[number]


def frozen(value: Any, given: Mapping[fx.Node, Hashable]) -> Hashable:
    """An argument as a key: types count, for 1 equals True and 1.0."""
    if isinstance(value, fx.Node):
        return fx.Node, given[value]
    if isinstance(value, list | tuple):
        return type(value).__name__, *(frozen(v, given) for v in value)
    if value is None or isinstance(value, int | str | torch.dtype):
        return type(value), value
    return type(value), repr(value if not isinstance(value, dict) else _items(value, given))


def _items(value: dict[Any, Any], given: Mapping[fx.Node, Hashable]) -> list[Hashable]:
    return [(key, frozen(v, given)) for key, v in value.items()]


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
