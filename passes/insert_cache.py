"""Put cache reads and writes at the sites, as the variant's row says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from cachegraph import ops
from cachegraph.action import Action, Compute, Forecast, Refresh, makes_value, sources
from cachegraph.graph import CONSTANT, ORIGIN, SLOT, Origin, Stage, StepGraph
from cachegraph.plan import order_spec
from cachegraph.selection import Score, Selection
from cachegraph.site import Site, SiteKind
from cachegraph.slot import ORDER, ConstantKind, Slot, StepConstant

Constants = Mapping[tuple[ConstantKind, str], fx.Node]  # (kind, site) -> input


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

    A refresh keeps what was kept but for the picked tokens; a computed site whose tokens are picked
    later hands out the order in which they will be. Left alone: sites that are computed and not
    kept, and the work that a read makes superfluous (``drop-dead`` removes it).
    """

    name: ClassVar[str] = "insert-cache"

    def apply(self, step: StepGraph) -> int:
        """Insert the cache operations; returns how many values were replaced or handed out."""
        row = dict(zip((s.name for s in step.sites), step.variant.row, strict=True))
        written = dict(zip((s.name for s in step.sites), step.variant.writes, strict=True))
        constants = _add_constants(step)
        first = next(n for n in step.graph.nodes if n.op not in ("placeholder", "get_attr"))
        order = {site.name: i for i, site in enumerate(step.sites)}
        values = sorted(step.value_nodes(), key=lambda v: (order[v[0].name], v[1]))
        rewrites = 0
        for site, index, value in values:
            action = row[site.name]
            kept = value
            if not isinstance(action, Compute):
                slots = _add_slots(step, site, index, action, value)
                kept = _replacement(step, action, slots, constants, first, value)
                rewrites += 1
            if written[site.name] and makes_value(action):
                _add_write(step, kept, Slot(site.name, index, 0, site.values[index].spec))
                rewrites += 1
        rewrites += _add_orders(step, constants)
        step.stage = Stage.CACHED
        return rewrites


def _replacement(
    step: StepGraph,
    action: Action,
    slots: Sequence[fx.Node],
    constants: Constants,
    first: fx.Node,
    value: fx.Node,
) -> fx.Node:
    """What stands for a site's value from now on."""
    graph, slot = step.graph, slots[0].meta[SLOT]
    label = _identifier(f"{slot.site}_{slot.value}")

    def call(function: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        node = graph.create_node("call_function", function, args, name=f"{name}_{label}")
        node.meta[ORIGIN] = Origin(InsertCache.name, slot.site)
        return node

    with graph.inserting_before(first):
        reads = [call(ops.read, (node,), _read_name(node.meta[SLOT])) for node in slots]
        result = reads[0]
        if isinstance(action, Forecast):
            weights = constants[ConstantKind.COEFFICIENTS, slot.site]
            result = call(ops.forecast, (reads, weights), "forecast")
    if isinstance(action, Refresh):
        with graph.inserting_before(first):
            age = constants[ConstantKind.AGE, slot.site]
            tokens = constants[ConstantKind.TOKENS, slot.site]
            picked = call(ops.pick_tokens, (reads[1], age, tokens), "picked")
        with graph.inserting_after(value):
            fresh = call(ops.gather_tokens, (value, picked), "gather")
        with graph.inserting_after(fresh):
            result = call(ops.scatter_tokens, (reads[0], picked, fresh), "scatter")
        value.replace_all_uses_with(result, lambda user: user is not fresh, propagate_meta=False)
        return result
    value.replace_all_uses_with(result, propagate_meta=False)
    return result


def _read_name(slot: Slot) -> str:
    if slot.value == ORDER:
        return "read_order"
    return f"read_{slot.age}" if slot.age else "read"


def _add_slots(
    step: StepGraph, site: Site, index: int, action: Action, value: fx.Node
) -> list[fx.Node]:
    spec = site.values[index].spec
    wanted = [(Slot(site.name, index, age, spec), value) for age in range(len(sources(action)))]
    slots = [_add_slot(step, slot, like.meta["val"]) for slot, like in wanted]
    if isinstance(action, Refresh):
        example = value.meta["val"]
        depth = step.order_depth
        with example.fake_mode:
            order = torch.empty(
                (example.shape[0], depth, example.shape[1]),
                dtype=torch.int64,
                device=example.device,
            )
        slots.append(_add_slot(step, _order_slot(site, depth), order))
    return slots


def _order_slot(site: Site, depth: int) -> Slot:
    return Slot(site.name, ORDER, 0, order_spec(site, depth))


def _add_slot(step: StepGraph, slot: Slot, example: torch.Tensor) -> fx.Node:
    node = _add_input(step, f"slot_{_identifier(slot.name)}", before_constants=True)
    node.meta = {SLOT: slot, "val": example, ORIGIN: Origin(InsertCache.name, slot.site)}
    return node


def _add_constants(step: StepGraph) -> Constants:
    """An input for each step constant."""
    found: dict[tuple[ConstantKind, str], fx.Node] = {}
    example = step.inputs[0].meta["val"]
    for constant in step.variant.constants:
        node = _add_input(step, constant.name, before_constants=False)
        value = _constant_example(constant, example)
        node.meta = {CONSTANT: constant, "val": value, ORIGIN: Origin(InsertCache.name)}
        found.update({(constant.kind, site): node for site in constant.sites})
    return found


def _constant_example(constant: StepConstant, like: Any) -> torch.Tensor:
    floating = constant.kind is ConstantKind.COEFFICIENTS
    dtype = torch.float32 if floating else torch.int64
    example = torch.tensor(next(iter(constant.values.values())), dtype=dtype)
    varies = DimDynamic.DYNAMIC if constant.kind is ConstantKind.TOKENS else DimDynamic.STATIC
    context = StatelessSymbolicContext(dynamic_sizes=[varies] * example.ndim)
    fake = like.fake_mode.from_tensor(example, symbolic_context=context)
    with like.fake_mode:
        return fake.to(like.device)


def _add_input(step: StepGraph, name: str, *, before_constants: bool) -> fx.Node:
    nodes = [n for n in step.inputs if not (before_constants and CONSTANT in n.meta)]
    with step.graph.inserting_after(nodes[-1]):
        node = step.graph.create_node("placeholder", name, name=name)
    node.target = node.name
    return node


def _add_write(step: StepGraph, value: fx.Node, slot: Slot) -> None:
    with step.graph.inserting_after(value):
        node = step.graph.create_node(
            "call_function",
            ops.write,
            (value,),
            {"slot": slot.name},
            name=f"write_{_identifier(slot.name)}",
        )
    node.meta = {SLOT: slot, ORIGIN: Origin(InsertCache.name, slot.site)}
    step.output.args = ((*step.outputs, node),)


def _add_orders(step: StepGraph, constants: Constants) -> int:
    """Orders of tokens for the partial steps that follow, batched over all sites."""
    sites = [s for s, wanted in zip(step.sites, step.variant.orders, strict=True) if wanted]
    selection = step.selection
    if not sites or selection is None:
        return 0
    counts = constants[ConstantKind.COUNTS, sites[0].name]
    with step.graph.inserting_before(step.output):
        scores = [_score(step, site, selection) for site in sites]
        settings = (selection.age_weight, selection.bonus, selection.cell, list(selection.grid))
        orders = step.graph.create_node(
            "call_function", ops.order_tokens, (scores, counts, *settings), name="order_tokens"
        )
        orders.meta[ORIGIN] = Origin(InsertCache.name)
        for i, site in enumerate(sites):
            one = step.graph.call_function(torch.ops.aten.select.int, (orders, 0, i))
            one.meta[ORIGIN] = Origin(InsertCache.name, site.name)
            _add_write(step, one, _order_slot(site, step.order_depth))
    return len(sites)


def _score(step: StepGraph, site: Site, selection: Selection) -> fx.Node:
    """Scores of a site's tokens, from the attention of its block."""
    block = site.name.rpartition(".")[0]
    attention = next(
        s for s in step.sites if s.kind is SiteKind.ATTN and s.name.rpartition(".")[0] == block
    )
    core = next(n for n in step.graph.nodes if n.name == attention.cores[0])
    query, key, value = core.args[:3]
    if selection.score is Score.ATTENTION:
        scale = core.kwargs.get("scale")
        node = step.graph.call_function(ops.attention_received, (query, key, scale))
    else:
        node = step.graph.call_function(ops.value_smallness, (value,))
    node.meta[ORIGIN] = Origin(InsertCache.name, site.name)
    return node


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name)
