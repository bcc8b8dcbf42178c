"""Calls on tensors of known sizes: FLOPs and memory of each, found once for calls that are alike.

Steps of one trajectory and blocks of one model have most of their calls in common.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cachegraph.model.shapes import frozen
from cachegraph.spec import TensorSpec, evaluate

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class Block:
    """A tensor without data: how it lies in which block of memory, and bytes of that."""

    layout: _Layout
    storage: int
    nbytes: int


@dataclass
class SizedCalls:
    """What calls make of tensors; shared by all graphs whose cost is asked at one time."""

    _known: dict[Hashable, tuple[int, Any]] = field(default_factory=dict)

    def run(
        self, module: fx.GraphModule, symbols: Mapping[str, int]
    ) -> Iterator[tuple[fx.Node, dict[int, int], int]]:
        """(node, bytes of each block of memory of its value, FLOPs), in order."""
        env: dict[fx.Node, Any] = {}
        mode = module.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
        blocks = 0
        for node in module.graph.nodes:
            flops = 0
            if node.op in ("placeholder", "get_attr"):
                env[node] = _given(node, symbols, blocks)
            elif node.op == "call_function":
                flops, env[node] = self._call(node, env, mode, blocks)
            else:
                continue
            held = {b.storage: b.nbytes for b in tree_leaves(env[node]) if isinstance(b, Block)}
            blocks = max([blocks, *(storage + 1 for storage in held)])
            yield node, held, flops

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any], mode: Any, free: int) -> Any:
        """FLOPs and value; new blocks are numbered from ``free`` on."""
        inputs = [env[n] for n in node.all_input_nodes]
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Block)]
        if (
            not hasattr(node.target, "_schema")
            and len(inputs) == 1
            and not isinstance(inputs[0], Block)
        ):  # an item of a tuple, or arithmetic on sizes
            target: Any = node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            return 0, target(*args, **kwargs)
        place = {s: i for i, s in enumerate(dict.fromkeys(b.storage for b in given))}
        described = {n: _described(env[n], place) for n in node.all_input_nodes}
        keywords = tuple((k, frozen(v, described)) for k, v in node.kwargs.items())
        key = mode is None, node.target, frozen(node.args, described), keywords
        if key not in self._known:
            self._known[key] = _try(node, env, mode, place)
        flops, form = self._known[key]
        storages = list(place)

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Block):
                return leaf
            if leaf.storage >= 0:
                storage = storages[leaf.storage]
                nbytes = next(b.nbytes for b in given if b.storage == storage)
                return Block(leaf.layout, storage, nbytes)
            return Block(leaf.layout, free - leaf.storage - 1, leaf.nbytes)

        return flops, tree_map(placed, form)


def _try(node: fx.Node, env: Mapping[fx.Node, Any], mode: Any, place: Mapping[int, int]) -> Any:
    """FLOPs of a call and what it returns: blocks of inputs by their place, new ones below 0."""
    target: Any = node.target
    found: dict[int, int] = {}

    def empty(leaf: Any) -> Any:
        if not isinstance(leaf, Block):
            return leaf
        sizes, strides, dtype, device = leaf.layout
        tensor = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
        found[tensor.untyped_storage()._cdata] = place[leaf.storage]
        return tensor

    def block(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        memory = leaf.untyped_storage()
        number = found.setdefault(memory._cdata, -1 - sum(n < 0 for n in found.values()))
        layout = tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
        return Block(layout, number, memory.nbytes())

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with mode, torch.no_grad(), _quiet():
        values = {n: tree_map(empty, env[n]) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with counter:
            result = target(*args, **kwargs)
        return int(counter.get_total_flops()), tree_map(block, result)


def _described(value: Any, place: Mapping[int, int]) -> Hashable:
    if isinstance(value, Block):
        return value.layout, place[value.storage]
    if isinstance(value, list | tuple):
        return tuple(_described(v, place) for v in value)
    return type(value), repr(value)


def _given(node: fx.Node, symbols: Mapping[str, int], free: int) -> Any:
    """An input or weight in a block of its own.

    A view may need the order of its strides; gaps, as in a slice of a weight, are closed.
    """
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    spec = TensorSpec.of(value)
    sizes = spec.sizes(symbols)
    order = [_stride(value, dim, symbols) for dim in range(value.ndim)]
    layout = sizes, _dense(sizes, order), value.dtype, value.device
    return Block(layout, free, spec.nbytes(symbols))


def _stride(value: Tensor, dim: int, symbols: Mapping[str, int]) -> int:
    return evaluate(str(value.stride(dim)), symbols)


def _dense(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, that fall in the same order as given ones."""
    strides, step = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda d: (order[d], -d)):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return tuple(strides)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the attention kernels of GPUs only, so a trace on the CPU would seem cheaper.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notice about counting inside another dispatch mode."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
