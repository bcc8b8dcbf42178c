"""What a runner needs, from the plan and the lowered graphs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx

from cachegraph.graph.binding import Binding
from cachegraph.graph.interface import Interface, Port, Role
from cachegraph.graph.step_graph import CONSTANT, KNOWN, SLOT, StepGraph, merge_prologues
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Refresh, sources
from cachegraph.plan.cost import PlanCost
from cachegraph.plan.plan import Plan
from cachegraph.plan.slot import EXTRAS, INNER, ORDER, slot_key
from cachegraph.plan.variant import VALUES
from cachegraph.runtime.known import REQUEST, prologue_name
from cachegraph.runtime.program import Made, Program, Step, VariantLayout
from cachegraph.runtime.tracking import timestep_input
from cachegraph.schedule.schedule import Schedule
from cachegraph.spec import TensorSpec

from .batching import batching_problem

_ROLES = {Binding.REQUEST: Role.REQUEST, Binding.STEP: Role.STEP}


def make_program(
    traced: TracedModel, schedule: Schedule, plan: Plan, graphs: Sequence[StepGraph], cost: PlanCost
) -> Program:
    """Resolve every step's inputs and outputs.

    Args:
        traced: the model.
        schedule: for the sampler's timesteps.
        plan: what the steps do.
        graphs: the lowered graph of each variant.
        cost: what the plan costs.
    """
    layouts = tuple(_layout(graph, traced) for graph in graphs)
    request = named_prologues(graphs).get(REQUEST)
    return Program(
        sites=plan.sites,
        rows=plan.rows,
        selection=plan.selection,
        cost=cost,
        steps=tuple(
            _step(plan, graphs[variant], layouts[variant].interface, step)
            for step, variant in enumerate(plan.variant_of)
        ),
        variants=layouts,
        request=prologue_interface(request, Role.REQUEST),
        signature=traced.signature,
        lasting=_lasting(graphs, traced),
        batch=traced.batch,
        symbols=dict(traced.symbols),
        timesteps=schedule.timesteps,
        ascending=schedule.order == "ascending",
        config=traced.config,
        conditions=traced.conditions,
        contents=traced.contents,
        items=traced.items,
        names=traced.names,
    )


def named_prologues(graphs: Sequence[StepGraph]) -> dict[str, fx.GraphModule]:
    """The graphs that compute what is known beforehand.

    Args:
        graphs: the lowered graph of each variant.

    Returns:
        ``request``, and ``variant0-prologue`` and so on, where there is something to compute.
    """
    found = {prologue_name(g.variant.name): g.prologue for g in graphs if g.prologue is not None}
    request = merge_prologues([g.request for g in graphs if g.request is not None])
    return found if request is None else {REQUEST: request, **found}


def interface_of(step: StepGraph) -> Interface:
    """What a lowered graph takes and returns."""
    inputs = tuple(map(_input, step.inputs))
    count = step.model_outputs
    names = ["out"] if count == 1 else [f"out{i}" for i in range(count)]
    roles = [(Role.MODEL, "")] * count
    for slot in step.written_slots():
        names.append(f"write_{slot.label}")
        roles.append((Role.WRITE, slot.key))
    taken = {port.name for port in inputs}
    outputs = []
    for name, (role, of), node in zip(names, roles, step.outputs, strict=True):
        while name in taken:
            name += "_"
        taken.add(name)
        outputs.append(Port(name, TensorSpec.of(node.meta["val"]), role, of))
    return Interface(inputs, tuple(outputs))


def _input(node: fx.Node) -> Port:
    name, spec = str(node.target), TensorSpec.of(node.meta["val"])
    if (slot := node.meta.get(SLOT)) is not None:
        return Port(name, spec, Role.SLOT, slot.key, slot.age)
    if CONSTANT in node.meta:
        return Port(name, spec, Role.CONSTANT)
    if (known := node.meta.get(KNOWN)) is not None:
        return Port(name, spec, _ROLES[known.binding], known.name)
    return Port(name, spec, Role.MODEL)


def prologue_interface(module: fx.GraphModule | None, role: Role) -> Interface | None:
    """An output is called as the input that takes it."""
    if module is None:
        return None
    returned: Any = module.graph.output_node().args[0]
    outputs = []
    for node in returned:
        value = node.args[0].name
        outputs.append(Port(f"known_{value}", TensorSpec.of(node.meta["val"]), role, value))
    inputs = module.graph.find_nodes(op="placeholder")
    return Interface(tuple(map(_input, inputs)), tuple(outputs))


def _layout(graph: StepGraph, traced: TracedModel) -> VariantLayout:
    problem = batching_problem(graph, timestep_input(traced.signature), traced.symbols)
    name = graph.variant.name
    if problem:
        warnings.warn(
            f"{name}: values known beforehand are computed step by step: {problem}", stacklevel=2
        )
    prologue = prologue_interface(graph.prologue, Role.STEP)
    return VariantLayout(name, interface_of(graph), prologue, problem)


def _step(plan: Plan, graph: StepGraph, interface: Interface, step: int) -> Step:
    index = {site.name: i for i, site in enumerate(plan.sites)}
    slots, constants = {}, {}
    for node in graph.inputs:
        if (slot := node.meta.get(SLOT)) is not None:
            made = sources(action := plan.rows[step][index[slot.site]])[slot.age]
            if slot.value in (ORDER, INNER) and isinstance(action, Refresh):
                made = action.scored
            slots[str(node.target)] = made
        elif CONSTANT in node.meta:
            constants[str(node.target)] = node.meta[CONSTANT].values[step]
    written = zip(interface.writes, graph.written_slots(), strict=True)
    keeps = frozenset(
        port.name
        for port, slot in written
        if plan.is_kept(index[slot.site], step, slot.value if slot.value in EXTRAS else VALUES)
    )
    return Step(plan.variant_of[step], slots, constants, keeps, _frees(plan, step))


def _frees(plan: Plan, step: int) -> tuple[Made, ...]:
    found: list[Made] = []
    for kept in plan.freed_after[step]:
        site = plan.sites[kept.site]
        parts = range(len(site.values)) if kept.part == VALUES else (kept.part,)
        found += [(slot_key(site.name, part), kept.made) for part in parts]
    return tuple(found)


def _lasting(graphs: Sequence[StepGraph], traced: TracedModel) -> tuple[int, ...]:
    used = {one.input for one in traced.contents}
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
