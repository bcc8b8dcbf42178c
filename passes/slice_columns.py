"""Compute only those columns of a linear layer that something uses."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachegraph.graph.step_graph import StepGraph
from cachegraph.graph.weights import add_weight, slice_name

aten = torch.ops.aten

Columns = tuple[int, int]  # from, to


@dataclass(frozen=True)
class SliceColumns:
    """Replace a linear layer of which some chunks are dead by one for each run of live columns.

    Before, where an adaLN block is reused and two of its six chunks are left::

        %linear_2 = aten.linear(%silu_1, @ada.weight, @ada.bias)         f32[s0, 192]
        %split_0 = aten.split.Tensor(%linear_2, 32, 1)
        %getitem_2 = operator.getitem(%split_0, 2)                       f32[s0, 32]
        %getitem_5 = operator.getitem(%split_0, 5)                       f32[s0, 32]

    After::

        %linear_2_64_96 = aten.linear(%silu_1, @ada.weight[64:96], @ada.bias[64:96])
        %linear_2_160_192 = aten.linear(%silu_1, @ada.weight[160:192], @ada.bias[160:192])

    The parts of a weight are views of it: nothing is stored twice and nothing is cut at run time.
    A column is computed as before, bit for bit where the BLAS library sums a row in one order
    whatever the number of columns, which it does for the widths of transformers.

    Left alone: layers of which all columns are used, or whose result is used as a whole.
    """

    name: ClassVar[str] = "slice-columns"

    def apply(self, step: StepGraph) -> int:
        """Slice the layers; returns how many."""
        sliced = 0
        for node in step.graph.find_nodes(op="call_function", target=aten.linear.default):
            pieces = dict(_pieces(node))
            whole = node.meta["val"].shape[-1]
            if not pieces or None in pieces.values():
                continue
            runs = _runs([columns for columns in pieces.values() if columns is not None])
            if runs == [(0, whole)] or any(n.op != "get_attr" for n in _weights(node)):
                continue
            _slice(step, node, pieces, runs)
            sliced += 1
        return sliced


def _weights(node: fx.Node) -> list[fx.Node]:
    """Weight and, where there is one, bias."""
    return [n for n in node.args[1:3] if isinstance(n, fx.Node)]


def _pieces(node: fx.Node) -> Iterator[tuple[fx.Node, Columns | None]]:
    """The nodes that take columns of a result, with the columns; None where they take all."""
    value = node.meta["val"]
    last = value.ndim - 1
    for user in node.users:
        args: Any = user.args
        on_last = len(args) > 1 and args[0] is node
        if on_last and user.target in (aten.split.Tensor, aten.split_with_sizes.default):
            if len(args) < 3 or args[2] % value.ndim != last:
                yield user, None
                continue
            sizes = [int(piece.shape[-1]) for piece in user.meta["val"]]
            for piece in user.users:
                index: Any = piece.args[1]
                start = sum(sizes[:index])
                is_item = piece.target is operator.getitem
                yield piece, (start, start + sizes[index]) if is_item else None
        elif on_last and user.target is aten.slice.Tensor and len(args) == 4:
            on_last = args[1] % value.ndim == last and user.meta["val"].shape[-1] > 0
            start = args[2] or 0
            start = max(start + value.shape[-1], 0) if start < 0 else start
            yield user, (start, start + int(user.meta["val"].shape[-1])) if on_last else None
        else:
            yield user, None


def _runs(columns: list[Columns]) -> list[Columns]:
    """Columns that touch or overlap, joined."""
    runs: list[Columns] = []
    for start, stop in sorted(columns):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(stop, runs[-1][1])
        else:
            runs.append((start, stop))
    return runs


def _slice(
    step: StepGraph, node: fx.Node, pieces: dict[fx.Node, Columns | None], runs: list[Columns]
) -> None:
    rank = node.meta["val"].ndim
    for run in runs:
        with step.graph.inserting_before(node):
            weights = [_part(step, weight, run) for weight in _weights(node)]
            args = (node.args[0], *weights)
            part = _call(step, node, node.target, args, run)
            for piece, columns in pieces.items():
                if columns is None or not run[0] <= columns[0] < run[1]:
                    continue
                replacement = part
                if columns != run:
                    bounds = (columns[0] - run[0], columns[1] - run[0])
                    args = (part, rank - 1, *bounds)
                    replacement = _call(step, part, aten.slice.Tensor, args, bounds)
                piece.replace_all_uses_with(replacement, propagate_meta=False)
    for piece in pieces:
        step.graph.erase_node(piece)
    for user in list(node.users):  # splits
        step.graph.erase_node(user)
    dead = _weights(node)
    step.graph.erase_node(node)
    for weight in dead:
        if not weight.users:
            step.graph.erase_node(weight)


def _part(step: StepGraph, weight: fx.Node, run: Columns) -> fx.Node:
    """Some rows of a weight, as a weight."""
    name = slice_name(str(weight.target), *run)
    add_weight(step.module, name)
    node = step.graph.get_attr(name)
    value = weight.meta["val"]
    with value.fake_mode:
        node.meta["val"] = value[run[0] : run[1]]
    return node


def _call(step: StepGraph, source: fx.Node, target: Any, args: Any, columns: Columns) -> fx.Node:
    """An operation on some columns; the name says which, for it may stand in several graphs."""
    name = f"{source.name}_{columns[0]}_{columns[1]}"
    node = step.graph.create_node("call_function", target, args, name=name)
    if "nn_module_stack" in source.meta:
        node.meta["nn_module_stack"] = source.meta["nn_module_stack"]
    return node
