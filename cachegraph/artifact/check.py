"""Whether the parts of an artifact fit together, before any of them runs.

Digests tell damage. An artifact that was edited and signed anew would fail in mid-trajectory, or
compute something else: so program, graphs, weights and signature are compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cachegraph.errors import ArtifactError, SessionError
from cachegraph.graph.interface import Interface, Port, Role
from cachegraph.graph.weights import is_stored
from cachegraph.model.conditions import failed
from cachegraph.runtime.known import REQUEST, prologue_name
from cachegraph.runtime.program import Made, OtherPlan, Program, Step
from cachegraph.runtime.tracking import checked_timesteps
from cachegraph.spec import TensorSpec

_MAX_STEPS = 100_000


def graph_names(program: Program) -> list[str]:
    """The graphs of a program: variants, then prologues."""
    names = [layout.name for layout in program.variants]
    names += [REQUEST] if program.request is not None else []
    return names + [prologue_name(v.name) for v in program.variants if v.prologue is not None]


def check_program(
    program: Program, graphs: Mapping[str, str], weights: Mapping[str, Tensor], place: str
) -> None:
    """Refuse parts that do not fit together.

    Args:
        program: as the manifest says.
        graphs: name -> graph as JSON.
        weights: name -> tensor.
        place: of the artifact, for the error.

    Raises:
        ArtifactError: says the first thing that does not fit.
    """
    checks = (
        _whole(program),
        _sizes(program),
        _signature(program),
        _interfaces(program),
        _steps(program),
    )
    for problem in (*(p for check in checks for p in check), *_graphs(program, graphs, weights)):
        raise _misfit(problem, place)


def check_forms(forms: Sequence[tuple[Program, Mapping[str, OtherPlan]]], place: str) -> None:
    """Refuse forms of call that are not of the same plans.

    Args:
        forms: program and plans of each.
        place: of the artifact, for the error.

    Raises:
        ArtifactError: there is none, or two differ in more than a form may.
    """
    asked = []
    for program, plans in forms:
        every = (program, *(program.with_plan(other) for other in plans.values()))
        steps = [(len(one.steps), one.timesteps, one.ascending) for one in every]
        asked.append((tuple(plans), steps))
    if not asked:
        raise _misfit("there is no form of call", place)
    if any(one != asked[0] for one in asked):
        raise _misfit("the forms of call are of different plans", place)


def _misfit(problem: str, place: str) -> ArtifactError:
    what = f"the parts of the artifact do not fit together: {problem}"
    return ArtifactError(what, place=place, remedy="compile it again")


def _whole(program: Program) -> Iterator[str]:
    steps, sites = len(program.steps), len(program.sites)
    if not 0 < steps <= _MAX_STEPS or not program.variants:
        yield f"{steps} steps, {len(program.variants)} variants"
        return
    names = [layout.name for layout in program.variants]
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        yield f"variants are called {', '.join(names)}"
    if len(program.rows) != steps or any(len(row) != sites for row in program.rows):
        yield "the plan has not one row a step and one action a site"
    if any(not 0 <= step.variant < len(names) for step in program.steps):
        yield "a step runs a variant that is not there"


def _sizes(program: Program) -> Iterator[str]:
    sizes = [*program.symbols.values(), *program.cost.symbols.values()]
    if program.batch is not None and program.batch not in program.symbols:
        yield f"the batch {program.batch} has no size"
    names = [*program.names.values()]
    whole = len({*names}) == len(names) and all(name.isidentifier() for name in names)
    if not whole or not program.names.keys() <= program.symbols.keys():
        yield f"sizes are called {', '.join(names)}"
    if any(size < 1 for size in sizes):
        yield "a size below 1"
    try:
        if (broken := failed(program.conditions, program.symbols)) is not None:
            yield f"{broken} does not hold for the sizes that it was traced with"
    except (ValueError, KeyError, ZeroDivisionError) as error:
        yield f"a condition cannot be read: {error}"
    if program.timesteps is not None:
        try:
            checked_timesteps(program.timesteps, len(program.steps), program.ascending)
        except SessionError as error:
            yield str(error)


def _signature(program: Program) -> Iterator[str]:
    signature = program.signature
    count = len(signature.inputs)
    trees = [*signature.arguments.values()]
    if not count or sorted(_tensors(trees)) != list(range(count)):
        yield "the arguments do not hold each input once"
    if not set(_tensors([signature.result])) <= set(range(len(signature.outputs))):
        yield "the result holds outputs that are not there"
    if not {*signature.arguments} <= {p.name for p in signature.parameters}:
        yield "an argument that no parameter takes"
    if not set(program.lasting) <= set(range(count)):
        yield "an input is to last that is not there"


def _tensors(tree: Any) -> Iterator[int]:
    """Positions of tensors in a tree of the signature; -1 for what is no such tree."""
    match tree:
        case {"tensor": int(index)}:
            yield index
        case {"const": bool() | int() | float() | str() | None}:
            return
        case {"dict": dict(children)} | {"object": dict(children)}:
            yield from _tensors([*children.values()])
        case {"each": child}:
            yield from _tensors([child])
        case {"list": list(children)} | {"tuple": list(children)}:
            yield from _tensors(children)
        case list():
            for child in tree:
                yield from _tensors(child)
        case _:
            yield -1


def _interfaces(program: Program) -> Iterator[str]:
    signature = program.signature
    taken = [spec for _, spec in signature.inputs]
    prologues = [v.prologue for v in program.variants]
    for interface in (*(v.interface for v in program.variants), program.request, *prologues):
        if interface is None:
            continue
        names = [port.name for port in (*interface.inputs, *interface.outputs)]
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            yield f"inputs and outputs are called {', '.join(names[:9])}, ..."
        own = [port.spec for port in interface.inputs if port.role is Role.MODEL]
        if own != taken or _roles(interface.inputs)[: len(own)] != [Role.MODEL] * len(own):
            yield "a graph takes other inputs than the model"
    request = {p.of: p.spec for p in _outputs(program.request)}
    for layout in program.variants:
        outputs = layout.interface.outputs
        given = [port.spec for port in outputs if port.role is Role.MODEL]
        if given != list(signature.outputs) or _roles(outputs) != sorted(
            _roles(outputs), key=lambda role: role is not Role.MODEL
        ):
            yield f"{layout.name} returns something else than the model"
        step = {p.of: p.spec for p in _outputs(layout.prologue)}
        for port in layout.interface.known:
            made = request if port.role is Role.REQUEST else step
            if made.get(port.of) != port.spec:
                yield f"{layout.name} takes {port.of}, which no prologue computes"


def _roles(ports: tuple[Port, ...]) -> list[Role]:
    return [port.role for port in ports]


def _outputs(interface: Interface | None) -> tuple[Port, ...]:
    return interface.outputs if interface is not None else ()


def _steps(program: Program) -> Iterator[str]:
    """What is read is there then: made before, kept, not freed, and of that spec."""
    alive: dict[Made, TensorSpec] = {}
    for number, step in enumerate(program.steps):
        if not 0 <= step.variant < len(program.variants):
            return
        interface = program.layout(number).interface
        if {*step.slots} != {port.name for port in interface.slots}:
            yield f"step {number} does not say where its slots come from"
            return
        for port in interface.slots:
            made = port.of, step.slots[port.name]
            if alive.get(made) != port.spec:
                yield f"step {number} reads {port.of} of step {made[1]}, which is not kept"
        yield from _constants(number, step, interface, program)
        written = {port.name: port for port in interface.writes}
        if not step.keeps <= written.keys():
            yield f"step {number} keeps what it does not write"
            return
        alive.update({(written[n].of, number): written[n].spec for n in step.keeps})
        for freed in step.frees:
            alive.pop(freed, None)


def _constants(number: int, step: Step, interface: Interface, program: Program) -> Iterator[str]:
    if {*step.constants} != {port.name for port in interface.constants}:
        yield f"step {number} does not say its step constants"
        return
    sizes = dict(program.symbols)
    for port in interface.constants:
        try:
            numbers = np.asarray(step.constants[port.name])
        except ValueError:
            numbers = np.asarray("ragged")
        whole = numbers.dtype.kind == "i" and not port.spec.dtype.is_floating_point
        if not whole and not (numbers.dtype.kind in "if" and port.spec.dtype.is_floating_point):
            yield f"step {number}: {port.name} is no tensor of {port.spec}"
            return
        for dim, size in zip(port.spec.shape, numbers.shape, strict=False):
            if isinstance(dim, str):
                sizes.setdefault(dim, size)
        wanted = [d if isinstance(d, int) else sizes.get(d, -1) for d in port.spec.shape]
        if wanted != list(numbers.shape) or not np.isfinite(numbers).all():
            yield f"step {number}: {port.name} is no tensor of {port.spec}"


def _graphs(
    program: Program, graphs: Mapping[str, str], weights: Mapping[str, Tensor]
) -> Iterator[str]:
    interfaces = {layout.name: layout.interface for layout in program.variants}
    interfaces |= {prologue_name(v.name): v.prologue for v in program.variants if v.prologue}
    if program.request is not None:
        interfaces[REQUEST] = program.request
    for name, text in graphs.items():
        try:
            nodes = json.loads(text)
            ops = [(node["op"], str(node["target"]), node) for node in nodes]
        except (ValueError, TypeError, KeyError):
            yield f"the graph of {name} is no list of nodes"
            return
        inputs = [(target, node.get("spec")) for op, target, node in ops if op == "placeholder"]
        if inputs != [(port.name, str(port.spec)) for port in interfaces[name].inputs]:
            yield f"the graph of {name} takes other inputs than its interface says"
        returned = [node.get("args") for op, _, node in ops if op == "output"]
        specs = {str(node.get("name")): node.get("spec") for _, _, node in ops}
        try:
            [[outputs]] = returned
            found = [specs[value["node"]] for value in outputs]
        except (ValueError, TypeError, KeyError, LookupError):
            found = []
        if found != [str(port.spec) for port in interfaces[name].outputs]:
            yield f"the graph of {name} returns something else than its interface says"
        for op, target, _ in ops:
            if op == "get_attr" and not is_stored(weights, target):
                yield f"the graph of {name} uses {target}, which is no weight"
