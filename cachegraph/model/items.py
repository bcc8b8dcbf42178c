"""A batch taken apart: for models whose trace holds for one batch only.

A model may fix its batch (a loop over its items, a list of one entry each), though it treats items
independently of one another. Such a model is traced with one item, and a call is one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

# Of the result, between a batch and its items one by one: products are rounded otherwise.
_TOLERANCE = 1e-4
_COARSE = 5e-2  # in half precision
_MOST_VECTORS = 4  # that may be something else


@dataclass(frozen=True)
class Items:
    """What of a call belongs to one item each.

    Attributes:
        tensors: paths of arguments with an item per row, such as ``added.resolution``.
        lists: names of arguments that are lists of an item each.
    """

    tensors: tuple[str, ...]
    lists: tuple[str, ...]

    def count(self, arguments: Mapping[str, Any]) -> int:
        """How many items a call has; 1 where it holds none of these arguments."""
        for name, value in arguments.items():
            if name in self.lists and isinstance(value, list):
                return len(value)
            for path, leaf in _leaves(name, value):
                if path in self.tensors and isinstance(leaf, Tensor) and leaf.ndim:
                    return leaf.shape[0]
        return 1

    def part(self, arguments: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The arguments of one item."""
        return self._changed(
            arguments,
            lambda rows: rows[number : number + 1] if len(rows) > 1 else rows,  # one for all items
        )

    def repeated(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The arguments of so many items: those of a batch, and then once more from the first."""

        def change(rows: Any) -> Any:
            numbers = [number % len(rows) for number in range(count)]
            return [rows[i] for i in numbers] if isinstance(rows, list) else rows[numbers]

        return self._changed(arguments, change)

    def _changed(
        self, arguments: Mapping[str, Any], change: Callable[[Any], Any]
    ) -> dict[str, Any]:
        def argument(name: str, value: Any) -> Any:
            if name in self.lists and isinstance(value, list):
                return change(value)

            def leaf(path: Any, one: Any) -> Any:
                rows = isinstance(one, Tensor) and _path(name, path) in self.tensors
                return change(one) if rows else one

            return _pytree.tree_map_with_path(leaf, value)

        return {name: argument(name, value) for name, value in arguments.items()}


def joined(parts: Sequence[Any]) -> Any:
    """One result from those of the items: rows behind rows, list behind list."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        kind: Any = type(first)
        return kind({key: joined([part[key] for part in parts]) for key in first})
    if isinstance(first, list):
        return [one for part in parts for one in part]
    if isinstance(first, tuple):
        return tuple(map(joined, zip(*parts, strict=True)))
    return first


def batch_of(arguments: Mapping[str, Any]) -> int:
    """The batch of example arguments: rows of the first tensor, or items of a first list."""
    first = next(iter(arguments.values()))
    if isinstance(first, list) and first and all(isinstance(one, Tensor) for one in first):
        return len(first)
    leaves = [leaf for leaf in _pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]
    return leaves[0].shape[0] if leaves[0].ndim else 1


def two_items(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one item as those of two that differ."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != 1:
            return value
        other = value.flip(-1) if value.is_floating_point() and value.ndim > 1 else value
        return torch.cat([value, other])

    def argument(value: Any) -> Any:
        return [*value, *value] if isinstance(value, list) and len(value) == 1 else leaf_tree(value)

    def leaf_tree(value: Any) -> Any:
        return _pytree.tree_map(leaf, value)

    return {name: argument(value) for name, value in arguments.items()}


def one_more(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with their first item once more."""
    batch = _tensors(arguments)[0].shape[0]

    def longer(leaf: Any) -> Any:
        rows = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
        return torch.cat([leaf, leaf[:1]]) if rows else leaf

    return _pytree.tree_map(longer, dict(arguments))


@torch.no_grad()
def independent_items(model: nn.Module, arguments: Mapping[str, Any]) -> Items | None:
    """How a batch can be taken apart, tried on an example; None where it cannot.

    Args:
        model: is run on the batch and on each item.
        arguments: of two items or more.
    """
    batch = batch_of(arguments)
    found = [pair for name, value in arguments.items() for pair in _leaves(name, value)]
    leaves = {path: leaf for path, leaf in found if isinstance(leaf, Tensor) and leaf.ndim}
    rows = [path for path, leaf in leaves.items() if leaf.shape[0] == batch]
    vectors = [path for path in rows if leaves[path].ndim == 1]
    lists = tuple(n for n, v in arguments.items() if isinstance(v, list) and len(v) == batch)
    # Vectors as long as the batch may be something else: positions of two frames. Most are tried
    # first: one that is of an item each does not fit the other inputs then.
    choices = (
        Items(tuple(p for p in rows if p not in others and p.partition(".")[0] not in cut), cut)
        for cut in dict.fromkeys((lists, ()))
        for count in reversed(range(min(len(vectors), _MOST_VECTORS) + 1))
        for others in combinations(vectors, count)
    )
    given = dict(arguments)
    whole = model(**_copied(given))
    return next(
        (items for items in dict.fromkeys(choices) if _agrees(model, items, given, batch, whole)),
        None,
    )


def _agrees(
    model: nn.Module, items: Items, arguments: dict[str, Any], batch: int, whole: Any
) -> bool:
    """Whether a batch, and one with its first item once more, is what its items are."""
    try:
        parts = [model(**_copied(items.part(arguments, i))) for i in range(batch)]
        if not same_tensors(joined(parts), whole):
            return False
        return same_tensors(
            joined([*parts, parts[0]]), model(**_copied(items.repeated(arguments, batch + 1)))
        )
    except Exception:  # noqa: BLE001 - whatever a model says of arguments that do not fit
        return False


@torch.no_grad()
def agree_for_more(
    model: nn.Module, items: Items, arguments: dict[str, Any], counts: Iterable[int]
) -> bool:
    """Whether batches of more items are what their items are.

    A model may count its items (``if len(x) > 3``), and treat them otherwise from some number on.

    Args:
        model: is run on each batch, as far as memory allows.
        items: how a batch is taken apart.
        arguments: of some items, that are taken over and over.
        counts: how many items.
    """
    batch = items.count(arguments)
    parts = [model(**_copied(items.part(arguments, number))) for number in range(batch)]
    try:
        for count in counts:
            whole = model(**_copied(items.repeated(arguments, count)))
            if not same_tensors(joined([parts[i % batch] for i in range(count)]), whole):
                return False
    except torch.OutOfMemoryError:
        return True
    except Exception:  # noqa: BLE001 - whatever a model says of arguments that do not fit
        return False
    return True


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two results hold the same tensors, but for rounding."""
    pairs = list(zip(_tensors(one), _tensors(other), strict=False))
    return len(_tensors(one)) == len(_tensors(other)) and all(_close(a, b) for a, b in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    wide = other.dtype in (torch.float32, torch.float64)
    difference = float((one.double() - other.double()).norm())
    return difference <= (_TOLERANCE if wide else _COARSE) * float(other.double().norm())


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return _pytree.tree_map_only(Tensor, torch.clone, arguments)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    return [(_path(name, path), leaf) for path, leaf in _pytree.tree_leaves_with_path(value)]


def _path(name: str, path: Sequence[Any]) -> str:
    keys = (getattr(key, "key", getattr(key, "idx", "")) for key in path)
    return ".".join([name, *map(str, keys)])
