"""The graph of one variant while passes rewrite it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from torch import fx

from cachegraph.model.shapes import Shapes
from cachegraph.model.site import Site
from cachegraph.plan.selection import Selection
from cachegraph.plan.slot import Slot
from cachegraph.plan.variant import Variant, extra_spec

from .binding import Binding, Known, binding_times

# Keys in ``node.meta``.
SLOT = "cachegraph_slot"  # Slot of a placeholder or of a write
CONSTANT = "cachegraph_constant"  # StepConstant of a placeholder
KNOWN = "cachegraph_known"  # Known of a placeholder
ORIGIN = "cachegraph_origin"  # Origin of a node that a pass made


class Stage(IntEnum):
    """How far a graph is: what the verifier allows in it."""

    TRACED = 0  # as exported
    CACHED = 1  # holds cache operations
    LOWERED = 2  # slots are plain inputs and outputs


@dataclass(frozen=True)
class Origin:
    """Who made a node, and for which site."""

    pass_name: str
    site: str = ""

    def __str__(self) -> str:
        """``insert-cache, blocks.0.attn``."""
        return f"{self.pass_name}, {self.site}" if self.site else self.pass_name


@dataclass
class StepGraph:
    """One variant's graph.

    Attributes:
        module: the graph and, shared with every other variant, the weights that it uses.
        variant: the steps it serves and what they do.
        sites: every site of the model.
        stage: how far it is.
        selection: how tokens are chosen, where some are refreshed.
        order_depth: J of an order of tokens.
        bindings: when each of the model's inputs is known; slots, step constants and known values
            follow them.
        model_outputs: how many outputs are the model's; writes follow.
        request: computes the known values that are the same at every step, from the model's inputs.
        prologue: computes those of one step.
        shapes: what is known of shapes, shared by all variants.
    """

    module: fx.GraphModule
    variant: Variant
    sites: tuple[Site, ...]
    stage: Stage
    bindings: tuple[Binding, ...]
    model_outputs: int
    selection: Selection | None = None
    order_depth: int = 0
    request: fx.GraphModule | None = None
    prologue: fx.GraphModule | None = None
    shapes: Shapes = field(default_factory=Shapes)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph itself."""
        return self.module.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """Every input: the model's, slots that are read, step constants, known values."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def output(self) -> fx.Node:
        """The output node; its only argument is the tuple of all outputs."""
        return self.graph.output_node()

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The model's outputs, then the writes."""
        returned: Any = self.output.args[0]
        return tuple(returned)

    def value_nodes(self) -> Iterator[tuple[Site, int, fx.Node]]:
        """(site, value index, node) for every site value that the graph computes."""
        found = {v.node: (site, i) for site in self.sites for i, v in enumerate(site.values)}
        for node in self.graph.nodes:
            if node.name in found:
                yield *found[node.name], node

    @property
    def model_inputs(self) -> int:
        """How many inputs are the model's."""
        return len(self.bindings)

    def binding_times(self) -> dict[fx.Node, Binding]:
        """When the value of each node is known; what follows the model's inputs is dynamic."""
        given = zip(self.inputs, self.bindings, strict=False)
        return binding_times(self.graph, {node.name: binding for node, binding in given})

    @property
    def known(self) -> list[Known]:
        """The known values that are inputs, in order."""
        return [node.meta[KNOWN] for node in self.inputs if KNOWN in node.meta]

    def read_slots(self) -> list[Slot]:
        """The slots that are inputs, in order."""
        return [node.meta[SLOT] for node in self.inputs if SLOT in node.meta]

    def written_slots(self) -> list[Slot]:
        """What the variant hands out, in the order of the writes: values, then all else."""
        values = [
            Slot(site.name, i, 0, value.spec)
            for site, written in zip(self.sites, self.variant.writes, strict=True)
            if written
            for i, value in enumerate(site.values)
        ]
        extras = [
            Slot(site.name, part, 0, extra_spec(site, part, self.order_depth))
            for site, parts in zip(self.sites, self.variant.extras, strict=True)
            for part in parts
        ]
        return values + extras


def request_values(graphs: Sequence[StepGraph]) -> list[Known]:
    """The values known per request that any variant uses, in the order of the request's graph."""
    found = {
        known.name: known
        for graph in graphs
        for known in graph.known
        if known.binding is Binding.REQUEST
    }
    return list(found.values())


def merge_prologues(modules: Sequence[fx.GraphModule]) -> fx.GraphModule | None:
    """One graph that computes what several do, each value once; None where there are none.

    Args:
        modules: over the same inputs; nodes of one name do the same in all of them.
    """
    if not modules:
        return None
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    outputs: dict[str, fx.Node] = {}
    for module in modules:
        for node in module.graph.nodes:
            if node.op == "output":
                outputs.update((n.args[0].name, made[n.name]) for n in node.args[0])
            elif node.name not in made:
                made[node.name] = graph.node_copy(node, lambda n: made[n.name])
    graph.output(tuple(outputs.values()))
    weights: dict[str, Any] = {}
    for module in modules:
        for node in module.graph.find_nodes(op="get_attr"):
            path, _, leaf = str(node.target).rpartition(".")
            weights[str(node.target)] = getattr(module.get_submodule(path), leaf)
    return fx.GraphModule(weights, graph)


class Pass(Protocol):
    """A rewrite of one step graph; a frozen dataclass whose fields are its options.

    ``apply`` edits the graph and returns how many rewrites it made; 0 means unchanged. Cleaning
    up, shapes, verification and provenance are the pipeline's work.
    """

    name: ClassVar[str]

    def apply(self, step: StepGraph) -> int:
        """Rewrite the graph in place."""
        ...


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own and the same weight tensors; node names are kept."""
    return fx.GraphModule(module, copy_graph(module.graph))


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the same names."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        copied[node] = graph.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, copied.__getitem__),
            fx.node.map_arg(node.kwargs, copied.__getitem__),
            name=node.name,
        )
        copied[node].meta = dict(node.meta)
    return graph
