"""Complex numbers as pairs of real ones: ONNX has none, and rotary tables are made of them.

An input or output that is complex becomes a real one with the two parts along a last axis of its
own, which is how its memory looks (``torch.view_as_real``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.errors import BackendError
from cachegraph.graph.step_graph import copy_module
from cachegraph.spec import TensorSpec

aten = torch.ops.aten
Pair = tuple[Any, Any]  # real and imaginary part: nodes, or tuples of nodes

_VIEWS = {aten.view.default, aten._unsafe_view.default}
# What does to each part what it does to the number.
_PARTWISE = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int),
    *(aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.chunk.default, aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten.cat.default, aten.stack.default, aten.index.Tensor, aten.index_select.default),
    *(aten.gather.default, aten.repeat.default, aten.flatten.using_ints, aten.neg.default),
    *(aten.sum.dim_IntList, aten.mean.dim, aten.unbind.int, aten.lift_fresh_copy.default),
    *(aten.repeat_interleave.self_int, aten.roll.default, aten.add.Tensor, aten.sub.Tensor),
    *(aten.resolve_conj.default, operator.getitem),
}


def is_complex(node: fx.Node) -> bool:
    """Whether a value is complex, or a list of such."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Tensor) and first.is_complex()


def touches_complex(node: fx.Node) -> bool:
    """Whether a call takes or makes complex values."""
    return is_complex(node) or any(map(is_complex, node.all_input_nodes))


def has_real_form(target: Any) -> bool:
    """Whether an operation on complex values can be said in real ones."""
    return target in _PARTWISE or target in _RULES


def real_spec(spec: TensorSpec) -> TensorSpec:
    """The spec of an input or output in real numbers."""
    if not spec.dtype.is_complex:
        return spec
    return TensorSpec((*spec.shape, 2), spec.dtype.to_real())


def in_real_numbers(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph without complex values.

    Args:
        module: with shapes recorded on its nodes.

    Raises:
        BackendError: an operation has no such form.
    """
    if not any(map(is_complex, module.graph.nodes)):
        return module
    copied = copy_module(module)
    form = _Form(copied, fx.Graph())
    for node in copied.graph.nodes:
        if node.target in _VIEWS:  # the parts may lie in memory otherwise
            node.target = aten.reshape.default
        form.add(node)
    return fx.GraphModule(copied, form.graph)


@dataclass
class _Form:
    """The graph that is being made."""

    module: fx.GraphModule
    graph: fx.Graph
    plain: dict[fx.Node, Any] = field(default_factory=dict)
    pairs: dict[fx.Node, Pair] = field(default_factory=dict)

    def add(self, node: fx.Node) -> None:
        if node.op == "output":
            self.graph.output(fx.node.map_arg(node.args[0], self._whole))
        elif node.op == "placeholder":
            made = self.graph.node_copy(node)
            self.plain[node] = made
            if is_complex(node):
                self.pairs[node] = self._parts(made)
        elif node.op == "get_attr" and is_complex(node):
            self.pairs[node] = self._constant(node)
        elif not touches_complex(node):
            self.plain[node] = self.graph.node_copy(node, self._whole)
        else:
            self._operation(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def part(self, value: Any, index: int) -> Any:
        """A part of an argument; a real one has no second."""
        if isinstance(value, fx.Node) and value in self.pairs:
            return self.pairs[value][index]
        return self._whole(value) if isinstance(value, fx.Node) else value

    def _operation(self, node: fx.Node) -> None:
        if (rule := _RULES.get(node.target)) is not None:
            made = rule(self, node)
        elif node.target in _PARTWISE and all(map(self.pairs.__contains__, _carriers(node))):
            made = self._partwise(node, 0), self._partwise(node, 1)
        else:
            raise BackendError(
                f"{node.target} of complex numbers cannot be said in real ones", place=node.name
            )
        if isinstance(made, tuple):
            self.pairs[node] = made
        else:
            self.plain[node] = made

    def _partwise(self, node: fx.Node, index: int) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.part(n, index))
        target: Any = node.target
        return self.graph.call_function(target, args, kwargs)

    def _whole(self, node: fx.Node) -> Any:
        """A value as it goes out: of a complex one its parts along a last axis."""
        if node in self.pairs and node.op != "placeholder":
            return self.call(aten.stack.default, list(self.pairs[node]), -1)
        return self.plain[node]

    def _parts(self, made: fx.Node) -> Pair:
        return self.call(aten.select.int, made, -1, 0), self.call(aten.select.int, made, -1, 1)

    def _constant(self, node: fx.Node) -> Pair:
        holder, _, leaf = str(node.target).rpartition(".")
        value = getattr(self.module.get_submodule(holder), leaf)
        names = [f"{node.name}_{part}" for part in ("real", "imaginary")]
        for name, part in zip(names, (value.real, value.imag), strict=True):
            self.module.register_buffer(name, part.contiguous())
        first, second = map(self.graph.get_attr, names)
        return first, second


def _carriers(node: fx.Node) -> list[fx.Node]:
    """Arguments that carry the numbers; others are positions."""
    if node.target in (aten.index.Tensor, aten.index_select.default, aten.gather.default):
        return node.all_input_nodes[:1]
    tensors = (n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt))
    return list(tensors)


def _multiply(form: _Form, node: fx.Node) -> Pair:
    one, other = node.args
    (a, b), (c, d) = ((form.part(n, 0), form.part(n, 1)) for n in (one, other))

    def product(x: Any, y: Any) -> fx.Node:
        return form.call(aten.mul.Tensor, x, y)

    if one not in form.pairs:
        return product(a, c), product(a, d)
    if other not in form.pairs:
        return product(a, c), product(b, c)
    real = form.call(aten.sub.Tensor, product(a, c), product(b, d))
    return real, form.call(aten.add.Tensor, product(a, d), product(b, c))


def _divide(form: _Form, node: fx.Node) -> Pair:
    one, other = node.args
    if isinstance(other, fx.Node) and other in form.pairs:
        raise BackendError("a quotient by complex numbers has no real form", place=node.name)
    first, second = (
        form.call(aten.div.Tensor, form.part(one, i), form.part(other, 0)) for i in (0, 1)
    )
    return first, second


def _polar(form: _Form, node: fx.Node) -> Pair:
    length, angle = (form.part(n, 0) for n in node.args)
    cosine, sine = form.call(aten.cos.default, angle), form.call(aten.sin.default, angle)
    return form.call(aten.mul.Tensor, length, cosine), form.call(aten.mul.Tensor, length, sine)


def _exponential(form: _Form, node: fx.Node) -> Pair:
    real, imaginary = form.pairs[node.all_input_nodes[0]]
    length = form.call(aten.exp.default, real)
    parts = (form.call(f, imaginary) for f in (aten.cos.default, aten.sin.default))
    first, second = (form.call(aten.mul.Tensor, length, part) for part in parts)
    return first, second


def _from_pairs(form: _Form, node: fx.Node) -> Pair:
    return form._parts(form.part(node.args[0], 0))


def _to_pairs(form: _Form, node: fx.Node) -> fx.Node:
    return form.call(aten.stack.default, list(form.pairs[node.all_input_nodes[0]]), -1)


def _composed(form: _Form, node: fx.Node) -> Pair:
    return form.part(node.args[0], 0), form.part(node.args[1], 0)


def _cast(form: _Form, node: fx.Node) -> Any:
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    real = dtype.to_real() if dtype.is_complex else dtype
    kwargs = {**node.kwargs, "dtype": real}
    first = form.call(aten._to_copy.default, form.part(source, 0), **kwargs)
    if not dtype.is_complex:
        return first
    if source not in form.pairs:
        return first, form.call(aten.zeros_like.default, first)
    return first, form.call(aten._to_copy.default, form.part(source, 1), **kwargs)


def _conjugate(form: _Form, node: fx.Node) -> Pair:
    real, imaginary = form.pairs[node.all_input_nodes[0]]
    return real, form.call(aten.neg.default, imaginary)


def _length(form: _Form, node: fx.Node) -> fx.Node:
    squares = [form.call(aten.mul.Tensor, x, x) for x in form.pairs[node.all_input_nodes[0]]]
    return form.call(aten.sqrt.default, form.call(aten.add.Tensor, *squares))


_RULES: Mapping[Any, Callable[[_Form, fx.Node], Any]] = {
    aten.mul.Tensor: _multiply,
    aten.div.Tensor: _divide,
    aten.polar.default: _polar,
    aten.exp.default: _exponential,
    aten.view_as_complex.default: _from_pairs,
    aten.view_as_real.default: _to_pairs,
    aten.complex.default: _composed,
    aten._to_copy.default: _cast,
    aten._conj.default: _conjugate,
    aten.conj.default: _conjugate,
    aten.real.default: lambda form, node: form.pairs[node.all_input_nodes[0]][0],
    aten.imag.default: lambda form, node: form.pairs[node.all_input_nodes[0]][1],
    aten.abs.default: _length,
}
