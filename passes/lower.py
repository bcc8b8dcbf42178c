"""Turn cache operations into plain inputs, outputs and aten operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cachegraph.graph import ops
from cachegraph.graph.binding import Binding, is_view
from cachegraph.graph.step_graph import CONSTANT, ORIGIN, Origin, Stage, StepGraph
from cachegraph.model.shapes import Body


@dataclass(frozen=True)
class Lower:
    """Replace ``cache.read`` by the slot, ``cache.write`` by its value, the rest by aten operators.

    Before::

        %slot_attn_0 = slot "attn#0"
        %read_attn_0 = cache.read(%slot_attn_0)
        %add_1 = aten.add.Tensor(%x, %read_attn_0)
        %write_mlp_0 = cache.write(%linear_5, slot="mlp#0")
        return %add_2, %write_mlp_0

    After::

        %slot_attn_0 = slot "attn#0"
        %add_1 = aten.add.Tensor(%x, %slot_attn_0)
        return %add_2, %linear_5

    What is left is a pure function of tensors that any backend can take. An output of the model
    that shares its memory with a value which is needed later becomes a copy: the sampler may write
    to it. Left alone: everything else.
    """

    name: ClassVar[str] = "lower"

    def apply(self, step: StepGraph) -> int:
        """Lower every cache operation; returns how many."""
        lowered = 0
        for node in list(step.graph.nodes):
            if node.target not in ops.CACHE_OPS:
                continue
            if node.target in (ops.read, ops.write):
                result = node.args[0]
            else:
                with step.graph.inserting_before(node):
                    result = _pasted(step.graph, node, *step.shapes.body(node, _traced))
            node.replace_all_uses_with(result, propagate_meta=False)
            step.graph.erase_node(node)
            lowered += 1
        lowered += _copy_shared_outputs(step)
        for node in step.inputs:
            # An operation need not use all that it is given: ages, where one choice follows.
            if CONSTANT in node.meta and not node.users:
                step.graph.erase_node(node)
        step.stage = Stage.LOWERED
        return lowered


def _copy_shared_outputs(step: StepGraph) -> int:
    """Copies of the model's outputs that lie in slots, in weights or in what is known beforehand.

    Slots that are read are inputs now, and those that are written are outputs.
    """
    outputs = list(step.outputs)
    count = step.model_outputs
    written = set(map(_owner, outputs[count:]))
    times = step.binding_times()
    copied = 0
    for index, node in enumerate(outputs[:count]):
        owner = _owner(node)
        own = owner.op == "call_function" and times[owner] is Binding.DYNAMIC
        if own and owner not in written:
            continue
        with step.graph.inserting_before(step.output):
            clone = step.graph.call_function(torch.ops.aten.clone.default, (node,))
        clone.meta = {"val": step.shapes.evaluate(clone), ORIGIN: Origin(Lower.name)}
        outputs[index] = clone
        copied += 1
    step.output.args = (tuple(outputs),)
    return copied


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value lies in."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _traced(node: fx.Node) -> Body:
    """What the operation's own definition does with inputs of these shapes."""
    tensors = node.all_input_nodes
    # Tracing tells values apart by identity, and two inputs may share one recorded value.
    values = [t.meta["val"].detach() for t in tensors]
    function: Any = node.target

    def call(*given: torch.Tensor) -> torch.Tensor:
        by_node = dict(zip(tensors, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_node.__getitem__)
        return function(*args, **kwargs)

    with values[0].fake_mode, torch.no_grad():
        body = make_fx(call, tracing_mode="real")(*values)
    body.graph.eliminate_dead_code()
    return body.graph, body.graph.find_nodes(op="placeholder")


def _pasted(graph: fx.Graph, node: fx.Node, body: fx.Graph, holders: list[fx.Node]) -> fx.Node:
    """The operation's result, of a copy of its body in front of it."""
    copied: dict[fx.Node, fx.Node] = dict(zip(holders, node.all_input_nodes, strict=True))
    result = node
    for inner in body.nodes:
        if inner.op == "output":
            result = copied[inner.args[0]]
        elif inner.op == "call_function":
            copied[inner] = graph.create_node(
                inner.op,
                inner.target,
                fx.node.map_arg(inner.args, copied.__getitem__),
                fx.node.map_arg(inner.kwargs, copied.__getitem__),
                name=f"{node.name}_{len(copied) - len(holders)}",
            )
            copied[inner].meta = {"val": inner.meta["val"]} if "val" in inner.meta else {}
            copied[inner].meta[ORIGIN] = Origin(Lower.name, node.meta[ORIGIN].site)
        elif inner.op != "placeholder":
            raise NotImplementedError(f"{inner.op} in the definition of {node.target}")
    return result
