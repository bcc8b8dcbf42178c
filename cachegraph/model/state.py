"""Put a model back as it was: what it keeps between calls, wherever it keeps it.

``torch.export`` runs ``forward`` on tensors without data. A model that remembers something between
calls (a position cache, the state of a hook, a memoised function) remembers those, and its next
call returns one. So everything mutable that can be reached from the model is noted down before and
put back afterwards: attributes, containers, variables of closures, attributes of its classes. Of
the Python modules that it is written in, only what holds tensors of the trace is put back: others
may be at work there. Memoised functions that hold some are emptied.

A function reaches what its code names, and not all that lies in its Python module: most of a
process can be reached from some variable or other.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
import sysconfig
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachegraph.errors import TraceError
from cachegraph.spec import version_of

from .reach import CACHE, PLAIN, holds_symbols, is_foreign, named

_OWN = {__name__.partition(".")[0]}
_INSTALLED = f"{sysconfig.get_path('purelib')}/"
_HOLDERS = {"types", "collections", "weakref", "queue"}  # of these, what has attributes
_NOTHING = object()
# What has no state of its own -> what it is made of.
_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    tuple: tuple,
    frozenset: tuple,
    types.MethodType: lambda found: (found.__self__, found.__func__),
    types.BuiltinFunctionType: lambda found: (),
    threading.local: lambda found: (vars(found),),
    staticmethod: lambda found: (found.__func__,),
    classmethod: lambda found: (found.__func__,),
    property: lambda found: (found.fget, found.fset),
    functools.partial: lambda found: (found.func, found.args, found.keywords, vars(found)),
    CACHE: lambda found: (found.__wrapped__,),
    Tensor: lambda found: (vars(found),) if type(found) in (Tensor, nn.Parameter) else (),
    nn.Module: lambda found: (vars(found), type(found)),
}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put back whatever calls of a model in this context change.

    Returns:
        What does so at once, for calls that must not see what others left.

    Raises:
        TraceError: tensors of the trace stay in something that cannot be put back.
    """
    notes = _Notes()
    notes.walk(model)
    calls = {cache: cache.cache_info().misses for cache in notes.memoised()}
    held_before = {id(held) for held in notes.opaque if holds_symbols(held)}  # another trace's
    imported = set(sys.modules)

    def restore() -> None:
        notes.restore()
        for cache, misses in calls.items():
            if cache.cache_info().misses != misses and holds_symbols(cache):
                cache.cache_clear()
                calls[cache] = 0
        _forget(sys.modules.keys() - imported)

    with _random_numbers(model):
        try:
            yield restore
        finally:
            restore()
    for held in notes.opaque:
        if id(held) not in held_before and holds_symbols(held):
            raise TraceError(
                f"{type(model).__name__} keeps values between calls in a {type(held).__name__}, "
                "which now holds tensors without data",
                expected="state in attributes, containers, closures or functools.cache",
                remedy="build the model anew, and compile it without that state",
            )


@contextmanager
def _random_numbers(model: nn.Module) -> Iterator[None]:
    """Let random numbers go on afterwards where they were."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
        yield
    random.setstate(python)
    np.random.set_state(arrays)


def _forget(names: Iterable[str]) -> None:
    """Python modules that were imported meanwhile and hold tensors of a trace are so anew."""
    for name in names:
        module = sys.modules[name]
        if not is_foreign(name) and holds_symbols(module):
            del sys.modules[name]
            parent, _, leaf = name.rpartition(".")
            if getattr(sys.modules.get(parent), leaf, None) is module:
                delattr(sys.modules[parent], leaf)


@dataclass(frozen=True)
class _Written:
    """What a tensor or an array held; a parameter may be given other memory, but not written to."""

    holder: Any
    memory: Any
    version: int
    copy: Any

    @classmethod
    def of(cls, found: Any) -> _Written:
        if not isinstance(found, Tensor):
            return cls(found, found, 0, found.copy())
        kept = isinstance(found, nn.Parameter) or found.is_meta
        memory = found.detach()
        return cls(found, memory, version_of(found), None if kept else memory.clone())

    def restore(self) -> None:
        if isinstance(self.holder, Tensor):
            if self.holder.data_ptr() != self.memory.data_ptr():
                self.holder.data = self.memory
            if self.copy is not None and version_of(self.holder) != self.version:
                with torch.no_grad():
                    self.memory.copy_(self.copy)
        elif not np.array_equal(self.holder, self.copy):
            self.holder[...] = self.copy


@dataclass(frozen=True)
class _Note:
    """How one mutable object was, and whether the model alone has it."""

    holder: Any
    own: bool
    before: Any
    now: Callable[[], Any]
    write: Callable[[Any], None]

    def restore(self) -> None:
        now = self.now()
        same = len(now) == len(self.before) and all(map(is_, now, self.before))
        if not same and (self.own or holds_symbols(self.holder)):
            self.write(self.before)


class _Notes:
    """What all mutable objects held that can be reached from a model."""

    def __init__(self) -> None:
        self.opaque: list[Any] = []  # objects of the model that nobody can look into
        self._notes: list[_Note | _Written] = []
        self._near: set[str] = set()  # packages that the model is written in
        self._spaces: set[str] = set()  # Python modules whose variables are noted down
        self._seen: dict[int, Any] = {}  # the objects are kept alive, so that no id is used twice
        self._shared: list[Any] = []  # Python modules' variables

    def walk(self, model: nn.Module) -> None:
        """Note down everything; what belongs to the model alone comes first."""
        self._near = {type(one).__module__.partition(".")[0] for one in model.modules()} - _OWN
        for name in list(sys.modules):  # a forward may import
            if name.partition(".")[0] in self._near and not is_foreign(name):
                self._namespace(name)
        for own, found in ((True, [model]), (False, self._shared)):
            while found:
                one = found.pop()
                if not isinstance(one, PLAIN) and id(one) not in self._seen:
                    self._seen[id(one)] = one
                    found.extend(self._look_into(one, own))

    def restore(self) -> None:
        """Put everything back."""
        for note in self._notes:
            note.restore()

    def memoised(self) -> list[Any]:
        """The memoised functions among what can be reached, torch's own left out."""
        found = (one for one in self._seen.values() if type(one) is CACHE)
        return [one for one in found if not is_foreign(getattr(one, "__module__", None))]

    def _look_into(self, found: Any, own: bool) -> Iterable[Any]:
        """Note one object down; what it holds."""
        if isinstance(found, dict | list | deque | set):
            return [*self._container(found, own), *self._attributes(found, own)]
        if isinstance(found, types.FunctionType):
            return self._function(found)
        if isinstance(found, types.CellType):
            return self._cell(found, own)
        if isinstance(found, type):
            return self._class(found, own)
        if own and (isinstance(found, np.ndarray) or type(found) in (Tensor, nn.Parameter)):
            self._notes.append(_Written.of(found))
        if isinstance(found, torch.Generator):
            return self._generator(found, own)
        if isinstance(found, types.ModuleType):
            return self._module(found)
        for kind, parts in _PARTS.items():
            if isinstance(found, kind):
                return parts(found)
        return self._object(found, own)

    def _module(self, found: types.ModuleType) -> Iterable[Any]:
        """A Python module of the model's, or of anybody who installs nothing."""
        name = found.__name__
        file = getattr(found, "__file__", None) or _INSTALLED
        package = name.partition(".")[0]
        if package in self._near or not (package in _OWN or file.startswith(_INSTALLED)):
            self._namespace(name)
            held = vars(found).values()  # nobody knows by which names it is asked
            self._shared.extend(v for v in held if not isinstance(v, types.ModuleType))
        return ()

    def _generator(self, found: torch.Generator, own: bool) -> list[Any]:
        def write(before: list[Any]) -> None:
            found.set_state(before[0])

        return self._note(found, own, lambda: [found.get_state()], write)

    def _object(self, found: Any, own: bool) -> Iterable[Any]:
        origin = type(found).__module__
        if not is_foreign(origin) or origin in _HOLDERS:
            return [*self._attributes(found, own), type(found)]
        if own and gc.is_tracked(found):
            self.opaque.append(found)
        return ()

    def _container(self, found: Any, own: bool) -> list[Any]:
        # The kind's own methods: a subclass may forbid writing, or do more than that.
        kind: Any = next(k for k in (OrderedDict, dict, list, deque, set) if isinstance(found, k))

        def now() -> list[Any]:
            return (
                _flat(kind.items(found)) if issubclass(kind, dict) else list(kind.__iter__(found))
            )

        def write(before: list[Any]) -> None:
            kind.clear(found)
            if issubclass(kind, dict):
                for key, value in zip(before[::2], before[1::2], strict=True):
                    kind.__setitem__(found, key, value)
            else:
                (set.update if kind is set else kind.extend)(found, before)

        return self._note(found, own, now, write)

    def _attributes(self, found: Any, own: bool) -> list[Any]:
        """Attributes of an object, in its ``__dict__`` and in slots."""
        names = [
            name
            for cls in type(found).__mro__
            for name, slot in vars(cls).items()
            if type(slot) is types.MemberDescriptorType and not is_foreign(cls.__module__)
        ]

        def now() -> list[Any]:
            return [getattr(found, name, _NOTHING) for name in names]

        def write(before: list[Any]) -> None:
            for name, old, new in zip(names, before, now(), strict=True):
                if old is not _NOTHING:
                    object.__setattr__(found, name, old)
                elif new is not _NOTHING:
                    object.__delattr__(found, name)

        slots = self._note(found, own, now, write) if names else []
        return [vars(found), *slots] if hasattr(found, "__dict__") else slots

    def _function(self, found: types.FunctionType) -> Iterable[Any]:
        if is_foreign(found.__module__ or ""):
            return ()
        space = found.__globals__  # of a decorator's, if that is what was left
        if not is_foreign(name := space.get("__name__", "")):
            if name in sys.modules:
                self._namespace(name)
            elif id(space) not in self._seen:  # of code that was made by hand
                self._seen[id(space)] = space
                self._container(space, own=False)
            self._shared.extend(named(found))
        return found.__dict__, found.__defaults__, found.__kwdefaults__, found.__closure__

    def _cell(self, found: types.CellType, own: bool) -> list[Any]:
        def now() -> list[Any]:
            try:
                return [found.cell_contents]
            except ValueError:
                return []  # no value yet

        def write(before: list[Any]) -> None:
            if before:
                found.cell_contents = before[0]
            else:
                del found.cell_contents

        return self._note(found, own, now, write)

    def _class(self, found: type, own: bool) -> Iterable[Any]:
        """Attributes of a class of the model's own, such as a cache that its instances share."""
        if is_foreign(found.__module__):
            return ()
        self._namespace(found.__module__)
        return [*self._variables(found, own), *found.__bases__]

    def _namespace(self, name: str) -> None:
        """Note down a Python module's variables, not what they hold."""
        module = None if is_foreign(name) else sys.modules.get(name)
        if module is not None and name not in self._spaces:
            self._spaces.add(name)
            self._variables(module, own=False)

    def _variables(self, owner: Any, own: bool) -> list[Any]:
        def now() -> list[Any]:
            return _flat((k, v) for k, v in vars(owner).items() if not k.startswith("__"))

        def write(before: list[Any]) -> None:
            old = dict(zip(before[::2], before[1::2], strict=True))
            new = dict(zip(*[iter(now())] * 2, strict=True))
            for name in new.keys() - old.keys():
                if own or holds_symbols([new[name]]):
                    delattr(owner, name)
            for name, value in old.items():
                if new.get(name, _NOTHING) is not value:
                    setattr(owner, name, value)

        return self._note(owner, own, now, write)

    def _note(
        self,
        holder: Any,
        own: bool,
        now: Callable[[], list[Any]],
        write: Callable[[list[Any]], None],
    ) -> list[Any]:
        before = now()
        self._notes.append(_Note(holder, own, before, now, write))
        return before


def _flat(items: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [part for item in items for part in item]
