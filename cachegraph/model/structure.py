"""Structure of a traced graph: what operations do to a stream, who depends on whom, modules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.expand.default),
    *(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default),
}
CASTS = {
    *(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device),
    aten.type_as.default,
}
PIECES = {
    *(operator.getitem, aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.narrow.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
# What a stream may pass on its way to a residual add; an expanded tensor is a modulation.
CARRIED = (VIEWS | CASTS | {aten.slice.Tensor}) - {aten.expand.default}
CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
PRODUCTS = {
    *(aten.matmul.default, aten.bmm.default, aten.mm.default),
    *(aten.baddbmm.default, aten.addmm.default, aten.einsum.default),
    aten._int_mm.default,  # of quantised weights
    *(aten._scaled_mm.default, aten._weight_int8pack_mm.default, aten._weight_int4pack_mm.default),
}
ADDED_PRODUCTS = {aten.baddbmm.default, aten.addmm.default}
ATTENTION = {aten.scaled_dot_product_attention.default}


class Dependence:
    """Who depends on whom: one bit a node, so that a set operation is one integer operation."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []  # the node itself and all it depends on
        inputs = 0
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for argument in node.all_input_nodes:
                bits |= self.above[self.index[argument]]
            self.above.append(bits)
            if node.op == "placeholder":
                inputs |= 1 << i
        self.inputs = inputs

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """True where ``on`` is the node itself or behind it."""
        return bool(self.above[self.index[node]] >> self.index[on] & 1)

    def is_constant(self, node: fx.Node) -> bool:
        """True where no model input is behind the node."""
        return not self.above[self.index[node]] & self.inputs

    def between(self, source: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes on a path from source (left out) to end (included), in order."""
        start, bits = self.index[source], self.above[self.index[end]]
        return [
            node
            for i, node in enumerate(self.nodes[start + 1 : self.index[end] + 1], start + 1)
            if bits >> i & 1 and self.above[i] >> start & 1
        ]


def strip(node: fx.Node, through: set[Any]) -> fx.Node:
    """What a node is, looked at through operations that only pass it on."""
    while node.target in through and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def summed(node: fx.Node) -> list[fx.Node]:
    """What a node adds up, if it does: also with factors, as a difference or a mean of two."""
    given: Any = node.args
    match node.target:
        case aten.add.Tensor | aten.sub.Tensor | aten.lerp.Scalar | aten.lerp.Tensor:
            terms = given[:2]
        case aten.addcmul.default:
            terms = given[:3]
        case _:
            return []
    return [term for term in terms if isinstance(term, fx.Node)]


def unscaled(node: fx.Node) -> fx.Node:
    """A stream before it was multiplied by numbers, or by what does not depend on it."""
    while True:
        node = strip(node, CARRIED)
        if node.target not in (aten.mul.Tensor, aten.div.Tensor):
            return node
        first, second = node.args
        if not isinstance(first, fx.Node) or shape_of(first) != shape_of(node):
            first, second = second, first
        if not isinstance(first, fx.Node) or shape_of(first) != shape_of(node):
            return node
        if isinstance(second, fx.Node) and shape_of(second)[1:-1] == shape_of(node)[1:-1]:
            return node  # a factor for every token: more than a scale
        node = first


def summed_product(node: fx.Node) -> list[fx.Node] | None:
    """Factors of ``(a * b).sum(dim)`` where each is spread over an axis of the other's."""
    product = node.args[0] if node.target is aten.sum.dim_IntList else None
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    factors = [a for a in product.args if isinstance(a, fx.Node)]
    sizes = len(shape_of(product))
    shapes = [("1",) * (sizes - len(shape_of(f))) + shape_of(f) for f in factors]
    spread = [any(a == "1" != b for a, b in zip(s, shape_of(product), strict=True)) for s in shapes]
    return factors if len(factors) == 2 and all(spread) else None


def cut(node: fx.Node) -> tuple[Any, Any, int | None]:
    """Size of a piece, of the whole, and where the piece starts, where the node cuts something.

    The start is None where it cuts nothing.
    """
    args: Any = node.args
    if node.target is aten.slice.Tensor and len(args) >= 3:
        dim, start = args[1], args[2] or 0
        size, whole = node.meta["val"].shape[dim], args[0].meta["val"].shape[dim]
        if isinstance(whole, int) and isinstance(start, int) and size != whole:
            return size, whole, start + whole if start < 0 else start
    elif node.target is operator.getitem and args[0].target in _SPLITS:
        of: Any = args[0].args
        dim = of[2] if len(of) > 2 else 0
        sizes = [piece.shape[dim] for piece in args[0].meta["val"]]
        before = sizes[: args[1]]
        if all(isinstance(size, int) for size in before):
            return sizes[args[1]], of[0].meta["val"].shape[dim], sum(before)
    return 0, 0, None


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """The recorded shape as text, as symbolic sizes must not be compared."""
    value = node.meta.get("val")
    return tuple(str(d) for d in value.shape) if isinstance(value, torch.Tensor) else ()


def module_stack(node: fx.Node) -> list[str]:
    """Module paths that the node was called in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if not path.startswith("_empty_nn_module")]


def _common_stack(nodes: Sequence[fx.Node]) -> list[str]:
    first, *rest = map(module_stack, nodes)
    return [path for path in first if all(path in stack for stack in rest)]


def common_module(nodes: Sequence[fx.Node]) -> str:
    """Path of the innermost module that holds all nodes."""
    common = _common_stack(nodes)
    return common[-1] if common else ""


def enclosing_module(anchors: set[fx.Node], adds: Sequence[fx.Node]) -> str | None:
    """The innermost module that holds every anchor and none of the residual adds."""
    outside = {path for add in adds for path in module_stack(add)}
    inner = [path for path in _common_stack(list(anchors)) if path not in outside]
    return inner[-1] if inner else None


def output_module(value: fx.Node) -> str | None:
    """The innermost module that returns the value: no one in it uses the value any more."""
    stack = module_stack(value)
    if not stack or not stack[-1]:
        return None
    users = [user for user in value.users if stack[-1] in module_stack(user)]
    return None if users else stack[-1]
