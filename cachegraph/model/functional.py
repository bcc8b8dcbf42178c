"""An exported program as a graph in which nothing is written in place.

``run_decompositions({})`` traces the whole model anew to get it, which takes longer than the export
itself. Most models need only that a few composite operators are written as what they do to tensors
of these shapes; that is done here, node by node, and gives the same graph.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from cachegraph.errors import TraceError

aten = torch.ops.aten

_CALL, _SIZE = "call_function", aten.sym_size.int

_RESHAPES = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
_RESOLVED = _RESHAPES | {aten.chunk.default, aten.to.dtype, aten.contiguous.default}
# Composite operators that stay as they are.
_KEPT = {
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.type_as.default,
    aten.outer.default,
    aten.scaled_dot_product_attention.default,
    aten.dropout.default,
    aten._assert_tensor_metadata.default,
}


def functional(program: ExportedProgram) -> tuple[ExportedProgram, fx.GraphModule]:
    """The program, and as a module of operators that either copy or do not, none in place.

    Raises:
        TraceError: the model changes a buffer or an input.
    """
    module: Any = program.module(check_guards=False)
    sizes = {str(n.meta["val"]): n for n in module.graph.find_nodes(op=_CALL, target=_SIZE)}
    if not all(_is_known(node, sizes) for node in module.graph.nodes):
        program = program.run_decompositions({})
        _refuse_mutation(program)
        return program, program.module(check_guards=False)
    for node in list(module.graph.nodes):
        if node.target in _RESOLVED:
            _resolve(module.graph, node, sizes)
    # As torch does: weights stay, though nothing uses them.
    module.graph.eliminate_dead_code(lambda n: n.op == "get_attr" or n.is_impure())
    return program, module


def _refuse_mutation(program: ExportedProgram) -> None:
    signature = program.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        kind = "buffers" if signature.buffers_to_mutate else "its inputs"
        raise TraceError(
            f"the model changes {kind} when it is called",
            expected="a forward without state",
            found=", ".join(sorted(set(changed.values()))),
        )


def _is_known(node: fx.Node, sizes: Mapping[str, fx.Node]) -> bool:
    """True where a call stays as it is, or :func:`_resolve` knows what becomes of it."""
    target: Any = node.target
    if node.op != _CALL:
        return node.op in ("placeholder", "get_attr", "output")
    if target is operator.getitem or target in _KEPT:
        return True
    if getattr(target, "namespace", "") != "aten":
        return False
    if target in _RESOLVED:
        return _is_plain(node, sizes)
    if target is _SIZE:
        source = node.all_input_nodes[0]
        return sizes[str(node.meta["val"])] is node and source.op == "placeholder"
    value = node.meta.get("val")
    composite = target._can_decompose()
    return not (composite or target._schema.is_mutable or isinstance(value, torch.SymInt))


def _is_plain(node: fx.Node, sizes: Mapping[str, fx.Node]) -> bool:
    """True where the arguments that the resolved call needs are there."""
    value = node.meta["val"]
    if node.kwargs:
        return False
    if node.target is aten.chunk.default:
        return isinstance(value[0].shape[_axis(node)], int)
    if node.target in _RESHAPES:
        return _shape(node, sizes) is not None
    return len(node.args) == 1 + (node.target is aten.to.dtype)


def _shape(node: fx.Node, sizes: Mapping[str, fx.Node]) -> Any:
    """Sizes as arguments; None where one of them has to be worked out."""
    source: Any = node.args[0]
    if node.target is aten.reshape.default and _same_memory(source, node):
        return node.args[1]  # torch works them out where it copies only
    shape = node.meta["val"].shape
    known = [d if isinstance(d, int) else sizes.get(str(d)) for d in shape]
    return known if all(isinstance(d, int) or (d is not None and d < node) for d in known) else None


def _axis(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else 0


def _resolve(graph: fx.Graph, node: fx.Node, sizes: Mapping[str, fx.Node]) -> None:
    """Replace a call by what it does with tensors that lie as these do."""
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = {**node.meta}
        return made

    with graph.inserting_before(node):
        if node.target is aten.chunk.default:
            axis = _axis(node)
            size = after[0].shape[axis]
            made = call(aten.split.Tensor, source, size, *([axis] if axis else []))
        elif node.target in _RESHAPES:
            shape = _shape(node, sizes)
            if _same_memory(source, node):
                made = call(aten.view.default, source, shape)
            else:
                copy = call(aten.clone.default, source, memory_format=torch.contiguous_format)
                copy.meta["val"] = before.clone(memory_format=torch.contiguous_format)
                made = call(aten._unsafe_view.default, copy, shape)
        elif _same_memory(source, node):
            made = source
        elif node.target is aten.to.dtype:
            made = call(aten._to_copy.default, source, dtype=node.args[1])
        else:
            made = call(aten.clone.default, source, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _same_memory(one: fx.Node, other: fx.Node) -> bool:
    first, second = (node.meta["val"].untyped_storage()._cdata for node in (one, other))
    return bool(first == second)
