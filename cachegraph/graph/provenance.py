"""Where the nodes of lowered graphs come from: module, pass and site, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .step_graph import ORIGIN

_NO_MODULE = "_empty"  # how torch names the module of what it added itself

Origins = Mapping[str, str]  # name of a node -> the pass that made it, and for which site


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one variant.

    Attributes:
        variant: name of the variant.
        pass_name: name of the pass.
        rewrites: how many it made.
        nodes: nodes before and after.
        removed: paths of modules that had operations in the graph before it and none after.
    """

    variant: str
    pass_name: str
    rewrites: int
    nodes: tuple[int, int]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class NodeFlops:
    """FLOPs of one node's call.

    Attributes:
        count: of the call; where it is done for tokens that were chosen, for each of them.
        tokens: the symbol that says how many these are; empty where it is done for all.
    """

    count: int
    tokens: str = ""


@dataclass(frozen=True)
class Provenance:
    """Of all graphs of a compiled loop; names mean the same node in every variant.

    Attributes:
        modules: name of a node -> path of the module that it belongs to; empty for the model's own.
        made_by: name of a graph -> nodes that a pass made -> ``insert-cache, blocks.0.attn``.
        flops: name of a graph -> nodes that have any -> their FLOPs.
        passes: what each pass did to each variant, in order.
    """

    modules: Mapping[str, str]
    made_by: Mapping[str, Mapping[str, str]]
    flops: Mapping[str, Mapping[str, NodeFlops]]
    passes: tuple[PassRecord, ...]


NOTHING = Provenance({}, {}, {}, ())


def module_of(node: fx.Node) -> str:
    """Path of the module whose call made a node; empty for the model's own, or where none is known.

    A module that is called several times has one path for all of its calls.
    """
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith(_NO_MODULE) else path.partition("@")[0]


def modules_in(graph: fx.Graph) -> set[str]:
    """The modules that have operations in a graph."""
    return {module_of(node) for node in graph.nodes if node.op == "call_function"} - {""}


def modules_of(graphs: Iterable[fx.Graph], sites: Mapping[str, str]) -> dict[str, str]:
    """Name of a node -> path of its module.

    What a pass made belongs to the module of the site that it was made for, else to that of the
    first node that it uses.

    Args:
        graphs: of variants and prologues.
        sites: name of a site -> path of its module, or of the block that it is in.
    """
    found: dict[str, str] = {}
    for graph in graphs:
        for node in graph.nodes:
            origin = node.meta.get(ORIGIN)
            path = module_of(node) or (sites.get(origin.site, "") if origin is not None else "")
            if not path and origin is not None:
                path = next((p for n in node.all_input_nodes if (p := found.get(n.name))), "")
            if path or node.op == "call_function":
                found[node.name] = path
    return found


def origins(graph: fx.Graph) -> dict[str, str]:
    """Nodes that a pass made -> which, and for which site."""
    return {node.name: str(node.meta[ORIGIN]) for node in graph.nodes if ORIGIN in node.meta}


def total_flops(nodes: Sequence[NodeFlops], tokens: Mapping[str, int]) -> int:
    """FLOPs of several nodes.

    Args:
        nodes: any.
        tokens: symbol -> how many tokens are chosen.
    """
    return sum(one.count * tokens.get(one.tokens, 1) for one in nodes)
