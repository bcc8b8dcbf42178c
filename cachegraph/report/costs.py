"""FLOPs of sites: those of the nodes that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegraph.graph.provenance import NodeFlops, total_flops
from cachegraph.model.site import Site
from cachegraph.plan.action import Action, Forecast, Refresh, sources
from cachegraph.plan.plan import Plan
from cachegraph.show.view import View


@dataclass(frozen=True)
class SiteFlops:
    """FLOPs of every site in every variant.

    Attributes:
        nodes: per variant, site -> the FLOPs of its nodes.
        tokens: per step, symbol -> how many tokens are recomputed.
        variant_of: step -> index of the variant.
    """

    nodes: tuple[Mapping[str, Sequence[NodeFlops]], ...]
    tokens: tuple[Mapping[str, int], ...]
    variant_of: tuple[int, ...]

    @classmethod
    def of(cls, view: View) -> SiteFlops:
        """Every node is counted for one site at most.

        It is that which a pass made it for, else the one whose anchor it is, else the innermost
        whose module it belongs to.
        """
        plan, provenance, found = view.plan, view.source.provenance, []
        for variant in plan.variants:
            owned: dict[str, list[NodeFlops]] = {}
            made_by = provenance.made_by.get(variant.name, {})
            for name, flops in provenance.flops.get(variant.name, {}).items():
                site = made_by.get(name, "").partition(", ")[2]
                site = site or _owner(name, provenance.modules.get(name, ""), plan.sites)
                owned.setdefault(site, []).append(flops)
            found.append(owned)
        tokens = tuple(map(view.tokens, range(plan.steps)))
        return cls(tuple(found), tokens, plan.variant_of)

    def at(self, step: int, site: str) -> int:
        """FLOPs of a step at a site."""
        nodes = self.nodes[self.variant_of[step]].get(site, ())
        return total_flops(nodes, self.tokens[step])


def _owner(node: str, module: str, sites: Sequence[Site]) -> str:
    """The site that a node belongs to; empty for none."""
    for site in sites:
        if node in site.anchors:
            return site.name
    inside = [s for s in sites if s.module and f"{module}.".startswith(f"{s.module}.")]
    return max(inside, key=lambda s: len(s.module or "")).name if inside else ""


@dataclass
class Cells:
    """The different cells of a plan: what a step does at a site, from what, at which cost.

    Attributes:
        plan: whose cells.
        flops: of sites.
        found: the cells so far.
    """

    plan: Plan
    flops: SiteFlops
    found: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[object, int] = field(default_factory=dict)

    def index(self, step: int, site: int) -> int:
        """Where in ``found`` the cell of a step and site stands."""
        action = self.plan.rows[step][site]
        flops = self.flops.at(step, self.plan.sites[site].name)
        key = action, flops
        if key not in self._places:
            self._places[key] = len(self.found)
            self.found.append(_cell(action, flops))
        return self._places[key]


def _cell(action: Action, flops: int) -> dict[str, Any]:
    cell: dict[str, Any] = {"action": type(action).__name__.lower(), "flops": flops}
    if sources(action):
        cell["from"] = list(sources(action))
    match action:
        case Forecast(coefficients=coefficients):
            cell["coefficients"] = list(coefficients)
        case Refresh(tokens=tokens, scored=scored):
            cell |= {"tokens": tokens, "scored": scored}
    return cell
