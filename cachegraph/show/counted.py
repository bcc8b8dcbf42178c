"""Why FLOPs differ from published ones: what scores take here, and what the published code counts.

Ours are of the graphs that run. Attention hands out no map, so what each token received of it takes
a second product of queries and keys; published code has the map at hand, and pays in memory.
"""

from __future__ import annotations

from typing import Any

from cachegraph.compiler.compile import Build
from cachegraph.compiler.cost import node_flops, token_symbols
from cachegraph.compiler.counters import count_toca, projected_again
from cachegraph.errors import PlanError
from cachegraph.graph.provenance import total_flops
from cachegraph.passes.lower import Lower
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import uncached

from .picture import amount
from .view import View


def score_flops(view: View) -> int:
    """FLOPs of a trajectory that only the choice of tokens needs: products of its scores."""
    source, symbols = view.source, view.cost.symbols
    total, calls = 0, getattr(source, "calls", None)
    for index, step in enumerate(view.graphs):
        made = source.provenance.made_by.get(step.variant.name, {})
        flops = node_flops(step.module, symbols, token_symbols(step), calls)
        scores = [f for name, f in flops.items() if made.get(name, "").startswith(Lower.name)]
        for number in view.plan.variants[index].steps if scores else ():
            total += total_flops(scores, view.tokens(number))
    return total


def published_count(view: View, batch: int | None) -> dict[str, int]:
    """What the published code would count for the same plan; empty where that is not known.

    Returns:
        ``total_flops``, ``uncached_flops`` and, of the total, ``projected_again_flops``: products
        that it does and the graphs do not.
    """
    source = view.source
    if not isinstance(source, Build) or view.plan.selection is None:
        return {}
    traced = source.traced
    try:
        total = sum(count_toca(view.plan, traced, batch))
    except PlanError:  # no model that there is a published count of
        return {}
    [full] = count_toca(plan_of(uncached(1), traced), traced, batch)
    return {
        "total_flops": total,
        "uncached_flops": full * view.plan.steps,
        "projected_again_flops": projected_again(view.plan, traced, batch),
    }


def notes(view: View, batch: int | None) -> list[tuple[str, str]]:
    """Lines for a summary; none where no tokens are chosen."""
    found = []
    if view.plan.selection is not None and (scores := score_flops(view)):
        what = "for scores: attention keeps no map, so queries and keys are multiplied again"
        found.append(("", f"{amount(scores)} of them {what}"))
    if count := published_count(view, batch):
        total, full, again = count.values()
        text = f"{amount(total)} of {amount(full)}, {full / total:.2f}x, as ToCa's code counts"
        if again:
            text += f"; {amount(again)} of them project kept attention anew"
        found.append(("published", text))
    return found


def notes_data(view: View, batch: int | None) -> dict[str, Any]:
    """The same as data."""
    return {"score_flops": score_flops(view), "published_count": published_count(view, batch)}
