"""Lowered graphs as programs of ``torch.export``, which is what ahead-of-time compilers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from cachegraph.errors import BackendError
from cachegraph.graph.step_graph import copy_module
from cachegraph.spec import TensorSpec

_MOST_BYTES = 64 * 1024  # of a constant; a larger one takes less room as what it is made from


def export_graph(
    module: fx.GraphModule,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    device: torch.device | str = "cpu",
) -> ExportedProgram:
    """Export a lowered graph; its weights are buffers under their own names.

    Args:
        module: the graph.
        inputs: spec of each input; symbolic sizes stay dynamic.
        sizes: an example for each symbolic size; not 0 or 1, which torch takes for constants.
        device: that the graph runs on.

    Raises:
        BackendError: torch took a symbolic size for a constant; what is made of it would compute
            wrong results for any other, and not say so.
    """
    example = tuple(torch.zeros(s.sizes(sizes), dtype=s.dtype, device=device) for s in inputs)
    varying = tuple(
        {i: Dim.AUTO for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs
    )
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=varying, strict=False)
    _refuse_fixed(program, inputs)
    return program


def _refuse_fixed(program: ExportedProgram, inputs: Sequence[TensorSpec]) -> None:
    given = program.graph_signature.user_inputs
    exported = [n for n in program.graph.find_nodes(op="placeholder") if n.name in given]
    for node, wanted in zip(exported, inputs, strict=True):
        found = TensorSpec.of(node.meta["val"])
        for dim, size in zip(wanted.shape, found.shape, strict=True):
            # An expression may have one value only: (2*batch)//batch.
            if isinstance(size, int) and isinstance(dim, str) and dim.isidentifier():
                raise BackendError(
                    "torch.export takes a size that varies for a constant",
                    place=f"input {node.name}",
                    expected=str(wanted),
                    found=str(found),
                    remedy="compile for one batch (--static-batch), or with another backend",
                )


@torch.no_grad()
def fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which torch has computed what depends on neither inputs nor weights.

    Others round the frequencies of a timestep embedding differently in the last digit, and the
    sine of a timestep of 1000 times that is off in the fifth.

    Args:
        module: the graph, on the device that it was traced on.
    """
    copied = copy_module(module)
    graph, values = copied.graph, dict[fx.Node, torch.Tensor]()
    for node in graph.nodes:
        if not _is_constant(node, values):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        value = node.target(*args, **kwargs)
        if isinstance(value, torch.Tensor) and value.nbytes <= _MOST_BYTES:
            values[node] = value
    for node, value in values.items():
        if all(user in values for user in node.users):
            continue
        copied.register_buffer(f"constant_{node.name}", value)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(f"constant_{node.name}"))
    graph.eliminate_dead_code()
    copied.recompile()
    return copied


def _is_constant(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> bool:
    """True for an operation on constants that gives the same result at each call."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return all(source in values for source in node.all_input_nodes)
