"""Run the passes over the graph of each variant; verify after every one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from cachegraph.errors import VerifyError
from cachegraph.graph.binding import Binding, model_bindings
from cachegraph.graph.provenance import modules_in
from cachegraph.graph.step_graph import ORIGIN, Origin, Pass, Stage, StepGraph, copy_module
from cachegraph.graph.text import graph_text
from cachegraph.graph.verify.rules import Given, verify
from cachegraph.model.shapes import Shapes
from cachegraph.model.trace import TracedModel
from cachegraph.passes import PIPELINE
from cachegraph.plan.plan import Plan
from cachegraph.plan.variant import Variant
from cachegraph.runtime.tracking import timestep_input


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one variant.

    Attributes:
        variant: name of the variant.
        pass_name: name of the pass.
        rewrites: how many it made.
        nodes: nodes before and after.
        seconds: of the pass and its verification.
        removed: modules that had operations in the graph before it and none after.
    """

    variant: str
    pass_name: str
    rewrites: int
    nodes: tuple[int, int]
    seconds: float
    removed: tuple[str, ...]


def rewrite(
    traced: TracedModel,
    plan: Plan,
    *,
    passes: Sequence[Pass] = PIPELINE,
    varying: Sequence[str] = (),
    weights: Mapping[str, Tensor] | None = None,
    on_pass: Callable[[StepGraph, PassReport], None] | None = None,
) -> tuple[StepGraph, ...]:
    """The lowered graph of every variant, in the plan's order; weights are shared, never copied.

    Args:
        traced: the model.
        plan: what the steps do.
        passes: in order.
        varying: inputs that differ from step to step, beside the first one and the timestep.
        weights: name -> tensor of the weight store; the traced module's by default.
        on_pass: called after each pass, for progress and for looking at stages.

    Raises:
        InputError: ``varying`` names an input that the model does not have.
        VerifyError: a pass broke a rule.
    """
    stored = weights if weights is not None else module_weights(traced)
    given, shapes = Given(traced.module.graph, stored), Shapes()
    names = [name for name, _ in traced.signature.inputs]
    clock = timestep_input(traced.signature)
    bindings = model_bindings(names, None if clock is None else names[clock], varying)
    return tuple(
        _rewrite_one(traced, plan, variant, passes, bindings, given, shapes, on_pass)
        for variant in plan.variants
    )


def module_weights(traced: TracedModel) -> dict[str, Tensor]:
    """Every tensor that the traced graph uses by name."""
    names = {str(n.target) for n in traced.module.graph.find_nodes(op="get_attr")}
    found = {}
    for name in sorted(names):
        holder, _, leaf = name.rpartition(".")
        value = getattr(traced.module.get_submodule(holder), leaf)
        if isinstance(value, Tensor):
            found[name] = value
    return found


def _rewrite_one(
    traced: TracedModel,
    plan: Plan,
    variant: Variant,
    passes: Sequence[Pass],
    bindings: tuple[Binding, ...],
    given: Given,
    shapes: Shapes,
    on_pass: Callable[[StepGraph, PassReport], None] | None,
) -> StepGraph:
    step = StepGraph(
        copy_module(traced.module),
        variant,
        plan.sites,
        Stage.TRACED,
        bindings=bindings,
        model_outputs=len(traced.signature.outputs),
        selection=plan.selection,
        order_depth=plan.order_depth,
        shapes=shapes,
    )
    _verified(step, given, "trace", last=not passes)
    modules = modules_in(step.graph)
    for i, one in enumerate(passes):
        started = time.perf_counter()
        nodes, before = len(step.graph.nodes), given.text
        rewrites = one.apply(step)
        _finish(step, one.name)
        _verified(step, given, one.name, last=i == len(passes) - 1)
        # Weights that nothing uses are no part of the text.
        changed = nodes != len(step.graph.nodes) or given.text != before
        if changed != bool(rewrites):
            raise VerifyError(
                f"the pass says that it made {rewrites} rewrites, "
                f"but the graph {'differs' if changed else 'is unchanged'}",
                place=f"pass {one.name}, {variant.name}",
            )
        if on_pass is not None:
            seconds, left = time.perf_counter() - started, modules_in(step.graph)
            counts, gone = (nodes, len(step.graph.nodes)), tuple(sorted(modules - left))
            on_pass(step, PassReport(variant.name, one.name, rewrites, counts, seconds, gone))
            modules = left
    step.module.delete_all_unused_submodules()
    step.module.recompile()
    return step


def _verified(step: StepGraph, given: Given, pass_name: str, *, last: bool) -> None:
    """Verify a graph; its text is there then."""
    given.last, given.text = last, ""
    verify(step, given, pass_name)
    given.text = given.text or graph_text(step)


def _finish(step: StepGraph, pass_name: str) -> None:
    """Record the shape and origin of new nodes; verifying says what has no shape, and why."""
    for node in step.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            node.meta.setdefault(ORIGIN, Origin(pass_name))
            with suppress(Exception):
                node.meta["val"] = step.shapes.evaluate(node)
