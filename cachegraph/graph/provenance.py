"""Where the nodes of lowered graphs come from: module, pass and site, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

_NO_MODULE = "_empty"  # how torch names the module of what it added itself


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
    """Of all graphs of a compiled loop; the name of a traced node is the same in all of them.

    Attributes:
        modules: name of a traced node -> path of the module that it belongs to; empty for the
            model's own.
        sites: name of a site -> path of its module, or of the block that it is in.
        made_by: name of a graph -> nodes that a pass made -> ``insert-cache, blocks.0.attn``.
        flops: name of a graph -> nodes that have any -> their FLOPs.
        passes: what each pass did to each variant, in order.
    """

    modules: Mapping[str, str]
    sites: Mapping[str, str]
    made_by: Mapping[str, Mapping[str, str]]
    flops: Mapping[str, Mapping[str, NodeFlops]]
    passes: tuple[PassRecord, ...]


NOTHING = Provenance({}, {}, {}, {}, ())


def module_of(node: fx.Node) -> str | None:
    """Path of the module whose call made a node; empty for the model's own, None if not traced.

    A module that is called several times has one path for all of its calls.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    path = str(stack[-1][0])
    return "" if path.startswith(_NO_MODULE) else path.partition("@")[0]


def modules_in(graph: fx.Graph) -> set[str]:
    """The modules that have operations in a graph."""
    found = {module_of(node) for node in graph.nodes if node.op == "call_function"}
    return {path for path in found if path}


def modules_of(graphs: Iterable[fx.Graph]) -> dict[str, str]:
    """Name of a node -> path of its module, for nodes that were traced."""
    found = {}
    for graph in graphs:
        for node in graph.nodes:
            path = module_of(node)
            if path is not None and node.op == "call_function":
                found[node.name] = path
    return found


def total_flops(nodes: Sequence[NodeFlops], tokens: Mapping[str, int]) -> int:
    """FLOPs of several nodes.

    Args:
        nodes: any.
        tokens: symbol -> how many tokens are chosen.
    """
    return sum(one.count * tokens.get(one.tokens, 1) for one in nodes)
