"""A compiled denoising loop as data: what a runner needs, free of the model's code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachegraph.compiler.cost import PlanCost
from cachegraph.graph.binding import Binding
from cachegraph.graph.step_graph import CONSTANT, StepGraph, request_values
from cachegraph.model.signature import CallSignature
from cachegraph.model.site import Site
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Refresh, Row, sources
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Selection
from cachegraph.plan.slot import ORDER
from cachegraph.plan.variant import VALUES
from cachegraph.schedule.schedule import Schedule
from cachegraph.spec import SpecText, TensorSpec

from .batching import batching_problem
from .tracking import timestep_input


@dataclass(frozen=True)
class Step:
    """One step of a trajectory.

    Attributes:
        variant: index of the graph that it runs.
        slots: (site, value, step that made it) for each slot input, in graph order; one of EXTRAS
            may stand in place of the value.
        constants: the numbers of each step constant, in graph order.
        keeps: for each written output, whether a later step uses it.
        frees: (site, step that made it, VALUES or one of EXTRAS) of what nothing needs afterwards.
    """

    variant: int
    slots: tuple[tuple[int, int, int], ...]
    constants: tuple[Any, ...]
    keeps: tuple[bool, ...]
    frees: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class VariantLayout:
    """How a graph is called.

    Attributes:
        name: of the variant.
        inputs: the model's, slots, step constants, known values.
        writes: (site, value) of each output behind the model's.
        known: per known value, its index among those of the request, or None where it is the next
            of the step's own.
        step_by_step: why known values cannot be computed for several steps at once; empty where
            they can.
    """

    name: str
    inputs: tuple[SpecText, ...]
    writes: tuple[tuple[int, int], ...]
    known: tuple[int | None, ...] = ()
    step_by_step: str = ""


@dataclass(frozen=True)
class Program:
    """Everything but graphs and weights.

    Attributes:
        sites: every site of the model, in execution order.
        rows: what each step does at each site.
        selection: how tokens are chosen, where some are refreshed.
        cost: what a trajectory costs, predicted.
        steps: what each step does.
        variants: how the graphs are called.
        signature: how the model is called.
        lasting: indices of the model's inputs that known values depend on and that must therefore
            stay the same throughout a trajectory.
        batch: the symbol that stands for the batch, or None where it is fixed.
        symbols: shape symbols with the sizes that the model was traced with.
        timesteps: the sampler's, one a step, or None.
        ascending: time grows along a trajectory.
        config: the model's own configuration, as plain data.
        varying: inputs that were said to differ from step to step.
        disabled: names of exact optimisations that were left out.
    """

    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    selection: Selection | None
    cost: PlanCost
    steps: tuple[Step, ...]
    variants: tuple[VariantLayout, ...]
    signature: CallSignature
    lasting: tuple[int, ...]
    batch: str | None
    symbols: Mapping[str, int]
    timesteps: tuple[float, ...] | None
    ascending: bool
    config: Mapping[str, Any]
    varying: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan that the program carries out."""
        return make_plan(self.sites, self.rows, selection=self.selection)


def make_program(
    traced: TracedModel,
    schedule: Schedule,
    plan: Plan,
    graphs: Sequence[StepGraph],
    cost: PlanCost,
) -> Program:
    """Resolve every step's inputs and outputs.

    Args:
        traced: the model.
        schedule: for the sampler's timesteps.
        plan: what the steps do.
        graphs: the lowered graph of each variant.
        cost: what the plan costs.
    """
    request = [known.name for known in request_values(graphs)]
    layouts = tuple(_layout(graph, request, traced) for graph in graphs)
    return Program(
        sites=plan.sites,
        rows=plan.rows,
        selection=plan.selection,
        cost=cost,
        steps=tuple(
            _step(plan, graphs[variant], layouts[variant], step)
            for step, variant in enumerate(plan.variant_of)
        ),
        variants=layouts,
        signature=traced.signature,
        lasting=_lasting(graphs),
        batch=traced.batch,
        symbols=dict(traced.symbols),
        timesteps=schedule.timesteps,
        ascending=schedule.order == "ascending",
        config=traced.config,
    )


def _lasting(graphs: Sequence[StepGraph]) -> tuple[int, ...]:
    used: set[int] = set()
    for step in graphs:
        for module in (step.request, step.prologue):
            if module is None:
                continue
            inputs = module.graph.find_nodes(op="placeholder")
            used.update(
                i
                for i, (node, binding) in enumerate(zip(inputs, step.bindings, strict=True))
                if binding is Binding.REQUEST and node.users
            )
    return tuple(sorted(used))


def _layout(graph: StepGraph, request: Sequence[str], traced: TracedModel) -> VariantLayout:
    writes = tuple(
        (index, value)
        for index, (site, written) in enumerate(zip(graph.sites, graph.variant.writes, strict=True))
        if written
        for value in range(len(site.values))
    )
    writes += tuple((i, part) for i, parts in enumerate(graph.variant.extras) for part in parts)
    inputs = tuple(TensorSpec.of(node.meta["val"]) for node in graph.inputs)
    known = tuple(
        request.index(k.name) if k.binding is Binding.REQUEST else None for k in graph.known
    )
    problem = batching_problem(graph, timestep_input(traced.signature), traced.symbols)
    if problem:
        warnings.warn(
            f"{graph.variant.name}: values known beforehand are computed step by step: {problem}",
            stacklevel=2,
        )
    return VariantLayout(graph.variant.name, inputs, writes, known, problem)


def _step(plan: Plan, graph: StepGraph, layout: VariantLayout, step: int) -> Step:
    index = {site.name: i for i, site in enumerate(plan.sites)}
    slots = []
    for slot in graph.read_slots():
        site = index[slot.site]
        action = plan.rows[step][site]
        if slot.value == ORDER and isinstance(action, Refresh):
            made = action.scored
        else:
            made = sources(action)[slot.age]
        slots.append((site, slot.value, made))
    constants = [n.meta[CONSTANT].values[step] for n in graph.inputs if CONSTANT in n.meta]
    return Step(
        variant=plan.variant_of[step],
        slots=tuple(slots),
        constants=tuple(constants),
        keeps=tuple(plan.is_kept(s, step, min(v, VALUES)) for s, v in layout.writes),
        frees=plan.freed_after[step],
    )
