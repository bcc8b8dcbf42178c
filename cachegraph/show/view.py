"""What there is to see of a compiled loop, whether just built or read from an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.table import Table
from torch import fx

from cachegraph.artifact.artifact import Artifact
from cachegraph.compiler.compile import Build
from cachegraph.compiler.cost import PlanCost, plan_cost
from cachegraph.compiler.pipeline import PassReport
from cachegraph.compiler.program import interface_of, named_prologues
from cachegraph.errors import InputError, nearest
from cachegraph.graph.binding import Binding
from cachegraph.graph.interface import Interface, Role
from cachegraph.graph.step_graph import CONSTANT, SLOT, Stage, StepGraph
from cachegraph.graph.text import graph_text
from cachegraph.model.site import Site
from cachegraph.model.trace import TracedModel
from cachegraph.plan.plan import Plan
from cachegraph.plan.slot import ConstantKind, Slot
from cachegraph.plan.variant import Variant
from cachegraph.runtime.forms import forms_in_words
from cachegraph.runtime.program import Program
from cachegraph.spec import BATCH, SIZES

from .fold import Folding
from .picture import letters, plain_table

_SHOWN = {*SIZES, "tokens"} - {BATCH}


@dataclass(frozen=True)
class View:
    """A plan with its graphs.

    Attributes:
        plan: what every step does.
        cost: what a trajectory costs.
        batch: the symbol that stands for the batch, or None where it is fixed.
        batch_text: what costs hold for: ``batch 2``.
        graphs: the lowered graph of each variant.
        texts: the graphs as text.
        reports: what each pass did; empty for an artifact.
        interfaces: what each graph takes and returns.
        prologues: the graphs that compute what is known beforehand, by name.
        source: what is looked at.
    """

    plan: Plan
    cost: PlanCost
    batch: str | None
    batch_text: str
    graphs: tuple[StepGraph, ...]
    texts: tuple[str, ...]
    reports: tuple[PassReport, ...]
    interfaces: tuple[Interface, ...]
    prologues: Mapping[str, fx.GraphModule]
    source: Build | Artifact

    @property
    def schedule_text(self) -> str:
        """What was asked for, as YAML."""
        source = self.source
        return source.schedule_text if isinstance(source, Artifact) else source.schedule.to_yaml()

    @cached_property
    def folding(self) -> Folding:
        """The graphs of variants and prologues, folded."""
        graphs = {step.variant.name: step.graph for step in self.graphs}
        graphs |= {name: module.graph for name, module in self.prologues.items()}
        return Folding(graphs, self.source.provenance)

    def tokens(self, step: int) -> dict[str, int]:
        """Symbol -> how many tokens a step recomputes."""
        index = self.plan.variant_of[step]
        kinds = {constant.name: constant for constant in self.plan.variants[index].constants}
        return {
            str(port.spec.shape[0]): len(kinds[port.name].values[step])
            for port in self.interfaces[index].constants
            if kinds[port.name].kind is ConstantKind.TOKENS
        }

    def mean_tokens(self, variant: Variant) -> dict[str, float]:
        """Symbol -> how many tokens the steps of a variant recompute on average."""
        counts = [self.tokens(step) for step in variant.steps]
        return {name: sum(one[name] for one in counts) / len(counts) for name in counts[0]}

    def variant(self, name: str) -> int:
        """Index of the variant of that name.

        Raises:
            InputError: there is none.
        """
        names = [variant.name for variant in self.plan.variants]
        if name not in names:
            raise InputError(
                f"unknown variant {name!r}",
                expected=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
                remedy=nearest(name, names),
            )
        return names.index(name)


def view_build(built: Build, batch: int | None = None) -> View:
    """A view of what was just built.

    Args:
        built: with its graphs.
        batch: costs are computed for this batch; None: for that of the example inputs.

    Raises:
        InputError: the batch is fixed.
    """
    traced, cost = built.traced, built.cost
    if batch is not None:
        if traced.batch is None:
            reason = traced.fixed_batch_reason
            raise InputError(f"--batch: the batch of this model is fixed ({reason})")
        symbols = {**traced.symbols, traced.batch: batch}
        cost = plan_cost(built.plan, built.graphs, traced.module, built.weights, symbols)
    texts = tuple(map(graph_text, built.graphs))
    said = _sizes_text(traced, cost)
    return View(
        built.plan,
        cost,
        traced.batch,
        said,
        built.graphs,
        texts,
        built.reports,
        tuple(map(interface_of, built.graphs)),
        named_prologues(built.graphs),
        built,
    )


def view_artifact(artifact: Artifact) -> View:
    """A view of an artifact; which pass made a node stands in the texts only."""
    program = artifact.program
    plan = program.plan
    graphs = tuple(_step_graph(artifact, plan, index) for index in range(len(plan.variants)))
    said = _sizes_text(program, program.cost)
    interfaces = tuple(layout.interface for layout in program.variants)
    texts, prologues = artifact.texts, artifact.prologues
    return View(
        plan, program.cost, program.batch, said, graphs, texts, (), interfaces, prologues, artifact
    )


def parts_of(artifact: Artifact) -> list[tuple[str, Artifact]]:
    """An artifact for each plan and form of call, with what tells it apart behind a heading."""
    programs = [one.program for one in (artifact, *artifact.forms)]
    forms = forms_in_words(programs) if artifact.forms else [""]
    found = []
    for name in artifact.plans or ("",):
        plan = artifact.plan(name) if name else artifact
        said = f": plan {name}" if name else ""
        for words, one in zip(forms, (plan, *plan.forms), strict=True):
            form = f", {words}" if name and words else f": {words}" if words else ""
            found.append((said + form, replace(one, forms=())))
    return found


def choices(varying: Sequence[str], disabled: Sequence[str]) -> str:
    """What was chosen otherwise than usual, behind a heading: ``, varying y, without hoist-known``.

    Args:
        varying: inputs that were said to differ from step to step.
        disabled: names of exact optimisations that were left out.
    """
    return "".join(
        f", {word} {', '.join(names)}"
        for word, names in (("varying", varying), ("without", disabled))
        if names
    )


def sites_table(sites: Sequence[Site]) -> Table:
    """One line a site: name, kind, what is kept of it, the module that holds it."""
    table = plain_table("site", "kind", "values", "module")
    for site in sites:
        values = ", ".join(str(value.spec) for value in site.values)
        table.add_row(site.name, site.kind, values, site.module or "(part of one)")
    return table


def passes_table(reports: Sequence[PassReport]) -> Table:
    """One line a variant and pass: rewrites, nodes before and after, time."""
    numbers = ("rewrites", "nodes", "ms")
    table = plain_table("variant", "pass", *numbers, right=numbers)
    before = ""
    for one in reports:
        nodes = f"{one.nodes[0]} -> {one.nodes[1]}"
        shown = "" if one.variant == before else one.variant
        table.add_row(shown, one.pass_name, str(one.rewrites), nodes, f"{one.seconds * 1e3:.0f}")
        before = one.variant
    return table


def plan_data(view: View, model: str, schedule: str) -> dict[str, Any]:
    """The plan as plain data, for ``plan --json``; FLOPs and bytes are whole numbers.

    The FLOPs of a variant are the mean of its steps.
    """
    plan, cost = view.plan, view.cost
    return {
        "model": model,
        "schedule": schedule,
        "steps": plan.steps,
        "full_steps": plan.full_steps(),
        "sizes": dict(cost.symbols),
        "batch": view.batch,
        "sites": [
            {
                "name": site.name,
                "kind": str(site.kind),
                "values": [str(value.spec) for value in site.values],
                "module": site.module,
            }
            for site in plan.sites
        ],
        "rows": [letters(plan, row) for row in plan.rows],
        "variants": [
            {
                "name": variant.name,
                "steps": list(variant.steps),
                "row": letters(plan, variant.row),
                "flops": round(cost.mean_flops(variant.steps)),
            }
            for variant in plan.variants
        ],
        "flops": list(cost.flops),
        "total_flops": cost.total_flops,
        "uncached_flops": cost.full_flops * plan.steps,
        "speed_up_limit": cost.limit,
        "cache_bytes": list(cost.cache_bytes),
        "unfreed_cache_bytes": list(plan.unfreed_bytes(cost.symbols)),
        "history_depths": list(plan.history_depths()),
        "peak_cache_bytes": max(cost.cache_bytes),
        "known_bytes": list(cost.known_bytes),
        "weight_bytes": cost.weight_bytes,
        "prologue_weight_bytes": cost.prologue_bytes,
        "peak_bytes": max(cost.peak_bytes, default=None),
    }


def _sizes_text(of: TracedModel | Program, cost: PlanCost) -> str:
    """The sizes that costs are of: ``batch 2, height 64 and width 64 of many``."""
    _, spec = of.signature.inputs[0]
    text = f"batch {'' if of.batch else 'fixed at '}{spec.sizes(cost.symbols)[0]}"
    others = [f"{name} {cost.symbols[s]}" for s, name in of.names.items() if name in _SHOWN]
    return text + (f", {' and '.join(others)} of many" if others else "")


def _step_graph(artifact: Artifact, plan: Plan, index: int) -> StepGraph:
    """A variant's graph with its slots and step constants marked again."""
    program, variant = artifact.program, plan.variants[index]
    graph = StepGraph(
        artifact.graphs[index],
        variant,
        program.sites,
        Stage.LOWERED,
        bindings=(Binding.DYNAMIC,) * len(program.signature.inputs),
        model_outputs=len(program.signature.outputs),
    )
    constants = {constant.name: constant for constant in variant.constants}
    ports = program.variants[index].interface.inputs
    for node, port in zip(graph.inputs, ports, strict=True):
        if port.role is Role.SLOT:
            node.meta[SLOT] = Slot.of(port.of, port.age, port.spec)
        elif port.role is Role.CONSTANT:
            node.meta[CONSTANT] = constants[port.name]
    return graph
