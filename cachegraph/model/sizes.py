"""Sizes of a trace: its symbols, what they are in the example, what they must fulfil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import CustomObjArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree

from cachegraph.spec import TensorSpec

from .conditions import failed
from .guards import conditions_of, line_that_fixes

# Reasons not to take a batch apart: for another one the model may do something else.
BRANCHES = "the model branches on sizes", "the model takes batches"


def batch_conditions(
    program: ExportedProgram, asked: Mapping[Any, str], leaves: Mapping[str, Tensor]
) -> tuple[tuple[str, ...] | None, str]:
    """What sizes must fulfil, None where that has no form; and why the batch is fixed if it is.

    Args:
        program: the trace.
        asked: what :func:`.guards.branches` heard.
        leaves: tensors of the example call by their places.
    """
    inputs = inputs_of(program)
    symbols = symbols_of(inputs, [*leaves.values()])
    try:
        conditions = conditions_of(program, asked, symbols)
    except ValueError as error:
        return None, f"the model branches on sizes: {error}"
    if isinstance(TensorSpec.of(inputs[0]).shape[0], int):
        line = line_that_fixes(program, next(iter(leaves)), 0)
        return conditions, f"the model fixes it ({line})" if line else "the model fixes it"
    if (broken := failed(conditions, symbols)) is not None:
        return None, f"the model takes batches of one another way ({broken} for all others)"
    return conditions, ""


def inputs_of(program: ExportedProgram) -> list[Tensor]:
    """The tensors that a trace takes, in graph order."""
    names = set(program.graph_signature.user_inputs)
    holders = (n for n in program.graph.find_nodes(op="placeholder") if n.name in names)
    return [n.meta["val"] for n in holders if isinstance(n.meta.get("val"), Tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of arguments, in graph order."""
    tree = dict(value) if isinstance(value, Mapping) else value
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def symbols_of(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Symbol -> size, of symbolic inputs that stand for the given tensors."""
    return {
        str(dim): size
        for value, tensor in zip(inputs, tensors, strict=True)
        for dim, size in zip(value.shape, tensor.shape, strict=True)
        if not isinstance(dim, int) and str(dim).isidentifier()
    }


def unknown_sizes(node: fx.Node) -> list[str]:
    """Symbols in a value's shape that only contents decide."""
    value = node.meta.get("val")
    return [] if is_object(value) else sorted(map(str, free_unbacked_symbols(value)))


def is_object(value: Any) -> bool:
    """Whether a value is something else than tensors and numbers: a generator of random ones."""
    return isinstance(value, CustomObjArgument)
