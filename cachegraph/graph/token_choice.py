"""Put the choice of tokens into a step graph, and what later choices go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cachegraph.errors import SiteError
from cachegraph.model.site import Site
from cachegraph.plan.action import Compute, Refresh
from cachegraph.plan.selection import Score, Selection
from cachegraph.plan.slot import AGE, INNER, ORDER, SCORE, ConstantKind
from cachegraph.plan.variant import scorer

from . import ops
from .step_graph import ORIGIN, Origin, StepGraph

Constants = Mapping[tuple[ConstantKind, str], fx.Node]  # (kind, site) -> input
Extra = tuple[Site, int, fx.Node]  # (site, one of EXTRAS, node to hand out)


@dataclass
class Chooser:
    """Builds the selection nodes of one step graph.

    Attributes:
        step: the graph.
        selection: how tokens are chosen.
        constants: the step constants' inputs.
        maker: name of the pass, for the origin of nodes.
        entropies: site -> entropies of its rows as they stand after this step.
    """

    step: StepGraph
    selection: Selection
    constants: Constants
    maker: str
    entropies: dict[str, fx.Node] = field(default_factory=dict)
    _scores: dict[fx.Node, fx.Node] = field(default_factory=dict)  # attention core -> its scores

    def call(self, site: Site | None, function: Any, *args: Any) -> fx.Node:
        """A call at the graph's insertion point."""
        node = self.step.graph.call_function(function, args)
        node.meta[ORIGIN] = Origin(self.maker, site.name if site else "")
        return node

    def foreseen(self, site: Site, order: fx.Node) -> fx.Node:
        """Picked tokens ``(B, k)`` from an order that a computed step has left."""
        age = self.constants[ConstantKind.AGE, site.name]
        return self.call(site, ops.pick_tokens, order, age, self._tokens(site))

    def chosen_now(self, site: Site, age: fx.Node, score: fx.Node) -> fx.Node:
        """Picked tokens ``(B, k)`` from the scores of this step."""
        chosen = self.selection
        settings = (chosen.age_weight, chosen.bonus, chosen.cell, list(chosen.grid or ()))
        gap = self.constants[ConstantKind.AGE, site.name]
        order = self.call(site, ops.order_now, score, age, gap, *settings)
        return self.call(site, ops.pick_first, order, self._tokens(site))

    def older(self, site: Site, age: fx.Node, picked: fx.Node) -> fx.Node:
        """Ages after this partial step."""
        return self.call(
            site, ops.age_tokens, age, self.constants[ConstantKind.AGE, site.name], picked
        )

    def score(
        self, site: Site, stream: fx.Node, kept: fx.Node, age: fx.Node, entropy: fx.Node | None
    ) -> fx.Node:
        """Scores ``(B, N)`` of a site's tokens in this step.

        Args:
            site: whose tokens.
            stream: that the site reads.
            kept: its kept value.
            age: its kept ages.
            entropy: of the rows of the scoring attention, where one scores.
        """
        match self.selection.score:
            case Score.CROSS_ATTENTION:
                return self.call(site, ops.entropy_score, entropy)
            case Score.SIMILARITY:
                return self.call(site, ops.similarity_score, stream, kept)
            case Score.NORM:
                return self.call(site, ops.norm_score, stream)
        number = self.constants[ConstantKind.STEP, site.name]
        seed = self.selection.seed + 1000 * self.step.sites.index(site)
        return self.call(site, ops.random_score, age, number, seed)

    def entropy_of(self, site: Site) -> fx.Node:
        """Entropies ``(B, N)`` of the rows of a site's attention, right behind its core."""
        core = self._core(site)
        query, key = core.args[:2]
        mask = core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask")
        return self.call(site, ops.row_entropy, query, key, mask, core.kwargs.get("scale"))

    def extras(self) -> list[Extra]:
        """What computed sites hand out for later choices; at the end of the graph."""
        found: list[Extra] = []
        values = {site.name: node for site, at, node in self.step.value_nodes() if at == 0}
        ordered = []
        for site, action, parts in zip(
            self.step.sites, self.step.variant.row, self.step.variant.extras, strict=True
        ):
            if ORDER in parts:
                ordered.append(site)
            if isinstance(action, Compute) and AGE in parts:
                found.append((site, AGE, self.call(site, ops.no_age, values[site.name])))
            if isinstance(action, Compute) and SCORE in parts:
                found.append((site, SCORE, self.entropies[site.name]))
            if site.inner is not None and INNER in parts:
                found.append((site, INNER, self._named(site.inner.node)))
        by_counts: dict[fx.Node, list[Site]] = {}
        for site in ordered:
            counts = self.constants[ConstantKind.COUNTS, site.name]
            by_counts.setdefault(counts, []).append(site)
        orders = (one for pair in by_counts.items() for one in self._orders(*pair))
        return [*orders, *found]

    def _orders(self, counts: fx.Node, sites: Sequence[Site]) -> list[Extra]:
        """Orders for the partial steps that follow, of all sites with as many tokens in one go."""
        chosen = self.selection
        scores = [self._foreseeable_score(site) for site in sites]
        settings = (chosen.age_weight, chosen.bonus, chosen.cell, list(chosen.grid or ()))
        orders = self.call(None, ops.order_tokens, scores, counts, *settings)
        select = torch.ops.aten.select.int
        return [(s, ORDER, self.call(s, select, orders, 0, i)) for i, s in enumerate(sites)]

    def _foreseeable_score(self, site: Site) -> fx.Node:
        owner = scorer(self.step.sites, self.step.sites.index(site), self.selection)
        scoring = self.step.sites[owner] if owner is not None else site
        core = self._core(scoring)
        if core not in self._scores:
            query, key, value = core.args[:3]
            scale = core.kwargs.get("scale")
            self._scores[core] = (
                self.call(scoring, ops.attention_received, query, key, scale)
                if self.selection.score is Score.ATTENTION
                else self.call(scoring, ops.value_smallness, value)
            )
        return self._of_stream(site, scoring, core)

    def _of_stream(self, site: Site, scoring: Site, core: fx.Node) -> fx.Node:
        """Of the scores of a joint attention, those of the tokens of a site's stream."""
        whole = core.meta["val"].shape[-2]
        streams = scoring.values
        if len(streams) > 1:
            streams = tuple(value for value in streams if value.residual == site.source)
        span, folding = (streams[0].tokens, streams[0].folding) if streams else (None, None)
        tokens = site.values[0].spec.shape[1]
        score = self._scores[core]
        if folding is not None:
            score = self.call(site, ops.unfold_tokens, score, folding.size, folding.outer)
            whole *= folding.size
            span = 0, whole
        if span is None or span[1] - span[0] != tokens:
            raise SiteError(
                f"the attention of {scoring.name} cannot score the tokens of {site.name}",
                place=f"node {core.name}",
                expected=f"attention over the {tokens} tokens of its stream",
                found=f"over {whole}",
                remedy="use another score, such as norm, or leave the site out with sites.exclude",
            )
        piece = torch.ops.aten.slice.Tensor
        return score if span == (0, whole) else self.call(site, piece, score, 1, *span)

    def _named(self, name: str) -> fx.Node:
        return next(node for node in self.step.graph.nodes if node.name == name)

    def _core(self, site: Site) -> fx.Node:
        core = next((n for n in self.step.graph.nodes if n.name in site.cores), None)
        if core is None or core.target is not torch.ops.aten.scaled_dot_product_attention.default:
            raise SiteError(
                f"the attention of {site.name} cannot score tokens",
                expected="scaled_dot_product_attention",
                found="none" if core is None else str(core.target),
                remedy="use a score that needs no attention: norm, similarity or random",
            )
        return core

    def _tokens(self, site: Site) -> fx.Node:
        return self.constants[ConstantKind.TOKENS, site.name]


def needs_entropy(step: StepGraph, site: Site) -> bool:
    """True where the site's attention scores tokens by the entropy of its rows."""
    selection = step.selection
    if selection is None or selection.score is not Score.CROSS_ATTENTION:
        return False
    index = step.sites.index(site)
    refreshed = [i for i, a in enumerate(step.variant.row) if isinstance(a, Refresh)]
    handed_out = SCORE in step.variant.extras[index]
    return handed_out or any(scorer(step.sites, i, selection) == index for i in refreshed)
