"""Put cache reads and writes at the sites, as the variant's row says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachegraph import ops
from cachegraph.action import Compute, Forecast, Reuse, sources
from cachegraph.graph import CONSTANT, ORIGIN, SLOT, Origin, Stage, StepGraph
from cachegraph.slot import Slot, StepConstant


@dataclass(frozen=True)
class InsertCache:
    """Replace the values of reused sites by what was kept, and hand out values to be kept.

    Before, with the row ``blocks.0.attn: reuse  blocks.0.mlp: compute write``::

        %linear_3 = aten.linear(%view_4, @attn.proj.weight)
        %add_1 = aten.add.Tensor(%x, %linear_3)
        %linear_5 = aten.linear(%gelu_0, @mlp.fc2.weight)
        return %add_2

    After::

        %slot_blocks_0_attn_0 = slot "blocks.0.attn#0"
        %read_blocks_0_attn_0 = cache.read(%slot_blocks_0_attn_0)
        %linear_3 = aten.linear(%view_4, @attn.proj.weight)
        %add_1 = aten.add.Tensor(%x, %read_blocks_0_attn_0)
        %linear_5 = aten.linear(%gelu_0, @mlp.fc2.weight)
        %write_blocks_0_mlp_0 = cache.write(%linear_5, slot="blocks.0.mlp#0")
        return %add_2, %write_blocks_0_mlp_0

    Left alone: sites that are computed and not kept, and the work that a read makes superfluous
    (``drop-dead`` removes it).
    """

    name: ClassVar[str] = "insert-cache"

    def apply(self, step: StepGraph) -> int:
        """Insert the cache operations; returns how many reads, forecasts and writes."""
        row = dict(zip((s.name for s in step.sites), step.variant.row, strict=True))
        written = dict(zip((s.name for s in step.sites), step.variant.writes, strict=True))
        constants = _add_constants(step)
        first = next(n for n in step.graph.nodes if n.op not in ("placeholder", "get_attr"))
        rewrites = 0
        order = {site.name: i for i, site in enumerate(step.sites)}
        values = sorted(step.value_nodes(), key=lambda v: (order[v[0].name], v[1]))
        for site, index, value in values:
            action = row[site.name]
            kept = value
            if not isinstance(action, Compute):
                slots = _add_slots(step, site.name, index, len(sources(action)), value)
                with step.graph.inserting_before(first):
                    kept = _replacement(step, action, slots, constants, site.name, index)
                value.replace_all_uses_with(kept, propagate_meta=False)
                rewrites += 1
            if written[site.name]:
                _add_write(step, kept, Slot(site.name, index, 0, site.values[index].spec))
                rewrites += 1
        step.stage = Stage.CACHED
        return rewrites


def _replacement(
    step: StepGraph,
    action: Reuse | Forecast,
    slots: list[fx.Node],
    constants: dict[str, fx.Node],
    site: str,
    index: int,
) -> fx.Node:
    origin = Origin(InsertCache.name, site)
    label = _identifier(f"{site}_{index}")
    reads = []
    for slot in slots:
        name = f"read_{label}" + (f"_{slot.meta[SLOT].age}" if slot.meta[SLOT].age else "")
        reads.append(step.graph.create_node("call_function", ops.read, (slot,), name=name))
    result = reads[0]
    if isinstance(action, Forecast):
        arguments = (reads, constants[site])
        result = step.graph.create_node(
            "call_function", ops.forecast, arguments, name=f"forecast_{label}"
        )
    for node in {*reads, result}:
        node.meta[ORIGIN] = origin
    return result


def _add_slots(step: StepGraph, site: str, index: int, count: int, value: fx.Node) -> list[fx.Node]:
    slots = []
    spec = next(s for s in step.sites if s.name == site).values[index].spec
    for age in range(count):
        slot = Slot(site, index, age, spec)
        node = _add_input(step, f"slot_{_identifier(slot.name)}", before_constants=True)
        node.meta = {SLOT: slot, "val": value.meta["val"], ORIGIN: Origin(InsertCache.name, site)}
        slots.append(node)
    return slots


def _add_constants(step: StepGraph) -> dict[str, fx.Node]:
    """An input for each step constant; returns site -> input."""
    by_site: dict[str, fx.Node] = {}
    example = step.inputs[0].meta["val"]
    for constant in step.variant.constants:
        node = _add_input(step, constant.name, before_constants=False)
        length = len(next(iter(constant.values.values())))
        with example.fake_mode:
            value = torch.empty(length, dtype=torch.float32, device=example.device)
        node.meta = {CONSTANT: constant, "val": value, ORIGIN: Origin(InsertCache.name)}
        by_site.update(dict.fromkeys(constant.sites, node))
    return by_site


def _add_input(step: StepGraph, name: str, *, before_constants: bool) -> fx.Node:
    nodes = list(_inputs(step, before_constants))
    with step.graph.inserting_after(nodes[-1]):
        node = step.graph.create_node("placeholder", name, name=name)
    node.target = node.name
    return node


def _inputs(step: StepGraph, before_constants: bool) -> Iterator[fx.Node]:
    for node in step.inputs:
        if not (before_constants and isinstance(node.meta.get(CONSTANT), StepConstant)):
            yield node


def _add_write(step: StepGraph, value: fx.Node, slot: Slot) -> None:
    with step.graph.inserting_after(value):
        node = step.graph.create_node(
            "call_function",
            ops.write,
            (value,),
            {"slot": slot.name},
            name=f"write_{_identifier(f'{slot.site}_{slot.value}')}",
        )
    node.meta = {SLOT: slot, ORIGIN: Origin(InsertCache.name, slot.site)}
    step.output.args = ((*step.outputs, node),)


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name)
