"""Graphs as text: the one form for ``inspect``, golden tests, digests and docstrings.

One line a node: name, operation, spec, and who made it where that was a pass. Weights stand in
place as ``@name``. Nothing in the text depends on memory addresses or on the version of torch.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from cachegraph.model.shapes import Shapes
from cachegraph.model.site import Site
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse
from cachegraph.plan.variant import Variant
from cachegraph.spec import short_dtype

from .ops import CACHE_OPS
from .step_graph import CONSTANT, KNOWN, ORIGIN, SLOT, StepGraph

_WIDTH = 72  # column at which specs begin
_END = 2**63 - 1  # what a slice to the end is exported as


def graph_text(step: StepGraph) -> str:
    """The text of a variant's graph.

    For example::

    variant1  steps 1 2  blocks.0.attn: reuse  blocks.0.mlp: compute
    %x = input                                              f32[s0, 16, 32]
    %slot_blocks_0_attn_0 = slot "blocks.0.attn#0"          f32[s0, 16, 32]
    %linear_0 = aten.linear(%x, @fc.weight, @fc.bias)       f32[s0, 16, 32]
    return %linear_0

    The graphs that run before the step, where there are any, follow in the same form.
    """
    shapes = step.shapes
    lines = [variant_line(step.variant, step.sites), *node_lines(step.graph, shapes)]
    if step.request is not None:
        lines += ["", "once a trajectory", *node_lines(step.request.graph, shapes)]
    if step.prologue is not None:
        lines += ["", "once a trajectory, for all steps"]
        lines += node_lines(step.prologue.graph, shapes)
    return "\n".join(lines) + "\n"


def node_lines(graph: fx.Graph, shapes: Shapes | None = None) -> Iterator[str]:
    """One line a node."""
    shapes = shapes or Shapes()
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            yield "return " + ", ".join(argument_text(a) for a in node.args[0])
            continue
        line = f"%{node.name} = {operation_text(node)}".ljust(_WIDTH)
        line = f"{line} {shapes.text(node.meta['val'])}" if "val" in node.meta else line
        if ORIGIN in node.meta:
            line += f"  # {node.meta[ORIGIN]}"
        yield line.rstrip()


def variant_line(variant: Variant, sites: Sequence[Site]) -> str:
    """``variant1  steps 1 2  blocks.0.attn: reuse  blocks.0.mlp: compute write``."""
    actions = [
        f"{site.name}: {action_word(action)}{' write' if writes else ''}"
        for site, action, writes in zip(sites, variant.row, variant.writes, strict=True)
    ]
    steps = " ".join(map(str, variant.steps))
    return "  ".join([f"{variant.name}  steps {steps}", *actions])


def action_word(action: Action) -> str:
    """``compute``, ``reuse``, ``forecast(2)`` or ``refresh`` (of how many is a step constant)."""
    match action:
        case Compute():
            return "compute"
        case Reuse():
            return "reuse"
        case Forecast():
            return f"forecast({len(action.sources)})"
        case Refresh():
            return "refresh"


def digest(text: str) -> str:
    """SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def difference(before: str, after: str, names: tuple[str, str]) -> str:
    """Unified difference of two graph texts; nodes keep their names over variants."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=1)
    return "\n".join(lines) + "\n"


def dot(step: StepGraph) -> str:
    """The graph in DOT for graphviz; slots, writes and nodes made by passes are coloured."""
    lines = [
        f'digraph "{step.variant.name}" {{',
        '  node [shape=box, fontname="monospace", fontsize=10];',
    ]
    for node in step.graph.nodes:
        if node.op == "get_attr":
            continue
        label = "return" if node.op == "output" else f"%{node.name} = {operation_text(node)}"
        escaped = label.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  "{node.name}" [label="{escaped}"{_colour(node)}];')
        lines += [
            f'  "{source.name}" -> "{node.name}";'
            for source in node.all_input_nodes
            if source.op != "get_attr"
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _colour(node: fx.Node) -> str:
    if SLOT in node.meta:
        return ", style=filled, fillcolor=lightblue"
    if ORIGIN in node.meta:
        return ", style=filled, fillcolor=lightyellow"
    return ""


def operation_text(node: fx.Node) -> str:
    """``aten.linear(%x, @fc.weight, @fc.bias)``; of an input, what it is."""
    if node.op == "placeholder":
        if SLOT in node.meta:
            return f'slot "{node.meta[SLOT].name}"'
        if CONSTANT in node.meta:
            return f'step constant "{node.meta[CONSTANT].name}"'
        if KNOWN in node.meta:
            known = node.meta[KNOWN]
            return f'known "{known.name}" per {known.binding.name.lower()}'
        return "input"
    arguments = [argument_text(a) for a in node.args]
    keywords = node.kwargs.items()
    arguments += [f"{key}={argument_text(value)}" for key, value in keywords if key != "pin_memory"]
    return f"{operation_name(node)}({', '.join(arguments)})"


def operation_name(node: fx.Node) -> str:
    """``aten.linear``; the overload stands only where it is not the default one."""
    target: Any = node.target
    if target in CACHE_OPS:
        return f"cache.{target.__name__}"
    if hasattr(target, "_schema"):  # an operator overload
        return str(target).removesuffix(".default")
    return f"{getattr(target, '__module__', '')}.{target.__name__}".removeprefix("_")


def argument_text(value: Any) -> str:
    """An argument: ``%x``, ``@fc.weight``, ``[1, 2]``."""
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(argument_text(v) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    if isinstance(value, str):
        return f'"{value}"'
    return "end" if value == _END and isinstance(value, int) else str(value)
