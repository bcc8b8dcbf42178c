"""Where the nodes of what was built come from."""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.graph.provenance import (
    PassRecord,
    Provenance,
    modules_of,
)
from cachegraph.graph.step_graph import ORIGIN, StepGraph
from cachegraph.model.site import block_of
from cachegraph.plan.plan import Plan

from .cost import PlanCost, node_flops, token_symbols
from .pipeline import PassReport
from .program import named_prologues
from .sized import SizedCalls


def make_provenance(
    plan: Plan,
    graphs: Sequence[StepGraph],
    reports: Sequence[PassReport],
    cost: PlanCost,
    calls: SizedCalls,
) -> Provenance:
    """Modules, passes and FLOPs of every node, prologues included.

    Args:
        plan: whose sites have modules.
        graphs: the lowered graph of each variant.
        reports: what each pass did.
        cost: for the sizes that FLOPs are counted for.
        calls: what is known of calls.
    """
    prologues = named_prologues(graphs)
    flops = {
        step.variant.name: node_flops(step.module, cost.symbols, token_symbols(step), calls)
        for step in graphs
    }
    flops |= {name: node_flops(m, cost.symbols, calls=calls) for name, m in prologues.items()}
    named = {step.variant.name: step.graph for step in graphs}
    named |= {name: module.graph for name, module in prologues.items()}
    return Provenance(
        modules=modules_of(named.values()),
        sites={site.name: site.module or block_of(site) for site in plan.sites},
        made_by={
            name: {n.name: str(n.meta[ORIGIN]) for n in graph.nodes if ORIGIN in n.meta}
            for name, graph in named.items()
        },
        flops=flops,
        passes=tuple(
            PassRecord(one.variant, one.pass_name, one.rewrites, one.nodes, one.removed)
            for one in reports
        ),
    )
