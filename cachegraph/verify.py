"""What must hold of a step graph after every pass.

Each rule is a function that yields what is broken; the pipeline calls :func:`verify` after every
pass, so a pass that breaks the graph is caught at once, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from . import ops
from .action import Compute, Forecast, Reuse, makes_value, sources
from .errors import VerifyError
from .graph import CONSTANT, SLOT, Stage, StepGraph, copy_module
from .spec import TensorSpec, spec_text
from .text import graph_text

Broken = tuple[str, str, str]  # what, site, node
_INLINE_CONSTANT_BYTES = 64 * 1024


def verify(step: StepGraph, weights: Mapping[str, Tensor], pass_name: str) -> None:
    """Check every rule.

    Args:
        step: the graph after the pass.
        weights: name -> tensor of everything a graph may use by name.
        pass_name: the pass that has just run, for the error.

    Raises:
        VerifyError: names rule, pass, variant, site and node.
    """
    for rule in (*RULES, _weights_rule(weights)):
        for what, site, node in rule(step):
            name = rule.__name__.removeprefix("_").replace("_", " ")
            raise VerifyError(
                f"{name}: {what}",
                place=f"pass {pass_name}, {step.variant.name}, site {site or '-'}, node {node}",
                remedy="this is a bug in the pass, not in the schedule",
            )


def _well_formed(step: StepGraph) -> Iterator[Broken]:
    """Fx's own lint; one output, last; every node but a model input leads to the output."""
    try:
        step.graph.lint()
    except (RuntimeError, AssertionError) as error:
        yield str(error).splitlines()[0], "", "-"
        return
    if [n.op for n in step.graph.nodes].count("output") != 1 or step.output.op != "output":
        yield "there must be one output, at the end", "", step.output.name
        return
    if step.stage is Stage.LOWERED:
        for node in step.graph.nodes:
            dead = not node.users and node.op not in ("output", "placeholder")
            if dead:
                yield "nothing uses the node", "", node.name


def _inputs_in_order(step: StepGraph) -> Iterator[Broken]:
    """The model's inputs, then the slots that the row reads in table order, then constants."""
    nodes = step.inputs
    kinds = [2 if CONSTANT in n.meta else 1 if SLOT in n.meta else 0 for n in nodes]
    if kinds != sorted(kinds) or kinds.count(0) != step.model_inputs:
        yield "inputs are out of order: model, slots, step constants", "", nodes[-1].name
    expected = [
        (site.name, value, age)
        for site, action in zip(step.sites, step.variant.row, strict=True)
        for value in range(len(site.values))
        for age in range(len(sources(action)))
    ]
    position = -1
    for node in nodes:
        if SLOT not in node.meta or step.stage is Stage.TRACED:
            continue
        slot = node.meta[SLOT]
        key = (slot.site, slot.value, slot.age)
        if key not in expected:
            yield "the row does not read this slot", slot.site, node.name
        elif (position := position) >= expected.index(key):
            yield "slots are out of order or read twice", slot.site, node.name
        else:
            position = expected.index(key)


def _outputs_in_order(step: StepGraph) -> Iterator[Broken]:
    """The model's outputs, then one write for each value that the variant hands out."""
    expected = [] if step.stage is Stage.TRACED else _expected_writes(step)
    count = len(step.outputs) - step.model_outputs
    if count != len(expected):
        yield f"{count} writes instead of {len(expected)}", "", step.output.name
        return
    for (site, value), node in zip(expected, step.outputs[step.model_outputs :], strict=True):
        spec = next(s for s in step.sites if s.name == site).values[value].spec
        if step.stage is Stage.CACHED and node.target is not ops.write:
            yield "a write is not a cache.write", site, node.name
        elif step.stage is Stage.CACHED and node.meta[SLOT].name != f"{site}#{value}":
            yield f"expected the write of {site}#{value}", site, node.name
        elif "val" in node.meta and TensorSpec.of(node.meta["val"]) != spec:
            yield f"the write is {spec_text(node.meta['val'])}, the slot {spec}", site, node.name


def _expected_writes(step: StepGraph) -> list[tuple[str, int]]:
    return [
        (site.name, value)
        for site, action, written in zip(
            step.sites, step.variant.row, step.variant.writes, strict=True
        )
        if written and makes_value(action)
        for value in range(len(site.values))
    ]


def _no_input_is_output(step: StepGraph) -> Iterator[Broken]:
    """TensorRT refuses a graph that returns an input."""
    for node in step.outputs:
        if node.op == "placeholder":
            yield "an input is returned as an output", "", node.name


def _shapes_recompute(step: StepGraph) -> Iterator[Broken]:
    """Every node has a recorded value, and its operation on its inputs' values gives the same."""
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            yield "no recorded shape", "", node.name
        elif node.op == "call_function" and (problem := _recompute(node)):
            yield problem, "", node.name


def _recompute(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return ""  # its body was checked where it was traced
    again = evaluate(node)
    same = spec_text(again) == spec_text(node.meta["val"]) and _device(again) == _device(
        node.meta["val"]
    )
    return "" if same else f"{spec_text(node.meta['val'])} recomputes to {spec_text(again)}"


def evaluate(node: fx.Node) -> Any:
    """Run a node's operation on the recorded values of its inputs: shapes only, no data."""
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = values
    target: Any = node.target
    inputs = node.graph.find_nodes(op="placeholder")
    mode = torch._guards.detect_fake_mode([n.meta["val"] for n in inputs if "val" in n.meta])
    with mode or nullcontext(), torch.no_grad():
        return target(*args, **kwargs)


def _device(value: Any) -> Any:
    return value.device if isinstance(value, Tensor) else None


def _functional(step: StepGraph) -> Iterator[Broken]:
    """Calls of functions only, none of which writes into its inputs."""
    for node in step.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield f"{node.op} {node.target} is not a function", "", node.name
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            yield f"{node.target} changes its inputs", "", node.name


def _cache_ops_in_stage(step: StepGraph) -> Iterator[Broken]:
    """Cache operations exist only between insertion and lowering, and name their slots."""
    for node in step.graph.nodes:
        if node.target not in ops.CACHE_OPS:
            continue
        if step.stage is not Stage.CACHED:
            yield f"cache operation in a graph that is {step.stage.name.lower()}", "", node.name
        elif node.target is ops.read and SLOT not in node.args[0].meta:
            yield "cache.read of something that is no slot", "", node.name


def _row_and_graph_agree(step: StepGraph) -> Iterator[Broken]:
    """A reused site's work is gone, a computed site's work is there."""
    if step.stage is not Stage.LOWERED:
        return
    alive = {node.name for node in step.graph.nodes}
    slots = {slot.site for slot in step.read_slots()}
    for site, action in zip(step.sites, step.variant.row, strict=True):
        match action:
            case Compute():
                missing = [v.node for v in site.values if v.node not in alive]
                if missing:
                    yield "the row computes the site, the graph does not", site.name, missing[0]
            case Reuse() | Forecast():
                left = [a for a in site.anchors if a in alive]
                if left:
                    yield "the row reuses the site, its work is left", site.name, left[0]
                if site.name not in slots:
                    yield "the row reuses the site, the graph reads no slot", site.name, "-"


def _no_large_inline_constants(step: StepGraph) -> Iterator[Broken]:
    """Tensors stand in the weight store, not in arguments."""
    for node in step.graph.nodes:
        for leaf in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, Tensor) and leaf.nbytes > _INLINE_CONSTANT_BYTES:
                yield f"an inline constant of {leaf.nbytes} bytes", "", node.name


def _text_is_reproducible(step: StepGraph) -> Iterator[Broken]:
    """Printing a copy gives the same text, so digests can be trusted."""
    copy = StepGraph(
        copy_module(step.module),
        step.variant,
        step.sites,
        step.stage,
        step.model_inputs,
        step.model_outputs,
    )
    if graph_text(step) != graph_text(copy):
        yield "the text of a copy differs", "", "-"


def _weights_rule(weights: Mapping[str, Tensor]) -> Callable[[StepGraph], Iterator[Broken]]:
    def weights_are_stored(step: StepGraph) -> Iterator[Broken]:
        """Every weight is in the store under its name with the same spec."""
        for node in step.graph.find_nodes(op="get_attr"):
            stored = weights.get(node.target)
            if stored is None:
                yield f"weight {node.target!r} is not in the store", "", node.name
            elif "val" in node.meta and TensorSpec.of(node.meta["val"]) != TensorSpec.of(stored):
                yield (
                    f"weight {node.target!r} is {TensorSpec.of(stored)} in the store",
                    "",
                    node.name,
                )

    return weights_are_stored


RULES: tuple[Callable[[StepGraph], Iterator[Broken]], ...] = (
    _well_formed,
    _inputs_in_order,
    _outputs_in_order,
    _no_input_is_output,
    _shapes_recompute,
    _functional,
    _cache_ops_in_stage,
    _row_and_graph_agree,
    _no_large_inline_constants,
    _text_is_reproducible,
)
