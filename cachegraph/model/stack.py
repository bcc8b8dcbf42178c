"""Blocks taken together as one site: all of them, or a range such as ``blocks[2:26]``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx

from cachegraph.spec import TensorSpec

from .site import Site, SiteKind, SiteValue
from .structure import output_module

WHOLE = "stack"  # name of the site of all blocks


def find_stack(
    graph: fx.Graph, sites: Sequence[Site], name: str = WHOLE, *, relative: bool = False
) -> Site | None:
    """The blocks of some sites as one site, where these stand in one chain of residual adds.

    Its value is the stream behind the last block or, where ``relative``, what the blocks add to
    the stream; reusing it skips them all.

    Args:
        graph: that the sites were found in.
        sites: of the blocks, in order.
        name: of the site.
        relative: what its value is.
    """
    chained = all(b.source == a.residual for a, b in pairwise(sites))
    if not sites or not chained or any(len(site.values) > 1 for site in sites):
        return None
    last = next(node for node in graph.nodes if node.name == sites[-1].residual)
    value = SiteValue(last.name, TensorSpec.of(last.meta["val"]), output_module(last))
    return Site(
        name=name,
        kind=SiteKind.STACK,
        values=(value,),
        module=None,
        source=sites[0].source,
        reader=sites[0].reader,
        residual=last.name,
        anchors=(),
        covers=tuple(site.name for site in sites),
        relative=relative,
    )
