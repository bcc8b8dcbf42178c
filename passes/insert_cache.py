"""Put cache reads and writes at the sites, as the variant's row says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from cachegraph.graph import ops
from cachegraph.graph.step_graph import CONSTANT, ORIGIN, SLOT, Origin, Stage, StepGraph
from cachegraph.graph.token_choice import Chooser, Constants, needs_entropy
from cachegraph.model.site import Site
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse, sources
from cachegraph.plan.slot import (
    AGE,
    EXTRAS,
    INNER,
    ORDER,
    SCORE,
    ConstantKind,
    Slot,
    StepConstant,
)
from cachegraph.plan.variant import extra_spec, scorer

_ANY_COUNT = 3  # of tokens, while shapes are looked at


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

    Of a stack that is relative, what its blocks add to the stream is kept, and added to the stream
    in front of them. A refresh keeps what was kept but for the picked tokens; what later choices of
    tokens go by is handed out too. Left alone: sites that are computed and not kept, and the work
    that a read makes superfluous (``drop-dead`` removes it).
    """

    name: ClassVar[str] = "insert-cache"

    def apply(self, step: StepGraph) -> int:
        """Insert the cache operations; returns how many values were replaced or handed out."""
        insertion = _Insertion(step, self.name)
        rewrites = insertion.sites()
        step.stage = Stage.CACHED
        return rewrites


@dataclass
class _Insertion:
    """One run of the pass."""

    step: StepGraph
    maker: str
    constants: Constants = field(init=False)
    first: fx.Node = field(init=False)  # reads stand in front of it
    writes: dict[tuple[int, int], tuple[fx.Node, Slot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = {site.name: i for i, site in enumerate(self.step.sites)}
        self.by_name = {node.name: node for node in self.step.graph.nodes}
        self.constants = self._add_constants()
        self.first = next(
            n for n in self.step.graph.nodes if n.op not in ("placeholder", "get_attr")
        )
        self.chooser = (
            Chooser(self.step, self.step.selection, self.constants, self.maker)
            if self.step.selection is not None
            else None
        )

    def sites(self) -> int:
        """Rewrite every site; returns how many rewrites."""
        step = self.step
        order = self.places
        values = sorted(step.value_nodes(), key=lambda v: (order[v[0].name], v[1]))
        rewrites = 0
        for site, index, value in values:
            at = order[site.name]
            action = step.variant.row[at]
            kept = value
            if isinstance(action, Compute):
                self._compute_entropy(site, value)
            elif isinstance(action, Refresh):
                kept = self._refresh(site, at, action, value)
            else:
                kept = self._reuse(site, index, action, value)
            rewrites += not isinstance(action, Compute)
            if step.variant.writes[at]:
                if site.relative and isinstance(action, Compute):
                    kept = self._distance(site, index, value)
                slot = Slot(site.name, index, 0, site.values[index].spec)
                self.writes[at, index] = kept, slot
        if self.chooser is not None:
            with step.graph.inserting_before(step.output):
                for site, part, node in self.chooser.extras():
                    self._hand_out(site, part, node)
        self._add_writes()
        return rewrites + len(self.writes)

    def _reuse(self, site: Site, index: int, action: Action, value: fx.Node) -> fx.Node:
        spec, example = site.values[index].spec, value.meta["val"]
        slots = [
            self._slot(Slot(site.name, index, age, spec), example)
            for age in range(len(sources(action)))
        ]
        with self.step.graph.inserting_before(self.first):
            reads = [self._read(slot) for slot in slots]
            result = reads[0]
            if isinstance(action, Forecast):
                weights = self.constants[ConstantKind.COEFFICIENTS, site.name]
                name = f"forecast_{_identifier(f'{site.name}_{index}')}"
                result = self._call(site, ops.forecast, (reads, weights), name)
        stands = result
        if site.relative:
            with self.step.graph.inserting_before(value):
                name = f"after_{_identifier(f'{site.name}_{index}')}"
                stream = self.by_name[site.source]
                stands = self._call(site, torch.ops.aten.add.Tensor, (stream, result), name)
        value.replace_all_uses_with(stands, propagate_meta=False)
        self.by_name[value.name] = stands  # for a site that starts there
        return result

    def _distance(self, site: Site, index: int, value: fx.Node) -> fx.Node:
        """What the site adds to its source."""
        with self.step.graph.inserting_after(value):
            args = value, self.by_name[site.source]
            name = f"added_{_identifier(f'{site.name}_{index}')}"
            return self._call(site, torch.ops.aten.sub.Tensor, args, name)

    def _refresh(self, site: Site, at: int, action: Refresh, value: fx.Node) -> fx.Node:
        """The kept value with the picked tokens recomputed."""
        chooser = self.chooser
        if chooser is None:
            raise ValueError("a refresh without a selection")
        graph, label = self.step.graph, _identifier(site.name)
        kept_slot = self._slot(Slot(site.name, 0, 0, site.values[0].spec), value.meta["val"])
        with graph.inserting_before(self.first):
            old = self._read(kept_slot)
        if site.inner is not None:  # attention stays what it was when the site was computed
            attention = self._read_extra(site, INNER, value)
            inner = self.by_name[site.inner.node]
            inner.replace_all_uses_with(attention, propagate_meta=False)
        if chooser.selection.foreseen:
            order = self._read_extra(site, ORDER, value)
            with graph.inserting_before(self.first):
                picked = chooser.foreseen(site, order)
        else:
            picked = self._pick_now(site, at, old, value)
        with graph.inserting_after(value):
            fresh = self._call(site, ops.gather_tokens, (value, picked), f"gather_{label}")
        with graph.inserting_after(fresh):
            result = self._call(site, ops.scatter_tokens, (old, picked, fresh), f"scatter_{label}")
        value.replace_all_uses_with(result, lambda user: user is not fresh, propagate_meta=False)
        return result

    def _pick_now(self, site: Site, at: int, old: fx.Node, value: fx.Node) -> fx.Node:
        """Tokens chosen in this very step, right behind the stream that the site reads."""
        chooser, graph = self.chooser, self.step.graph
        if chooser is None:
            raise ValueError("a refresh without a selection")
        stream = self.by_name[site.source]
        age = self._read_extra(site, AGE, value)
        entropy = self._entropy_before(site, at, value)
        behind = stream if stream.op != "placeholder" else self.first
        behind = max(behind, entropy or behind)
        with _after(graph, behind):
            score = chooser.score(site, stream, old, age, entropy)
            picked = chooser.chosen_now(site, age, score)
            if AGE in self.step.variant.extras[at]:
                self._hand_out(site, AGE, chooser.older(site, age, picked))
        self._refresh_entropy(site, at, picked, entropy, value)
        return picked

    def _entropy_before(self, site: Site, at: int, value: fx.Node) -> fx.Node | None:
        """Entropies of the scoring attention's rows, as they stand when the site chooses."""
        chooser = self.chooser
        owner = scorer(self.step.sites, at, chooser.selection) if chooser is not None else None
        if chooser is None or owner is None:
            return None
        scoring = self.step.sites[owner]
        if owner != at and not isinstance(self.step.variant.row[owner], Reuse):
            return chooser.entropies[scoring.name]
        return self._read_extra(scoring, SCORE, value)

    def _refresh_entropy(
        self, site: Site, at: int, picked: fx.Node, entropy: fx.Node | None, value: fx.Node
    ) -> None:
        chooser, graph = self.chooser, self.step.graph
        if chooser is None or entropy is None or not needs_entropy(self.step, site):
            return
        label = _identifier(site.name)
        with graph.inserting_before(value):
            rows = chooser.entropy_of(site)
            fresh = self._call(site, ops.gather_tokens, (rows, picked), f"gather_rows_{label}")
            updated = self._call(
                site, ops.scatter_tokens, (entropy, picked, fresh), f"scatter_rows_{label}"
            )
        chooser.entropies[site.name] = updated
        if SCORE in self.step.variant.extras[at]:
            self._hand_out(site, SCORE, updated)

    def _compute_entropy(self, site: Site, value: fx.Node) -> None:
        if self.chooser is not None and needs_entropy(self.step, site):
            with self.step.graph.inserting_before(value):
                self.chooser.entropies[site.name] = self.chooser.entropy_of(site)

    def _read_extra(self, site: Site, part: int, value: fx.Node) -> fx.Node:
        example = value.meta["val"]
        spec = extra_spec(site, part, self.step.order_depth)
        with example.fake_mode:
            shape = [example.shape[0], *spec.shape[1:]]
            fake = torch.empty(shape, dtype=spec.dtype, device=example.device)
        known = [n for n in self.step.inputs if n.meta.get(SLOT) == Slot(site.name, part, 0, spec)]
        slot = known[0] if known else self._slot(Slot(site.name, part, 0, spec), fake)
        with self.step.graph.inserting_before(self.first):
            return self._read(slot)

    def _read(self, slot: fx.Node) -> fx.Node:
        kept: Slot = slot.meta[SLOT]
        node = self.step.graph.create_node(
            "call_function", ops.read, (slot,), name=f"read_{kept.label}"
        )
        node.meta[ORIGIN] = Origin(self.maker, kept.site)
        return node

    def _call(self, site: Site, function: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        node = self.step.graph.create_node("call_function", function, args, name=name)
        node.meta[ORIGIN] = Origin(self.maker, site.name)
        return node

    def _hand_out(self, site: Site, part: int, node: fx.Node) -> None:
        spec = extra_spec(site, part, self.step.order_depth)
        # Behind the values, in the order of EXTRAS.
        key = (len(self.step.sites) + self.step.sites.index(site), list(EXTRAS).index(part))
        self.writes[key] = node, Slot(site.name, part, 0, spec)

    def _add_writes(self) -> None:
        for _, (value, slot) in sorted(self.writes.items(), key=lambda w: w[0]):
            with self.step.graph.inserting_after(value):
                node = self.step.graph.create_node(
                    "call_function",
                    ops.write,
                    (value,),
                    {"slot": slot.name},
                    name=f"write_{slot.label}",
                )
            node.meta = {SLOT: slot, ORIGIN: Origin(self.maker, slot.site)}
            self.step.output.args = ((*self.step.outputs, node),)

    def _slot(self, slot: Slot, example: torch.Tensor) -> fx.Node:
        """An input for a slot, at its place in the table's order."""
        place = self._place(slot)
        before = [n for n in self.step.inputs if CONSTANT not in n.meta]
        before = [n for n in before if SLOT not in n.meta or self._place(n.meta[SLOT]) < place]
        name = f"slot_{slot.label}"
        node = self._input(name, before[-1])
        node.meta = {SLOT: slot, "val": example, ORIGIN: Origin(self.maker, slot.site)}
        return node

    def _place(self, slot: Slot) -> tuple[int, int, int, int]:
        site = self.places[slot.site]
        extra = list(EXTRAS).index(slot.value) + 1 if slot.value in EXTRAS else 0
        return site, extra, slot.value, slot.age

    def _add_constants(self) -> Constants:
        """An input for each step constant."""
        found: dict[tuple[ConstantKind, str], fx.Node] = {}
        example = self.step.inputs[0].meta["val"]
        for constant in self.step.variant.constants:
            node = self._input(constant.name, self.step.inputs[-1])
            value = self._constant_example(constant, example)
            node.meta = {CONSTANT: constant, "val": value, ORIGIN: Origin(self.maker)}
            found.update({(constant.kind, site): node for site in constant.sites})
        return found

    def _constant_example(self, constant: StepConstant, like: Any) -> torch.Tensor:
        """A value of the constant's shape; symbols of token counts are shared by all variants."""
        if constant.kind is not ConstantKind.TOKENS:
            return _step_constant_like(constant, like)
        inputs = self.step.shapes.inputs
        if constant.name not in inputs:
            inputs[constant.name] = _step_constant_like(constant, like)
        return inputs[constant.name]

    def _input(self, name: str, behind: fx.Node) -> fx.Node:
        with self.step.graph.inserting_after(behind):
            node = self.step.graph.create_node("placeholder", name, name=name)
        node.target = node.name
        return node


def _step_constant_like(constant: StepConstant, like: Any) -> torch.Tensor:
    floating = constant.kind is ConstantKind.COEFFICIENTS
    dtype = torch.float32 if floating else torch.int64
    if constant.kind is ConstantKind.TOKENS:
        # Whatever the first step's count is: torch would make a constant of 1.
        example, varies = torch.arange(_ANY_COUNT), DimDynamic.DYNAMIC
    else:
        example = torch.tensor(next(iter(constant.values.values())), dtype=dtype)
        varies = DimDynamic.STATIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=[varies] * example.ndim)
    fake = like.fake_mode.from_tensor(example, symbolic_context=context)
    with like.fake_mode:
        return fake.to(like.device)


def _after(graph: fx.Graph, node: fx.Node) -> Any:
    """Insert behind a node, several nodes in the order they are made."""
    return graph.inserting_before(node.next)


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name)
