"""Recompute a site for the picked tokens only."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from cachegraph.errors import SiteError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import ORIGIN, Origin, StepGraph
from cachegraph.model.structure import shape_of

aten = torch.ops.aten

# Beside those that torch itself calls pointwise.
_POINTWISE = {
    *(aten._to_copy.default, aten.alias.default, aten.detach.default),
    *(aten.hardswish.default, aten.log_sigmoid.default),
}
_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList}


@dataclass(frozen=True)
class GatherTokens:
    """Move the choice of tokens in front of a region that works token by token.

    Before, with the row ``blocks.0.mlp: refresh``::

        %linear_5 = aten.linear(%gelu_0, @mlp.fc2.weight)               f32[s0, 256, 64]
        %gather_blocks_0_mlp = cache.gather_tokens(%linear_5, %picked_blocks_0_mlp)
        %scatter_blocks_0_mlp = cache.scatter_tokens(%read_..., %picked_..., %gather_...)

    After::

        %gather_tokens = cache.gather_tokens(%add_1, %picked_blocks_0_mlp) f32[s0, k, 64]
        %layer_norm_1_picked = aten.layer_norm(%gather_tokens, [64])
        ...
        %linear_5_picked = aten.linear(%gelu_0_picked, @mlp.fc2.weight)  f32[s0, k, 64]
        %scatter_blocks_0_mlp = cache.scatter_tokens(%read_..., %picked_..., %linear_5_picked)

    It is exact: every operation of the region is proved to treat tokens one by one, with the token
    axis followed through views and transpositions. One that mixes tokens is an error naming it.
    """

    name: ClassVar[str] = "gather-tokens"

    def apply(self, step: StepGraph) -> int:
        """Rewrite every gather behind a site's region; returns how many."""
        by_name = {node.name: node for node in step.graph.nodes}
        sources = {site.name: site.source for site in step.sites}
        gathers = [n for n in step.graph.nodes if n.target is ops.gather_tokens]
        for gather in gathers:
            site = gather.meta[ORIGIN].site
            value: Any = gather.args[0]
            picked: Any = gather.args[1]
            with step.graph.inserting_before(gather):
                region = _Region(step.graph, by_name[sources[site]], picked, site)
                fresh, axis = region.picked(value)
            if axis != 1:
                raise region.refusal(value, "does not have its tokens on axis 1")
            gather.replace_all_uses_with(fresh, propagate_meta=False)
            step.graph.erase_node(gather)
        return len(gathers)


@dataclass
class _Region:
    """The nodes between a stream and a site's value, copied for the picked tokens."""

    graph: fx.Graph
    source: fx.Node
    picked_tokens: fx.Node
    site: str
    copies: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    count: fx.Node | None = None

    def picked(self, value: fx.Node) -> tuple[fx.Node, int]:
        """A node's value for the picked tokens, and its token axis."""
        for node in self._between(value):
            if node is self.source:
                copy = self.graph.call_function(
                    ops.gather_tokens, (self.source, self.picked_tokens)
                )
                axis = 1
            else:
                args, axis = self._rule(node)
                kwargs = fx.node.map_arg(node.kwargs, self._copy_of)
                copy = self.graph.create_node(
                    "call_function", node.target, args, kwargs, name=f"{node.name}_picked"
                )
                if "nn_module_stack" in node.meta:
                    copy.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            copy.meta[ORIGIN] = Origin(GatherTokens.name, self.site)
            self.copies[node] = copy, axis
        return self.copies[value]

    def refusal(self, node: fx.Node, why: str) -> SiteError:
        return SiteError(
            f"site {self.site} cannot be recomputed for some tokens: {node.target} {why}",
            place=f"node {node.name}",
            expected="operations that treat tokens one by one",
            remedy="leave the site out with sites.exclude, or let the schedule reuse it",
        )

    def _between(self, value: fx.Node) -> list[fx.Node]:
        """The nodes on a path from the source to the value, both included, in order."""
        behind, queue = {value}, [value]
        while queue:
            # What stands in front of the source cannot depend on it.
            inputs = queue.pop().all_input_nodes
            new = [a for a in inputs if a not in behind and not a < self.source]
            behind.update(new)
            queue += new
        carrying = [self.source]
        found = {self.source}
        for node in sorted(behind):
            if any(a in found for a in node.all_input_nodes):
                carrying.append(node)
                found.add(node)
        if value not in found:
            raise self.refusal(value, f"does not depend on the stream {self.source.name}")
        return carrying

    def _copy_of(self, node: fx.Node) -> fx.Node:
        return self.copies[node][0] if node in self.copies else node

    def _rule(self, node: fx.Node) -> tuple[Any, int]:
        """Arguments of the copy and its token axis."""
        target: Any = node.target
        if target in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            axis = self._pointwise(node)
            return fx.node.map_arg(node.args, self._copy_of), axis
        args: Any = fx.node.map_arg(node.args, self._copy_of)
        rule = _RULES.get(target)
        if rule is None:
            raise self.refusal(node, "is not known to treat tokens one by one")
        return rule(self, node, list(args))

    def _axis(self, node: fx.Node) -> int:
        return self.copies[node][1]

    def _pointwise(self, node: fx.Node) -> int:
        """The token axis, counted from the right as broadcasting does."""
        rank = _rank(node)
        axes = {rank - _rank(a) + self._axis(a) for a in node.all_input_nodes if a in self.copies}
        if len(axes) != 1:
            raise self.refusal(node, "joins tokens on different axes")
        axis = axes.pop()
        for other in node.all_input_nodes:
            at = axis - (rank - _rank(other))
            if other in self.copies or at < 0 or _shape(other)[at] == 1:
                continue
            # What each sample has for each token, such as whether it is given, is gathered too.
            if at != 1 or _rank(other) != 3 or shape_of(other)[0] != shape_of(node)[0]:
                raise self.refusal(node, f"takes {other.name}, which has a token axis of its own")
            self.copies[other] = self._gathered(other), axis
        return axis

    def tokens(self) -> fx.Node:
        """k, as a node."""
        if self.count is None:
            self.count = self.graph.call_function(aten.sym_size.int, (self.picked_tokens, 1))
            self.count.meta[ORIGIN] = Origin(GatherTokens.name, self.site)
        return self.count

    def along(self, node: fx.Node, args: list[Any], dims: list[int]) -> tuple[Any, int]:
        """An operation along axes: fine where none of them is the token axis."""
        axis = self._axis(node.all_input_nodes[0])
        if axis in [d % _rank(node.all_input_nodes[0]) for d in dims]:
            raise self.refusal(node, "works along the token axis")
        return tuple(args), axis

    def linear(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        weights: Any = node.args[1:]
        if any(isinstance(w, fx.Node) and w in self.copies for w in weights):
            raise self.refusal(node, "multiplies tokens with each other")
        return self.along(node, args, [-1])

    def norm(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        shape: Any = node.args[1]
        return self.along(node, args, [-1 - i for i in range(len(shape))])

    def split(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        return self.along(node, args, [args[2] if len(args) > 2 else 0])

    def slice(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        whole = len(args) < 3 or (args[2] in (0, None) and (len(args) < 4 or args[3] == _END))
        return self.along(node, args, [] if whole else [args[1]])

    def piece(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        return tuple(args), self._axis(node.all_input_nodes[0])

    def reduce(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        if len(args) < 3 or not args[2]:
            raise self.refusal(node, "drops axes")
        return self.along(node, args, list(args[1]))

    def view(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        """The token axis must stay an axis of its own."""
        before, after = _sizes(node.all_input_nodes[0]), _sizes(node)
        axis = self._axis(node.all_input_nodes[0])
        left = math.prod(before[:axis])
        for at, size in enumerate(after):
            if size == before[axis] and math.prod(after[:at]) == left:
                sizes = list(args[1])
                sizes[at] = self.tokens()
                return (args[0], sizes), at
        raise self.refusal(node, "folds the token axis into another")

    def transpose(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        rank, axis = _rank(node), self._axis(node.all_input_nodes[0])
        first, second = args[1] % rank, args[2] % rank
        return tuple(args), {first: second, second: first}.get(axis, axis)

    def permute(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        axes = [d % _rank(node) for d in args[1]]
        return tuple(args), axes.index(self._axis(node.all_input_nodes[0]))

    def unsqueeze(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        axis = self._axis(node.all_input_nodes[0])
        return tuple(args), axis + (args[1] % _rank(node) <= axis)

    def attention(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        """Each query is answered alone; keys and values must not be tokens of the stream."""
        if any(isinstance(a, fx.Node) and a in self.copies for a in node.args[1:]):
            raise self.refusal(node, "attends to the tokens of the stream")
        query: Any = node.args[0]
        if self._axis(query) != _rank(query) - 2:
            raise self.refusal(node, "does not have its queries on the token axis")
        return tuple(args), self._axis(query)

    def join(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        """Channels side by side; those that do not follow from the stream are gathered too."""
        rank, axes = _rank(node), {self._axis(n) for n in node.all_input_nodes if n in self.copies}
        dim = (args[1] if len(args) > 1 else 0) % rank
        if rank != 3 or axes != {1} or dim == 1:
            raise self.refusal(node, "joins tokens with others")
        parts: Any = node.args[0]
        return ([self._gathered(part) for part in parts], dim), 1

    def _gathered(self, node: fx.Node) -> fx.Node:
        if node in self.copies:
            return self.copies[node][0]
        made = self.graph.call_function(ops.gather_tokens, (node, self.picked_tokens))
        made.meta[ORIGIN] = Origin(GatherTokens.name, self.site)
        return made

    def rows(self, node: fx.Node, args: list[Any]) -> tuple[Any, int]:
        """The entropy of a query's row is the query's alone."""
        self.attention(node, args)
        return tuple(args), 1


_END = 2**63 - 1
_RULES: dict[Any, Callable[[_Region, fx.Node, list[Any]], tuple[Any, int]]] = {
    aten.linear.default: _Region.linear,
    aten.layer_norm.default: _Region.norm,
    aten.rms_norm.default: _Region.norm,
    aten.split.Tensor: _Region.split,
    aten.split_with_sizes.default: _Region.split,
    aten.chunk.default: _Region.split,
    operator.getitem: _Region.piece,
    aten.slice.Tensor: _Region.slice,
    aten.view.default: _Region.view,
    aten.reshape.default: _Region.view,
    aten._unsafe_view.default: _Region.view,
    aten.transpose.int: _Region.transpose,
    aten.permute.default: _Region.permute,
    aten.unsqueeze.default: _Region.unsqueeze,
    aten.cat.default: _Region.join,
    aten.scaled_dot_product_attention.default: _Region.attention,
    ops.row_entropy: _Region.rows,
    **dict.fromkeys(_REDUCTIONS, _Region.reduce),
}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return len((value[0] if isinstance(value, list | tuple) else value).shape)


def _sizes(node: fx.Node) -> list[int]:
    """The shape in numbers; symbols stand for the sizes of the example inputs."""
    return [d if isinstance(d, int) else d.node.hint for d in _shape(node)]
