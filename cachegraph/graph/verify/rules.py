"""What must hold of a step graph after every pass.

Each rule is a function that yields what is broken; the pipeline calls :func:`verify` after every
pass, so a pass that breaks the graph is caught at once, by name.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.errors import VerifyError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import CONSTANT, KNOWN, SLOT, Stage, StepGraph, copy_graph
from cachegraph.graph.text import graph_text, node_lines
from cachegraph.graph.weights import stored_weight
from cachegraph.model.site import Site
from cachegraph.model.structure import Dependence
from cachegraph.plan.action import Compute, Forecast, Refresh, Reuse, sources
from cachegraph.plan.slot import EXTRAS
from cachegraph.spec import spec_text

from .nodes import not_functional, recompute
from .prologue import prologues_agree

Broken = tuple[str, str, str]  # what, site, node
_INLINE_CONSTANT_BYTES = 64 * 1024


@dataclass
class Given:
    """What graphs were made from, and what is known of them so far.

    Attributes:
        traced: the model's graph, before any pass.
        weights: name -> tensor of everything that a graph may use by name.
        agreed: pairs of specs, recorded and recomputed, that were found to agree.
        last: no pass follows.
        text: of the graph that was verified last.
    """

    traced: fx.Graph
    weights: Mapping[str, Tensor]
    agreed: set[tuple[int, int]] = field(default_factory=set)
    last: bool = True
    text: str = ""
    _checked: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    _needed: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    @cached_property
    def dependence(self) -> Dependence:
        """Who depends on whom in the traced graph."""
        return Dependence(self.traced)

    def seen(self, node: fx.Node) -> bool:
        """True where a node is as it was when it was last marked: no rule need look again."""
        seen = self._checked.get(node, ())
        state = _state(node)
        return len(seen) == len(state) and all(map(operator.is_, seen, state))

    def mark(self, node: fx.Node) -> None:
        """Remember that a node keeps the rules that look at it and at its inputs' values alone."""
        self._checked[node] = _state(node)

    def needed(self, step: StepGraph) -> tuple[set[str], set[tuple[str, int]]]:
        """See :func:`_needed`: found once for a variant."""
        variant, found = self._needed.get(id(step.variant), (None, None))
        if variant is not step.variant or found is None:
            found = _needed(step, self)
            self._needed[id(step.variant)] = step.variant, found
        return found


def _state(node: fx.Node) -> tuple[Any, ...]:
    """What decides the value of a node; fx replaces arguments and never changes them in place."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return node.op, node.target, node.args, node.kwargs, node.meta.get("val"), *values


def verify(step: StepGraph, given: Given, pass_name: str) -> None:
    """Check every rule.

    Args:
        step: the graph after the pass.
        given: what it was made from.
        pass_name: the pass that has just run, for the error.

    Raises:
        VerifyError: names rule, pass, variant, site and node.
    """
    for rule in RULES:
        for what, site, node in rule(step, given):
            name = rule.__name__.removeprefix("_").replace("_", " ")
            raise VerifyError(
                f"{name}: {what}",
                place=f"pass {pass_name}, {step.variant.name}, site {site or '-'}, node {node}",
                remedy="this is a bug in the pass, not in the schedule",
            )


def _well_formed(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Fx's own lint; one output, last; every node but a model input leads to the output."""
    try:
        step.graph.lint()
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        named = re.search(r"[Nn]ode '?(\w+)", what)
        yield what, "", named[1] if named else "-"
        return
    if [n.op for n in step.graph.nodes].count("output") != 1 or step.output.op != "output":
        yield "there must be one output, at the end", "", step.output.name
        return
    if step.stage is Stage.LOWERED:
        for node in step.graph.nodes:
            ours = any(key in node.meta for key in (SLOT, CONSTANT, KNOWN))
            if not node.users and node.op != "output" and (node.op != "placeholder" or ours):
                yield "nothing uses the node", "", node.name


def _inputs_in_order(step: StepGraph, given: Given) -> Iterator[Broken]:
    """The model's inputs, the slots that the row reads in table order, constants, known values."""
    nodes, spec = step.inputs, _specs(step)
    order = (SLOT, CONSTANT, KNOWN)
    kinds = [next((i + 1 for i, k in enumerate(order) if k in n.meta), 0) for n in nodes]
    if kinds != sorted(kinds) or kinds.count(0) != step.model_inputs:
        last = nodes[-1].name if nodes else "-"
        yield "inputs are out of order: model, slots, step constants, known values", "", last
        return
    for node, traced in zip(nodes, given.traced.find_nodes(op="placeholder"), strict=False):
        if node.target != traced.target or spec(node) != spec(traced):
            yield f"expected the model's input {traced.target}: {spec(traced)}", "", node.name
    expected = {key: i for i, key in enumerate(_expected_reads(step))}
    position = -1
    for node in nodes:
        if SLOT not in node.meta:
            continue
        slot = node.meta[SLOT]
        key = (slot.site, slot.value, slot.age)
        if key not in expected:
            yield "the row does not read this slot", slot.site, node.name
        elif position >= expected[key]:
            yield "slots are out of order or read twice", slot.site, node.name
        elif spec(node) != str(slot.spec):
            yield f"the input is {spec(node)}, the slot {slot.spec}", slot.site, node.name
        else:
            position = expected[key]


def _expected_reads(step: StepGraph) -> list[tuple[str, int, int]]:
    """(site, value, age) of every slot that the row may read, in table order."""
    expected = []
    for site, action in zip(step.sites, step.variant.row, strict=True):
        ages = range(len(sources(action)))
        expected += [(site.name, value, age) for value in range(len(site.values)) for age in ages]
        if not isinstance(action, Compute):
            expected += [(site.name, part, 0) for part in EXTRAS]
    return expected


def _specs(step: StepGraph) -> Callable[[fx.Node], str]:
    return lambda node: step.shapes.text(node.meta["val"]) if "val" in node.meta else "unknown"


def _outputs_in_order(step: StepGraph, given: Given) -> Iterator[Broken]:
    """The model's outputs, then one write for each value that the variant hands out."""
    spec = _specs(step)
    expected = [] if step.stage is Stage.TRACED else step.written_slots()
    count = len(step.outputs) - step.model_outputs
    if count != len(expected):
        yield f"{count} writes instead of {len(expected)}", "", step.output.name
        return
    returned: Any = given.traced.output_node().args[0]
    for traced, node in zip(returned, step.outputs, strict=False):
        if spec(node) != spec(traced):
            yield f"the model returns {spec(traced)} here, not {spec(node)}", "", node.name
    for slot, node in zip(expected, step.outputs[step.model_outputs :], strict=True):
        if step.stage is Stage.CACHED and node.target is not ops.write:
            yield "a write is not a cache.write", slot.site, node.name
        elif step.stage is Stage.CACHED and node.meta[SLOT].name != slot.name:
            yield f"expected the write of {slot.name}", slot.site, node.name
        elif spec(node) != str(slot.spec):
            yield f"the write is {spec(node)}, the slot {slot.spec}", slot.site, node.name


def _no_input_is_output(step: StepGraph, given: Given) -> Iterator[Broken]:
    """TensorRT refuses a graph that returns an input."""
    for node in step.outputs:
        if node.op == "placeholder":
            yield "an input is returned as an output", "", node.name


def _shapes_recompute(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Every node has a recorded value, and its operation on its inputs' values gives the same."""
    for node in step.graph.nodes:
        if node.op == "output" or given.seen(node):
            continue
        if problem := recompute(node, step.shapes, given.agreed):
            yield problem, "", node.name
        else:
            given.mark(node)  # the large constants were looked for before


def _functional(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Calls of operators and of arithmetic on sizes, none of which writes into its inputs."""
    for node in step.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield f"{node.op} {node.target} is not a function", "", node.name
        elif node.op == "call_function" and (problem := not_functional(node.target)):
            yield problem, "", node.name


def _cache_ops_in_stage(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Cache operations exist only between insertion and lowering, and name their slots."""
    for node in step.graph.nodes:
        if node.target not in ops.CACHE_OPS:
            continue
        if step.stage is not Stage.CACHED:
            yield f"cache operation in a graph that is {step.stage.name.lower()}", "", node.name
        elif node.target is ops.read and not _is_input(node.args[0], SLOT):
            yield "cache.read of something that is no slot", "", node.name
        elif node.target is ops.write and node.kwargs.get("slot") != node.meta[SLOT].name:
            slot = node.meta[SLOT]
            yield f"the write of {slot.name} says {node.kwargs.get('slot')}", slot.site, node.name
        elif node.target is ops.forecast:
            values, coefficients = node.args
            if not _is_input(coefficients, CONSTANT):
                yield "the coefficients are no step constant", "", node.name
            elif coefficients.meta["val"].shape[0] != len(values):
                yield f"{coefficients} is not one number a value", "", node.name


def _is_input(value: Any, key: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder" and key in value.meta


def _row_and_graph_agree(step: StepGraph, given: Given) -> Iterator[Broken]:
    """A reused site's work is gone and its slots are read; a computed site's work is there.

    What only reused sites would have used is needed no more: neither its work nor its slot.
    """
    if step.stage is not Stage.LOWERED:
        return
    computed, reused = given.needed(step)
    # What a prologue computes for the step counts as computed.
    graphs = [step.graph, *(p.graph for p in (step.request, step.prologue) if p is not None)]
    alive = {node.name for graph in graphs for node in graph.nodes}
    slots = {(slot.site, slot.value, slot.age) for slot in step.read_slots()}
    for site, action in zip(step.sites, step.variant.row, strict=True):
        match action:
            case Compute():
                missing = [v.node for v in site.values if v.node in computed - alive]
                if missing:
                    yield "the row computes the site, the graph does not", site.name, missing[0]
            case Reuse() | Forecast() | Refresh():
                left = [a for a in site.anchors if a in alive - computed]
                if left:
                    yield "the row reuses the site, its work is left", site.name, left[0]
                for value in range(len(site.values)):
                    wanted = (site.name, value) in reused
                    for age in range(len(sources(action))):
                        if wanted and (site.name, value, age) not in slots:
                            what = f"the row reuses the site, the graph reads no slot {value}@{age}"
                            yield what, site.name, "-"


def _needed(step: StepGraph, given: Given) -> tuple[set[str], set[tuple[str, int]]]:
    """What the outputs depend on where the row's reused values are given.

    Returns:
        Names of traced nodes that have to be computed, and (site, value index) of reused values.
    """
    row = dict(zip((site.name for site in step.sites), step.variant.row, strict=True))
    sites = {site.name: site for site in step.sites}
    keys = {v.node: (site.name, i) for site in step.sites for i, v in enumerate(site.values)}
    outputs = given.traced.output_node().all_input_nodes
    by_name = {n.name: n for n in given.traced.nodes}
    todo = [*outputs]
    for slot in step.written_slots():
        if slot.value not in EXTRAS:
            todo += _parts(sites[slot.site], slot.value, by_name)
    computed: set[str] = set()
    reused: set[tuple[str, int]] = set()
    while todo:
        node = todo.pop()
        key = keys.get(node.name)
        if key is not None and not isinstance(row[key[0]], Compute):
            site = sites[key[0]]
            if key not in reused and isinstance(row[key[0]], Refresh):
                todo += _around(given.dependence, node, by_name[site.source])
            elif key not in reused:
                todo += _parts(site, key[1], by_name)[1:]
            reused.add(key)
        elif node.name not in computed:
            computed.add(node.name)
            todo += node.all_input_nodes
    return computed, reused


def _parts(site: Site, index: int, nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """The node of a site's value, and the one that a relative value is the distance from."""
    names = (site.values[index].node, *((site.source,) if site.relative else ()))
    return [nodes[name] for name in names]


def _around(dependence: Dependence, value: fx.Node, source: fx.Node) -> list[fx.Node]:
    """What the region between a site's source and its value takes from outside of it."""
    inside = {value, *dependence.between(source, value)}
    return [given for node in inside for given in node.all_input_nodes if given not in inside]


def _no_large_inline_constants(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Tensors stand in the weight store, not in arguments."""
    for node in step.graph.nodes:
        if given.seen(node):
            continue
        for leaf in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, Tensor) and leaf.nbytes > _INLINE_CONSTANT_BYTES:
                yield f"an inline constant of {leaf.nbytes} bytes", "", node.name


def _text_is_reproducible(step: StepGraph, given: Given) -> Iterator[Broken]:
    """It names no memory, and printing a copy gives the same, so digests can be trusted.

    Copies are printed of what all passes have made only.
    """
    given.text = text = graph_text(step)
    if " at 0x" in text and (named := re.search(r"%(\w+) = .* at 0x[0-9a-f]", text)):
        yield "the text holds the address of an object", "", named[1]
        return
    graphs = (step.graph, copy_graph(step.graph)) if given.last else ()
    if len({tuple(node_lines(graph, step.shapes)) for graph in graphs}) > 1:
        yield "the text of a copy differs", "", "-"


def _weights_are_stored(step: StepGraph, given: Given) -> Iterator[Broken]:
    """Every weight is in the store under its name, or a view of one, and never a copy."""
    shapes, spec = step.shapes, _specs(step)
    for node in step.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        holder, _, leaf = name.rpartition(".")
        tensor = getattr(step.module.get_submodule(holder), leaf)
        if not isinstance(tensor, Tensor):
            continue  # the body of a higher-order operator
        try:
            stored = stored_weight(given.weights, name)
        except KeyError:
            yield f"weight {name!r} is not in the store", "", node.name
            continue
        text = shapes.text(stored) if stored is tensor else spec_text(stored)
        if spec(node) != text:
            yield f"weight {name!r} is {text} in the store", "", node.name
        elif stored is not tensor and _memory(tensor) != _memory(stored):
            yield f"weight {name!r} is another tensor than the store's", "", node.name


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()


RULES: tuple[Callable[[StepGraph, Given], Iterator[Broken]], ...] = (
    _well_formed,
    _inputs_in_order,
    _outputs_in_order,
    _no_input_is_output,
    _no_large_inline_constants,
    _shapes_recompute,
    _functional,
    _cache_ops_in_stage,
    _row_and_graph_agree,
    _text_is_reproducible,
    _weights_are_stored,
    prologues_agree,
)
