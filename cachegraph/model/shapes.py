"""Shapes of values, each computed once: passes, variants and blocks have most of them in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree

from cachegraph.spec import spec_text

Body = tuple[fx.Graph, list[fx.Node]]  # of a cache operation: its graph, and the graph's inputs
Names = tuple[str, ...]  # of symbols

_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Shapes:
    """What operations make of shapes, shared by all variants of a model.

    Two calls of one operation on values of the same specs (shape, strides, dtype, device) give
    values of one spec, so the first one's value stands for both. The symbols of ``inputs`` differ
    in their names alone, so calls that differ in these alone give what differs in these alone.

    Attributes:
        inputs: names of graph inputs -> a value of their shape; a symbol of theirs means the same
            in every variant.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    _bodies: dict[Hashable, dict[Names, Body]] = field(default_factory=dict)
    _values: dict[Hashable, dict[Names, Any]] = field(default_factory=dict)
    _specs: dict[Hashable, int] = field(default_factory=dict)
    _known: dict[int, tuple[int, Any]] = field(default_factory=dict)  # id -> spec, the value itself
    _texts: dict[int, str] = field(default_factory=dict)  # by spec
    _forms: dict[int, tuple[Hashable, Names]] = field(default_factory=dict)  # by spec
    _others: dict[tuple[Hashable, Names], Any] = field(default_factory=dict)  # by form

    def key(self, node: fx.Node) -> tuple[Hashable, Names]:
        """What decides the shape of a call's value: specs of its inputs, and which are the same.

        Returns:
            The call with the symbols of ``inputs`` numbered, and their names.

        Raises:
            KeyError: an input of the node has no recorded value.
        """
        numbers: dict[str, int] = {}
        given = {}
        for i, n in enumerate(node.all_input_nodes):
            form, names = self._form(n.meta["val"])
            given[n] = i, form, *(numbers.setdefault(name, len(numbers)) for name in names)
        keywords = tuple((name, frozen(value, given)) for name, value in node.kwargs.items())
        return (node.target, frozen(node.args, given), keywords), tuple(numbers)

    def evaluate(self, node: fx.Node) -> Any:
        """What a call makes of the recorded values of its inputs: shapes only, no data.

        Raises:
            Exception: whatever the operation says of arguments that it cannot take.
        """
        call, names = self.key(node)
        known = self._values.setdefault(call, {})
        if names not in known:
            first = next(iter(known), names)
            known[names] = self._renamed(known[first], first, names) if known else _evaluate(node)
        return known[names]

    def body(self, node: fx.Node, trace: Callable[[fx.Node], Body]) -> Body:
        """What a call of a cache operation was traced to, the first time by ``trace``."""
        call, names = self.key(node)
        known = self._bodies.setdefault(call, {})
        if names not in known:
            first = next(iter(known), names)
            known[names] = self._renamed_body(known[first], first, names) if known else trace(node)
        return known[names]

    def spec(self, value: Any) -> int:
        """A number for the spec of a value; equal specs have equal numbers."""
        known = self._known.get(id(value))
        if known is None:
            number = self._specs.setdefault(_description(value), len(self._specs))
            # The value is kept alive, so that no other gets its id.
            known = self._known[id(value)] = number, value
        return known[0]

    def _form(self, value: Any) -> tuple[Hashable, Names]:
        """The spec of a value with the symbols of ``inputs`` numbered, and their names."""
        spec = self.spec(value)
        if spec not in self._forms:
            ours, numbers = self._symbols(), dict[str, int]()

            def numbered(word: re.Match[str]) -> str:
                known = word[0] in ours
                return f"?{numbers.setdefault(word[0], len(numbers))}" if known else word[0]

            form = _WORD.sub(numbered, repr(_description(value)))
            self._forms[spec] = form, tuple(numbers)
        return self._forms[spec]

    def _symbols(self) -> dict[str, sympy.Expr]:
        sizes: Iterator[Any] = (size for value in self.inputs.values() for size in value.shape)
        return {str(s): s.node.expr for s in sizes if isinstance(s, torch.SymInt)}

    def _renamed(self, value: Any, old: Names, new: Names) -> Any:
        """A value with other symbols in its sizes; one for all that are alike then."""
        form, mine = self._form(value)
        names = dict(zip(old, new, strict=True))
        wanted = form, tuple(names[name] for name in mine)
        if wanted[1] == mine:
            return value
        if wanted not in self._others:
            symbols = self._symbols()
            given = {symbols[name]: symbols[names[name]] for name in mine}
            self._others[wanted] = _substituted(value, given)
        return self._others[wanted]

    def _renamed_body(self, body: Body, old: Names, new: Names) -> Body:
        graph = fx.Graph()
        graph.output(graph.graph_copy(body[0], {}))
        for node in graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = self._renamed(node.meta["val"], old, new)
        return graph, graph.find_nodes(op="placeholder")

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


def _substituted(value: Any, symbols: Mapping[sympy.Expr, sympy.Expr]) -> Any:
    """A value with other symbols, of the same hints, in its sizes."""

    def size(number: Any) -> Any:
        if not isinstance(number, torch.SymInt):
            return number
        form: Any = number.node
        return form.shape_env.create_symintnode(form.expr.xreplace(symbols), hint=form.hint)

    def leaf(old: Any) -> Any:
        if not isinstance(old, Tensor):
            return size(old)
        fake: Any = old
        sizes, strides = (tuple(map(size, given)) for given in (fake.shape, fake.stride()))
        with fake.fake_mode:
            return torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device)

    return _pytree.tree_map(leaf, value)


def _evaluate(node: fx.Node) -> Any:
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = values
    target: Any = node.target
    inputs = node.graph.find_nodes(op="placeholder")
    modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in inputs)
    mode = next((m for m in modes if m is not None), None)
    with mode or nullcontext(), torch.no_grad():
        return target(*args, **kwargs)


def make_node(
    graph: fx.Graph, target: Any, args: Any, like: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """A call at the graph's point of insertion, with the shape that it has.

    Args:
        graph: to put it in.
        target: operator.
        args: nodes and constants.
        like: of whose module the call becomes a part.
        kwargs: the same by name.
    """
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    node.meta["val"] = _evaluate(node)
    return node
