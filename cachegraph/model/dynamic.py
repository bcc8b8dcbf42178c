"""Sizes that vary from session to session: which axes of a call's tensors a name stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree

from cachegraph.errors import InputError, ModelError, TraceError, nearest
from cachegraph.spec import BATCH, SIZES

from .contents import Contents
from .guards import line_that_fixes
from .items import batch_of

SEVERAL = "compile it for several fixed sizes"
_TOKENS = "tokens"  # of an image whose latent is (batch, tokens, channels): its height and width
_TEXT = re.compile(r"encoder_|text|txt|prompt|caption|cap_|context|^y\b|^mask\b")

Place = tuple[str, int]  # of an input in a call, as pytree writes it; an axis


@dataclass(frozen=True)
class Axes:
    """Axes that may vary beside the batch.

    Attributes:
        free: of each input, by its place in a call; torch.export finds which of them must not.
        named: name -> where that size is read, one of which has to vary.
        sizes: name -> in the example.
    """

    free: Mapping[str, tuple[int, ...]]
    named: Mapping[str, tuple[Place, ...]]
    sizes: Mapping[str, int]


def checked_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of sizes, each once.

    Raises:
        InputError: one is unknown.
    """
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in SIZES:
            raise InputError(
                f"no size is called {name!r}",
                place="dynamic",
                expected=f"any of {', '.join(SIZES)}",
                remedy=nearest(name, SIZES),
            )
    return found


def axes_of(
    arguments: Mapping[str, Any], names: Iterable[str], *, follow: bool = False
) -> Axes | None:
    """What names of sizes stand for in a call; None where nothing but the batch is named.

    The first tensor is the latent; inputs of text are told by their names.

    Args:
        arguments: of the example call, by name.
        names: some of :data:`cachegraph.spec.SIZES`.
        follow: let the sizes of all other inputs vary with these: a table of positions has a row a
            token of the image, of the text, or of both.

    Raises:
        ModelError: the call has no such size.
    """
    names = [name for name in names if name != BATCH]
    if not names:
        return None
    tensors = dict(tensors_of(arguments))
    latent = next(iter(tensors))
    named: dict[str, tuple[Place, ...]] = {}
    for name in names:
        places = _text(tensors, latent) if name == "text" else _of_latent(name, tensors[latent])
        called = _TOKENS if name != "text" and tensors[latent].ndim == 3 else name
        named[called] = tuple((key or latent, axis) for key, axis in places)
        if not places:
            given = ", ".join(f"{_plain(k)} {list(t.shape)}" for k, t in tensors.items())
            raise ModelError(f"the model takes no {name}", place="dynamic", found=given)
    batch = batch_of(arguments)
    free = {}
    for key, tensor in tensors.items():
        text = _is_text(key) and key != latent
        fixed = key == latent or not ("text" in names if text else follow)
        own = {axis for places in named.values() for k, axis in places if k == key}
        others = {a for a in range(tensor.ndim) if a or tensor.shape[0] != batch}
        free[key] = tuple(sorted(own if fixed else others))
    sizes = {name: tensors[key].shape[axis] for name, [(key, axis), *_] in named.items()}
    return Axes(free, named, sizes)


class FixedSizeError(TraceError):
    """A size that has to vary does not."""


def refuse_fixed(program: ExportedProgram, axes: Axes | None) -> None:
    """Refuse a trace in which a named size does not vary.

    Raises:
        FixedSizeError: names the line that fixes it.
    """
    if axes is None:
        return
    for name, places in axes.named.items():
        lines = [line_that_fixes(program, *place) for place in places]
        if None not in lines:
            size = axes.sizes[name]
            raise FixedSizeError(
                f"{name} cannot vary: the model takes {size} only",
                place=next(filter(None, lines), ""),
                expected="a model that computes with the size, whatever it is",
                remedy=SEVERAL if size > 1 else "torch takes 1 for a constant: give more",
            )


def refuse_read(contents: Iterable[Contents], inputs: Sequence[Tensor], batch: str | None) -> None:
    """Refuse contents that decide what is computed where their size varies.

    Raises:
        FixedSizeError: names the line that reads them.
    """
    for one in contents:
        if any(str(dim).isidentifier() and str(dim) != batch for dim in inputs[one.input].shape):
            raise FixedSizeError(
                "sizes cannot vary: the model reads numbers from an input of such a size",
                place=one.place,
                remedy=SEVERAL,
            )


def symbol_names(
    inputs: Mapping[str, Tensor], batch: str | None, axes: Axes | None
) -> dict[str, str]:
    """What people call the symbols of a trace.

    Args:
        inputs: of the trace, by place.
        batch: symbol of the batch.
        axes: that vary beside it.

    Returns:
        Symbol -> name: ``batch``, ``height``, or input and axis, such as ``axis0_img_ids``.
    """
    found = {batch: BATCH} if batch is not None else {}
    for name, places in axes.named.items() if axes is not None else ():
        for key, axis in places:
            symbol = str(inputs[key].shape[axis])
            if symbol.isidentifier() and name not in found.values():
                found.setdefault(symbol, name)
    for key, tensor in inputs.items():
        for axis, dim in enumerate(tensor.shape):
            found.setdefault(str(dim), f"axis{axis}_{re.sub(r'[^a-zA-Z0-9]+', '_', _plain(key))}")
    return {symbol: name for symbol, name in found.items() if symbol.isidentifier()}


def _of_latent(name: str, latent: Tensor) -> list[tuple[str, int]]:
    """Axes that may be a size of the latent: its channels, and no size of it, cannot vary."""
    match name, latent.ndim:
        case "frames", 5:
            return [("", 1), ("", 2)]
        case "frames", _:
            return []
        case _, 3:
            return [("", 1), ("", 2)]
        case "height", ndim if ndim > 3:
            return [("", ndim - 2)]
        case "width", ndim if ndim > 3:
            return [("", ndim - 1)]
    return []


def _text(tensors: Mapping[str, Tensor], latent: str) -> list[tuple[str, int]]:
    own = {key: t for key, t in tensors.items() if key != latent and _is_text(key)}
    return [(key, t.ndim - 2) for key, t in own.items() if t.ndim > 2 and t.is_floating_point()]


def _is_text(key: str) -> bool:
    return _TEXT.search(_plain(key)) is not None


def _plain(key: str) -> str:
    """``added.resolution`` for ``['added']['resolution']``."""
    return re.sub(r"[\[\]']+", ".", key).strip(".")


def tensors_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a call by their places, in graph order."""
    for path, leaf in _pytree.tree_leaves_with_path(dict(arguments)):
        if isinstance(leaf, Tensor):
            yield _pytree.keystr(path), leaf
