"""Numbers that a model reads from tensors: recorded in one eager run, replayed while tracing.

Masks, ids and lengths decide in some models what is computed: ``lengths.tolist()``,
``text[mask]``, ``if mask.all()``. A trace has no contents to read. So the model runs once with the
example inputs, and what it reads is noted down with the inputs that it comes from; the trace is
then made with these numbers, and holds for inputs of these contents.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from cachegraph.errors import TraceError
from cachegraph.spec import version_of

from .contents import Contents, digest
from .reach import is_symbolic
from .sizes import tensors_in

# What makes numbers of contents.
_CASTS: dict[str, Any] = {
    "item": lambda number: number,
    "__bool__": bool,
    "__int__": int,
    "__index__": int,
    "__float__": float,
    "__complex__": complex,
}
_NUMBERS = {
    *_CASTS,
    *("tolist", "numpy", "__array__", "__contains__", "equal", "allclose", "is_nonzero"),
}
_NUMBER = "a number"
# What makes tensors of positions or counts, as many as the contents say.
_SIZED = {"nonzero", "argwhere", "unique", "unique_consecutive", "bincount"}
_INDEXING = {"__getitem__", "__setitem__"}
_FACTORIES = {"arange", "linspace", "zeros", "ones", "empty", "full"}
_OWN = (str(Path(torch.__file__).parent), __file__)

Key = tuple[str, str, int]  # function, place, which call of it there


class ReadError(Exception):
    """A trace comes to a number that it would have to read."""


@dataclass(frozen=True)
class Read:
    """What was read.

    Attributes:
        value: numbers, an array, positions; of an index what stands for its masks.
        inputs: indices of the tensors among the inputs that it comes from.
    """

    value: Any
    inputs: frozenset[int]


@dataclass(frozen=True)
class _Ends:
    """Of a slice, with those that were tensors as numbers."""

    ends: tuple[Any, Any, Any]
    tensors: tuple[bool, ...]

    @classmethod
    def of(cls, part: slice) -> _Ends:
        ends = (part.start, part.stop, part.step)
        read = tuple(isinstance(at, Tensor) for at in ends)
        first, last, by = (int(at) if isinstance(at, Tensor) else at for at in ends)
        return cls((first, last, by), read)

    def read(self) -> list[int]:
        return [end for end, read in zip(self.ends, self.tensors, strict=True) if read]

    def slice(self) -> slice:
        return slice(*self.ends)


class Listening(TorchFunctionMode):
    """Stops a trace at the first number that it would have to read.

    What is picked by a mask passes: :func:`.masks.without_masks` may find a form for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed = ""  # where a mask has picked something

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function that reads nothing."""
        kind = _kind(func, args, kwargs or {})
        self.passed = self.passed or (_place() if kind else "")
        if kind and not (kind == "index" and _masks_only(args[1])) and any(map(is_symbolic, args)):
            raise ReadError(_place())
        return func(*args, **(kwargs or {}))


class Recording(TorchFunctionMode):
    """Notes down what an eager run reads, and which inputs it comes from.

    Args:
        inputs: the model's tensors.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.reads: dict[Key, Read] = {}
        self._calls: Counter[tuple[str, str]] = Counter()
        self._origins: dict[int, frozenset[int]] = {}  # memory -> inputs that it was made from
        for index, tensor in enumerate(inputs):
            self._origins[_memory(tensor)] = frozenset([index])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note what it reads."""
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        before = {id(t): version_of(t) for t in given}
        old = {_memory(t) for t in given}
        result = func(*args, **kwargs)
        if kind := _kind(func, args, kwargs):
            value, sources = _recorded(kind, args, kwargs, result)
            read = Read(value, self._origin(sources))
            self.reads[_key(_name(func), self._calls)] = read
            for one in _single_numbers(_name(func), value, result):
                self.reads[_key(_NUMBER, self._calls)] = Read(one, read.inputs)
        origin = self._origin(given)
        for tensor in tensors_in(result):
            memory = _memory(tensor)  # what is new there has nothing of what was there before
            kept = self._origins.get(memory, frozenset()) if memory in old else frozenset()
            self._origins[memory] = kept | origin
        for tensor in given:
            if version_of(tensor) != before[id(tensor)]:
                self._origins[_memory(tensor)] = origin
        return result

    def _origin(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        return found.union(*(self._origins.get(_memory(t), found) for t in tensors))


class Replaying(TorchFunctionMode):
    """Gives a trace the numbers that an eager run has read.

    Args:
        reads: what was recorded.
    """

    def __init__(self, reads: Mapping[Key, Read]) -> None:
        super().__init__()
        self._reads = reads
        self._calls: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function; of one that reads, give what was read."""
        kwargs = kwargs or {}
        if not (kind := _kind(func, args, kwargs)):
            return func(*args, **kwargs)
        key = _key(_name(func), self._calls)
        if key not in self._reads:
            raise TraceError(
                "the model reads another number while it is traced than in a plain call",
                found=f"{key[0]} at {key[1]}",
            )
        device = next(t.device for t in tensors_in((args, kwargs)))
        value = _pytree.tree_map_only(
            Tensor,
            lambda t: torch.tensor(t.tolist(), dtype=t.dtype, device=device),
            self._reads[key].value,
        )
        return _replayed(kind, func, args, kwargs, value)


@torch.no_grad()
def record(model: nn.Module, arguments: Mapping[str, Any]) -> dict[Key, Read]:
    """What a model reads from these arguments, by where it does so."""
    given = _pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), dict(arguments))
    with Recording(tensors_in(given)) as recording:
        model(**given)
    return recording.reads


def same_reads(one: Mapping[Key, Read], other: Mapping[Key, Read]) -> bool:
    """Whether two runs have read the same numbers in the same places."""
    values = [_pytree.tree_leaves([reads[key].value for key in reads]) for reads in (one, other)]
    return list(one) == list(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else bool(np.all(a == b))
        for a, b in zip(*values, strict=True)
    )


def contents_of(
    reads: Mapping[Key, Read], leaves: Sequence[Tensor], *, rows: bool
) -> tuple[Contents, ...]:
    """What inputs must hold for these numbers to be read.

    Args:
        reads: what was recorded.
        leaves: the model's tensors.
        rows: the batch may vary, so each row must hold what the first one does.
    """
    places: dict[int, str] = {}
    for (_, place, _), read in reads.items():
        for index in read.inputs:
            places.setdefault(index, place)
    batch = leaves[0].shape[0]
    found = []
    for index, place in sorted(places.items()):
        leaf = leaves[index]
        each = rows and leaf.ndim > 0 and leaf.shape[0] == batch
        found.append(Contents(index, each, digest(leaf[0] if each else leaf), place))
    return tuple(found)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return _NUMBER if name in _CASTS else name


def _single_numbers(name: str, value: Any, result: Any) -> list[Any]:
    """Numbers that a trace may read one by one where a run reads them together.

    A tensor without contents makes its list of them so, and torch.export takes an index apart.
    """
    if name == "tolist":
        return _pytree.tree_leaves(result)
    if name not in _INDEXING:
        return []
    return [at for part in value if isinstance(part, _Ends) for at in part.read()]


def _kind(func: Any, args: Any, kwargs: Any) -> str:
    """How a function reads contents; empty where it does not."""
    name = getattr(func, "__name__", "")
    if name in _NUMBERS:
        return "number"
    if name in _SIZED or (name == "where" and len(args) + len(kwargs) == 1):
        return "sized"
    if name in _INDEXING and any(_is_read(part) for part in _parts(args[1])):
        return "index"
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if isinstance(repeats, Tensor):
            return "repeat"
        return "sized" if repeats is None else ""
    if name == "masked_select":
        return "select"
    scalars = name in _FACTORIES and any(isinstance(a, Tensor) for a in args)
    return "scalars" if scalars else ""


def _parts(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) and part.ndim > 0


def _is_read(part: Any) -> bool:
    if isinstance(part, slice):
        return any(isinstance(at, Tensor) for at in (part.start, part.stop, part.step))
    return _is_mask(part)


def _masks_only(index: Any) -> bool:
    return not any(isinstance(part, slice) and _is_read(part) for part in _parts(index))


def _recorded(kind: str, args: Any, kwargs: Any, result: Any) -> tuple[Any, list[Tensor]]:
    """What is needed to give the same result again, and the tensors that decided it."""
    match kind:
        case "index":
            parts = [part for part in _parts(args[1]) if _is_read(part)]
            ends = [[p.start, p.stop, p.step] if isinstance(p, slice) else p for p in parts]
            return [_fixed(part) for part in parts], tensors_in(ends)
        case "repeat":
            repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
            size = args[0].shape[kwargs.get("dim", args[2] if len(args) > 2 else -1) or 0]
            each = repeats.cpu().expand(size) if repeats.numel() == 1 else repeats.cpu()
            return torch.repeat_interleave(each), [repeats]
        case "select":
            mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
            shape = torch.broadcast_shapes(args[0].shape, mask.shape)
            return list(mask.expand(shape).cpu().nonzero(as_tuple=True)), [mask]
        case "scalars":
            return [a.item() if isinstance(a, Tensor) else a for a in args], tensors_in(args)
    return _pytree.tree_map_only(Tensor, Tensor.cpu, copy.deepcopy(result)), tensors_in(
        (args, kwargs)
    )


def _fixed(part: Any) -> Any:
    if isinstance(part, slice):
        return _Ends.of(part)
    return list(part.cpu().nonzero(as_tuple=True))


def _replayed(kind: str, func: Any, args: Any, kwargs: Any, value: Any) -> Any:
    match kind:
        case "index":
            read, index = iter(value), []
            for part in _parts(args[1]):
                if not _is_read(part):
                    index.append(part)
                elif isinstance(part, slice):
                    index.append(next(read).slice())
                else:
                    index.extend(next(read))
            return func(args[0], tuple(index), *args[2:], **kwargs)
        case "repeat":
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            source = args[0].flatten() if dim is None else args[0]
            return source.index_select(0 if dim is None else dim, value)
        case "select":
            mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
            return torch.broadcast_tensors(args[0], mask)[0][tuple(value)]
        case "scalars":
            return func(*value, **kwargs)
    if kind == "number":
        return copy.deepcopy(_CASTS.get(func.__name__, lambda made: made)(value))
    return value


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _key(name: str, calls: Counter[tuple[str, str]]) -> Key:
    """Names a read by where it is, the same in a run and in a trace."""
    place = _place()
    calls[name, place] += 1
    return name, place, calls[name, place]


def _place() -> str:
    """The line of the model that is at work: ``model.py:12 in forward``."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
