"""What must hold of the graphs that run before a step does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from cachegraph.graph.binding import Binding, Known, binding_times
from cachegraph.graph.step_graph import StepGraph
from cachegraph.spec import TensorSpec

from .nodes import not_functional, recompute

if TYPE_CHECKING:
    from .rules import Broken, Given


def prologues_agree(step: StepGraph, given: Given) -> Iterator[Broken]:
    """A prologue computes just the step's known values, from what is known when it runs."""
    for module, binding in ((step.request, Binding.REQUEST), (step.prologue, Binding.STEP)):
        wanted = [known for known in step.known if known.binding is binding]
        if module is None:
            if wanted:
                yield f"no prologue computes {wanted[0].name}", "", f"known_{wanted[0].name}"
            continue
        yield from _values(module.graph, wanted)
        yield from _nodes(module.graph, step, given)
        yield from _known_in_time(step, module.graph, binding)


def _values(graph: fx.Graph, wanted: list[Known]) -> Iterator[Broken]:
    returned: Any = graph.output_node().args[0]
    if len(returned) != len(wanted):
        yield f"a prologue returns {len(returned)} values instead of {len(wanted)}", "", "output"
    for node, known in zip(returned, wanted, strict=False):
        found = TensorSpec.of(node.meta["val"])
        if node.args[0].name != known.name:
            yield f"a prologue returns {node.args[0].name} in place of {known.name}", "", node.name
        elif found != known.spec:
            yield f"a prologue returns {found}, the step takes {known.spec}", "", node.name


def _nodes(graph: fx.Graph, step: StepGraph, given: Given) -> Iterator[Broken]:
    try:
        graph.lint()
    except (RuntimeError, AssertionError) as error:
        yield str(error).splitlines()[0], "", "-"
        return
    for node in graph.nodes:
        if node.op == "call_function":
            problem = not_functional(node.target) or recompute(node, step.shapes, given.agreed)
            if problem:
                yield problem, "", node.name


def _known_in_time(step: StepGraph, graph: fx.Graph, binding: Binding) -> Iterator[Broken]:
    """Nothing but sizes is taken from inputs that are known too late."""
    inputs = graph.find_nodes(op="placeholder")
    if len(inputs) != step.model_inputs:
        yield "a prologue takes other inputs than the model", "", "-"
        return
    given = {node.name: b for node, b in zip(inputs, step.bindings, strict=True)}
    times = binding_times(graph, given)
    for node in graph.nodes:
        if node.op == "call_function" and times[node] > binding:
            yield f"{node.name} is known too late for a prologue", "", node.name
            return
