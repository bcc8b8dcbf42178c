"""Attention over a part of a stream's tokens: the others are folded into its batch.

A video model attends within frames, and along time; see ``zoo/stdit.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .site import Folding
from .structure import VIEWS, aten

_RESHAPES = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
}
_SAME = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}


def find_folding(value: fx.Node) -> Folding | None:
    """How the tokens of an attention's value lie in the stream that it is added to.

    Args:
        value: ``(B', N', C)``; the views behind it, followed with the sizes of the example inputs
            and numbers in place of contents, lead to ``(B, N, C)``.

    Returns:
        None where nothing is folded, or not in one of the two ways.
    """
    if value.meta["val"].ndim != 3:
        return None
    batch, tokens, _ = _sizes(value)
    places = torch.arange(batch * tokens).view(batch, tokens, 1)
    node, found = value, places
    while True:
        views = [user for user in node.users if user.target in VIEWS]
        if len(views) != 1:
            break
        node = views[0]
        moved = _moved(node, found)
        if moved is None:
            return None
        found = moved
    if found.ndim != 3 or found.shape[0] == batch or batch % found.shape[0]:
        return None
    size = batch // found.shape[0]
    grid = places.view(-1, size, tokens)
    for outer, wanted in ((True, grid), (False, grid.transpose(1, 2))):
        if torch.equal(found.flatten(), wanted.flatten()):
            return Folding(size, outer)
    return None


def _moved(node: fx.Node, places: Tensor) -> Tensor | None:
    """What a view makes of places ``(..., 1)`` where channels are left alone."""
    args: Any = node.args
    if node.target in _RESHAPES:
        return places.reshape(*_sizes(node)[:-1], 1) if _sizes(node)[:-1] else None
    if node.target is aten.transpose.int:
        return places.transpose(args[1], args[2])
    if node.target is aten.permute.default:
        return places.permute(args[1])
    return places if node.target in _SAME else None


def _sizes(node: fx.Node) -> list[int]:
    return [d if isinstance(d, int) else d.node.hint for d in node.meta["val"].shape]
