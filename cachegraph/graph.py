"""The graph of one variant while passes rewrite it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from torch import fx

from .selection import Selection
from .shapes import Shapes
from .site import Site
from .slot import Slot
from .variant import Variant

# Keys in ``node.meta``.
SLOT = "cachegraph_slot"  # Slot of a placeholder or of a write
CONSTANT = "cachegraph_constant"  # StepConstant of a placeholder
VALUE = "cachegraph_value"  # (site name, value index) on the node that makes a site's value
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
        model_inputs: how many inputs are the model's; slots and step constants follow.
        model_outputs: how many outputs are the model's; writes follow.
        shapes: what is known of shapes, shared by all variants.
    """

    module: fx.GraphModule
    variant: Variant
    sites: tuple[Site, ...]
    stage: Stage
    model_inputs: int
    model_outputs: int
    selection: Selection | None = None
    order_depth: int = 0
    shapes: Shapes = field(default_factory=Shapes)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph itself."""
        return self.module.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """Every input: the model's, then slots that are read, then step constants."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; its only argument is the tuple of all outputs."""
        return next(reversed(self.graph.nodes))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The model's outputs, then the writes."""
        returned: Any = self.output.args[0]
        return tuple(returned)

    def value_nodes(self) -> Iterator[tuple[Site, int, fx.Node]]:
        """(site, value index, node) for every site value that the graph computes."""
        by_name = {site.name: site for site in self.sites}
        for node in self.graph.nodes:
            if VALUE in node.meta:
                name, index = node.meta[VALUE]
                if name in by_name:
                    yield by_name[name], index, node

    def read_slots(self) -> list[Slot]:
        """The slots that are inputs, in order."""
        return [node.meta[SLOT] for node in self.inputs if SLOT in node.meta]


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
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied[node] = graph.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, copied.__getitem__),
            fx.node.map_arg(node.kwargs, copied.__getitem__),
            name=node.name,
        )
        copied[node].meta = dict(node.meta)
    return fx.GraphModule(module, graph)
