"""A model whose sites blend what they compute with what is cached, cut for cheap gradients.

The blend is that of HarmoniCa and Learning-to-Cache: each site's value becomes
``cached * (1 - w) + fresh * w``. Only the weights ``w`` get gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from cachegraph.errors import SiteError
from cachegraph.graph.step_graph import copy_module
from cachegraph.model.site import Site, SiteKind, describe
from cachegraph.model.trace import trace

_SEGMENT = "submod"  # what split_module calls its parts, before their number

Cache = list[Tensor]  # one tensor a value of a routed site, in the order of the graph


def routed_sites(sites: Sequence[Site]) -> list[Site]:
    """The sites that routers rule, in the order of their scores.

    As published: attention of block l is score 2l, its mlp 2l + 1; where a model does not pair
    them, the order of the graph.

    Raises:
        SiteError: there is neither attention nor an mlp.
    """
    attns = [site for site in sites if site.kind == SiteKind.ATTN]
    mlps = [site for site in sites if site.kind == SiteKind.MLP]
    if len(attns) == len(mlps) > 0:
        return [site for pair in zip(attns, mlps, strict=True) for site in pair]
    if not attns and not mlps:
        raise SiteError("no site for a router", expected="attn or mlp", found=describe(sites))
    return [site for site in sites if site.kind in (SiteKind.ATTN, SiteKind.MLP)]


@dataclass(frozen=True)
class _Value:
    """A value of a routed site: its node, and which score rules it."""

    node: str
    score: int
    mlp: bool


class RoutedModel:
    """The traced graph of a model, called plainly, with its values, or routed.

    All three share the model's weights, frozen. Between two values lies a segment; a segment that
    ends in an mlp is computed again for its gradient, which is a ninth of a training step's time
    and saves the widest activations.

    Args:
        model: in eval mode, called as ``model(x, t, y)``; it is not changed.
        args: example inputs of the batch that is trained with.
        recompute: which segments are computed again for gradients: ``mlp``, ``all`` or ``none``.
    """

    def __init__(self, model: nn.Module, args: Sequence[Tensor], recompute: str = "mlp") -> None:
        traced = trace(model, args, {}, dynamic_batch=False)
        self.all_sites = traced.sites
        self.sites = routed_sites(traced.sites)
        self.device = args[0].device
        score = {site.name: j for j, site in enumerate(self.sites)}
        found = {
            value.node: _Value(value.node, score[site.name], site.kind == SiteKind.MLP)
            for site in self.sites
            for value in site.values
        }
        order = [node.name for node in traced.module.graph.nodes if node.name in found]
        self.values = [found[name] for name in order]
        self._signature = traced.signature
        self._plain = _frozen(traced.module)
        self._valued = _with_values(self._plain, self.values)
        self._routed = _routed(self._plain, self.values, recompute)

    @torch.no_grad()
    def __call__(self, *args: Tensor) -> Tensor:
        """The model's output, without routing or gradients."""
        return self._plain(*self._flat(args))[0]

    @torch.no_grad()
    def with_values(self, *args: Tensor) -> tuple[Tensor, Cache]:
        """Its output, and every value of the routed sites."""
        outputs = self._valued(*self._flat(args))
        return outputs[0], list(outputs[1])

    def routed(self, args: Sequence[Tensor], w: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Its output where every site blends with the cache, and what the sites computed.

        Args:
            args: the call's inputs.
            w: ``(sites,)``, how much of the fresh value each site takes; gradients flow to it.
            cache: as :meth:`with_values` gives it.
        """
        scores = w.unbind()
        weights = [scores[value.score] for value in self.values]
        outputs = self._routed(*self._flat(args), *weights, *cache)
        return outputs[0], list(outputs[1])

    @torch.no_grad()
    def renew(self, cache: Cache, fresh: Cache, w: Tensor, threshold: float) -> Cache:
        """The cache after a call, in its own memory and that of the fresh values.

        Args:
            cache: from before the call.
            fresh: what :meth:`routed` gave; of no use afterwards.
            w: how much of it each site took.
            threshold: where ``w`` is above it, the entry becomes the blended value.
        """
        scores = w.unbind()
        takes = (w > threshold).tolist()
        for value, old, new in zip(self.values, cache, fresh, strict=True):
            if takes[value.score]:
                share = scores[value.score]
                old.mul_(1 - share).add_(new.detach().mul_(share))
        return cache

    def _flat(self, args: Sequence[Tensor]) -> list[Tensor]:
        return self._signature.flatten(args, {})


def _frozen(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same weights, which take no gradients here."""
    copied = copy_module(module)
    for name, weight in list(copied.named_parameters()):
        holder, _, leaf = name.rpartition(".")
        frozen = nn.Parameter(weight.detach(), requires_grad=False)
        setattr(copied.get_submodule(holder), leaf, frozen)
    return copied


def _with_values(module: fx.GraphModule, values: Sequence[_Value]) -> fx.GraphModule:
    copied = copy_module(module)
    nodes = {node.name: node for node in copied.graph.nodes}
    _set_output(copied, [nodes[value.node] for value in values])
    return copied


def _set_output(module: fx.GraphModule, values: Sequence[fx.Node]) -> None:
    [output] = module.graph.find_nodes(op="output")
    output.args = ((output.args[0][0], list(values)),)
    module.graph.lint()
    module.recompile()


def _routed(module: fx.GraphModule, values: Sequence[_Value], recompute: str) -> fx.GraphModule:
    """The graph with blends behind the values, cut into segments that begin with a blend."""
    copied = copy_module(module)
    graph = copied.graph
    nodes = {node.name: node for node in graph.nodes}
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        caches = [graph.placeholder(f"cached_{j}") for j in reversed(range(len(values)))][::-1]
        weights = [graph.placeholder(f"w_{j}") for j in reversed(range(len(values)))][::-1]
    blends: list[fx.Node] = []
    for value, w, cached in zip(values, weights, caches, strict=True):
        blends.append(_blend(graph, nodes[value.node], w, cached))
    _set_output(copied, [nodes[value.node] for value in values])
    segment, of = 0, dict[fx.Node, int]()
    starts = {nodes[value.node]: j + 1 for j, value in enumerate(values)}
    for node in graph.nodes:
        of[node] = segment
        segment = starts.get(node, segment)
    cut: fx.GraphModule = split_module(copied, nn.Module(), of.__getitem__)
    again = {j for j, value in enumerate(values) if recompute == "all" or value.mlp}
    for name, child in list(cut.named_children()):
        kind, _, index = name.rpartition("_")
        if kind == _SEGMENT and recompute != "none" and int(index) in again:
            setattr(cut, name, _Recomputed(child))
    return cut


def _blend(graph: fx.Graph, value: fx.Node, w: fx.Node, cached: fx.Node) -> fx.Node:
    users = list(value.users)
    with graph.inserting_after(value):
        kept = graph.call_function(torch.rsub, (w, 1.0))
    with graph.inserting_after(kept):
        old = graph.call_function(torch.mul, (cached, kept))
    with graph.inserting_after(old):
        new = graph.call_function(torch.mul, (value, w))
    with graph.inserting_after(new):
        used = graph.call_function(torch.add, (old, new))
    for user in users:
        user.replace_input_with(value, used)
    return used


class _Recomputed(nn.Module):
    """A segment whose activations are not kept but computed again when gradients are asked for."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *args: Any) -> Any:
        """As the segment."""
        if not torch.is_grad_enabled():
            return self.segment(*args)
        return checkpoint(self.segment, *args, use_reentrant=False, preserve_rng_state=False)
