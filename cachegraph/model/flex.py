"""``flex_attention``, whose mask and score are functions, as attention of plain operators.

The mask function is written out for all pairs of positions, which is what it means; one that
changes scores is applied to the scores. Other operators that take functions are left to be refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cachegraph.errors import TraceError

from .shapes import make_node

aten = torch.ops.aten


def write_out_flex_attention(module: fx.GraphModule) -> None:
    """Replace each call of ``flex_attention`` in a functional graph.

    Raises:
        TraceError: the model uses more of its result than the attention.
    """
    for node in list(module.graph.nodes):
        if str(node.target) == "flex_attention":
            call = _Call(module, node)
            call.write_out()
            for function in {call.score, call.block[-1]}:
                if not function.users:
                    module.graph.erase_node(function)


class _Call:
    """One call of the operator."""

    def __init__(self, module: fx.GraphModule, node: fx.Node) -> None:
        given: Any = node.args
        self.module, self.node = module, node
        self.query, self.key, self.value, self.score, self.block, self.scale = given[:6]
        self.score_buffers, self.mask_buffers = given[7], given[8]

    def write_out(self) -> None:
        users = list(self.node.users)
        if any(user.args[1] != 0 and user.users for user in users):
            raise TraceError(
                "the model uses the sums of flex_attention's softmax",
                place=self.node.name,
                remedy="use its attention alone",
            )
        with self.module.graph.inserting_before(self.node):
            self._repeat_heads()
            positions = self._positions()
            mask = self._mask(positions)
            plain = self._returns_its_input(self.score)
            result = self._plain(mask) if plain else self._scored(mask, positions)
            result = self._laid_out(result)
        for user in users:
            user.replace_all_uses_with(result)
            self.module.graph.erase_node(user)
        self.module.graph.erase_node(self.node)

    def _laid_out(self, result: fx.Node) -> fx.Node:
        """The result in memory as the operator's own: views of it rely on that."""
        wanted: Any = self.node.meta["val"][0]
        if result.meta["val"].stride() == wanted.stride():
            return result
        order = [*wanted.dim_order()]
        swapped = self._make(aten.permute.default, result, order)
        copied = self._make(aten.clone.default, swapped, memory_format=torch.contiguous_format)
        back = [order.index(dim) for dim in range(len(order))]
        return self._make(aten.permute.default, copied, back)

    def _make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return make_node(self.module.graph, target, args, self.node, kwargs)

    def _repeat_heads(self) -> None:
        """Where several heads of the queries share one of the keys."""
        heads, shared = (n.meta["val"].shape[1] for n in (self.query, self.key))
        if heads != shared:
            sized = heads // shared
            self.key, self.value = (
                self._make(aten.repeat_interleave.self_int, n, sized, 1)
                for n in (self.key, self.value)
            )

    def _positions(self) -> list[fx.Node]:
        """Batch, head, query and key of every score, each along an axis of its own."""
        device = self.query.meta["val"].device
        batch, heads = self.query.meta["val"].shape[:2]
        sizes = [self._size(self.query, 0, batch), self._size(self.query, 1, heads)]
        sizes += [self._size(n, 2, n.meta["val"].shape[2]) for n in (self.query, self.key)]
        found = []
        for axis, size in enumerate(sizes):
            made = self._make(aten.arange.default, size, device=device)
            for at in range(4):
                if at != axis:
                    made = self._make(aten.unsqueeze.default, made, at)
            found.append(made)
        return found

    def _size(self, node: fx.Node, axis: int, size: Any) -> Any:
        return size if isinstance(size, int) else self._make(aten.sym_size.int, node, axis)

    def _call(self, function: fx.Node, given: list[fx.Node], buffers: Any) -> fx.Node:
        """What a function makes of these, written into the graph."""
        inner: Any = self.module.get_submodule(str(function.target))
        made: dict[fx.Node, Any] = {}
        values = [*given, *buffers]
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                made[node] = values.pop(0)
            elif node.op != "output":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = self._make(node.target, *args, **kwargs)
        return made[_returned(inner)]

    def _mask(self, positions: list[fx.Node]) -> fx.Node | None:
        """Which scores count; None where all do."""
        mask = self._call(self.block[-1], positions, self.mask_buffers)
        if mask.target is aten.new_ones.default:
            return None
        if mask.meta["val"].ndim == 4:
            return mask
        every = self._make(aten.add.Tensor, *positions[2:])  # no position is below 0
        return self._make(aten.logical_and.default, mask, self._make(aten.ge.Scalar, every, 0))

    def _returns_its_input(self, function: fx.Node) -> bool:
        inner: Any = self.module.get_submodule(str(function.target))
        return _returned(inner) is next(iter(inner.graph.find_nodes(op="placeholder")))

    def _plain(self, mask: fx.Node | None) -> fx.Node:
        given = (self.query, self.key, self.value)
        return self._make(aten.scaled_dot_product_attention.default, *given, mask, scale=self.scale)

    def _scored(self, mask: fx.Node | None, positions: list[fx.Node]) -> fx.Node:
        keys = self._make(aten.transpose.int, self.key, -2, -1)
        scores = self._make(aten.matmul.default, self.query, keys)
        scores = self._make(aten.mul.Tensor, scores, self.scale)
        scores = self._call(self.score, [scores, *positions], self.score_buffers)
        if mask is not None:
            scores = self._make(aten.where.ScalarOther, mask, scores, float("-inf"))
        weights = self._make(aten._safe_softmax.default, scores, -1)
        return self._make(aten.matmul.default, weights, self.value)


def _returned(module: fx.GraphModule) -> fx.Node:
    returned: Any = module.graph.output_node().args[0]
    return returned[0] if isinstance(returned, list | tuple) else returned
