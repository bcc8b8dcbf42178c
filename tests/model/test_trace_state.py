"""What a model keeps between calls is after tracing as it was before, wherever it is kept."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cachegraph.errors import TraceError
from cachegraph.model.trace import trace
from tests import keeps

X, T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.25])
GLOBAL: dict[int, Tensor] = {}
CONTEXT: ContextVar[Any] = ContextVar("context", default=None)
LATEST: Tensor | None = None


@functools.lru_cache
def positions(count: int) -> Tensor:
    return torch.arange(float(count))


@functools.cache
def nested_positions(count: int) -> dict[str, list[Tensor]]:
    return {"all": [torch.arange(float(count))]}


class Memory:
    """A plain object."""

    last: Tensor | None = None
    calls = 0


class Slotted:
    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls = 0


class Frozen(OrderedDict[str, Any]):
    """Refuses to be written to, as configurations of diffusers do."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("frozen")

    def clear(self) -> None:
        raise TypeError("frozen")


class Base(nn.Module):
    shared: ClassVar[dict[int, Tensor]] = {}
    of_class: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def body(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * t.view(-1, 1, 1)
        return x + self.mlp(x)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t)


class Keeps(Base):
    """Answers every second call with what it answered before."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        super().__init__()
        self.read, self.write = read, write

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        calls, last = self.read() or (0, None)
        if last is None or calls % 2:
            last = self.body(x, t)
        self.write((calls + 1, last))
        return last


def in_an_object(of: Any) -> Base:
    memory = of()

    def write(value: Any) -> None:
        memory.calls, memory.last = value

    model = Keeps(lambda: (memory.calls, getattr(memory, "last", None)), write)
    model.memory = memory
    return model


def in_a_list() -> Base:
    found: list[Any] = []
    return Keeps(lambda: found[-1] if found else None, found.append)


def in_a_deque() -> Base:
    found: deque[Any] = deque(maxlen=2)
    return Keeps(lambda: found[-1] if found else None, found.append)


def in_a_variable() -> Base:
    found = None

    def write(value: Any) -> None:
        nonlocal found
        found = value

    return Keeps(lambda: found, write)


def in_an_unset_variable() -> Base:
    def write(value: Any) -> None:
        nonlocal found
        found = value

    def read() -> Any:
        try:
            return found
        except NameError:
            return None

    if False:
        found = None
    return Keeps(read, write)


def in_a_default() -> Base:
    def read(found: dict[str, Any] = {}) -> Any:  # noqa: B006 - that is the case
        return found

    return Keeps(lambda: read().get("last"), lambda value: read().update(last=value))


def in_a_partial() -> Base:
    def write(found: dict[str, Any], value: Any) -> None:
        found["last"] = value

    found: dict[str, Any] = {}
    return Keeps(functools.partial(found.get, "last"), functools.partial(write, found))


def in_a_frozen_dict() -> Base:
    found = Frozen()
    return Keeps(
        lambda: found.get("last"),
        lambda value: OrderedDict.__setitem__(found, "last", value),
    )


def on_a_function() -> Base:
    def write(value: Any) -> None:
        write.last = value  # type: ignore[attr-defined]

    return Keeps(lambda: getattr(write, "last", None), write)


def in_a_namespace() -> Base:
    found = SimpleNamespace(last=None)
    return Keeps(lambda: found.last, lambda value: setattr(found, "last", value))


class WithHook(Base):
    """Hooks that keep the last output of a layer and give it again, as caching hooks do."""

    def __init__(self) -> None:
        super().__init__()
        memory = Memory()

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            memory.calls += 1
            if memory.last is None or memory.calls % 2:
                memory.last = output
            return memory.last

        self.mlp[0].register_forward_hook(hook)


class WithForwardReplaced(Base):
    def __init__(self) -> None:
        super().__init__()
        plain, memory = self.mlp.forward, Memory()

        def forward(x: Tensor) -> Tensor:
            if memory.last is None:
                memory.last = plain(x)
            return memory.last

        self.mlp.forward = forward


def in_a_thread() -> Base:
    found = threading.local()
    return Keeps(lambda: getattr(found, "last", None), lambda value: setattr(found, "last", value))


def in_a_context() -> Base:
    return Keeps(lambda: CONTEXT.get(), CONTEXT.set)


def in_code_made_by_hand() -> Base:
    space: dict[str, Any] = {}
    lines = "def write(value):", "  global last", "  last = value"
    exec("\n".join(["last = None", "def read(): return last", *lines]), space)
    return Keeps(space["read"], space["write"])


class InWeakKeys(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.mlp not in self.kept:
            self.kept[self.mlp] = 0 * x + 2
        return self.body(x * self.kept[self.mlp], t)


class InAnotherModule(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x + keeps.table(4) * keeps.positions(4), t)


class InAnArray(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = np.zeros(1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x * float(self.calls[0]), t)


class InGlobals(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        global LATEST
        if 4 not in GLOBAL:
            GLOBAL[4] = torch.arange(4.0)
            LATEST = GLOBAL[4] + 1
        assert LATEST is not None
        return self.body(x + GLOBAL[4] * LATEST, t)


class InTheClass(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if 4 not in self.shared:
            self.shared[4] = torch.arange(4.0)
            type(self).of_class = self.shared[4] + 1
            type(self).later = self.shared[4]
        return self.body(x + self.shared[4] * type(self).of_class, t)


class Memoised(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x + positions(4) + nested_positions(4)["all"][0], t)


class MemoisedMethod(Base):
    """Each model has values of its own in one cache."""

    @functools.lru_cache  # noqa: B019 - that is the case
    def positions(self, count: int) -> Tensor:
        return torch.arange(float(count))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x + self.positions(4), t)


MODELS: dict[str, Callable[[], Base]] = {
    "object": lambda: in_an_object(Memory),
    "object with slots": lambda: in_an_object(Slotted),
    "list": in_a_list,
    "deque": in_a_deque,
    "variable": in_a_variable,
    "unset variable": in_an_unset_variable,
    "default": in_a_default,
    "partial": in_a_partial,
    "frozen dict": in_a_frozen_dict,
    "function": on_a_function,
    "namespace": in_a_namespace,
    "hook": WithHook,
    "forward replaced": WithForwardReplaced,
    "thread": in_a_thread,
    "context": in_a_context,
    "code made by hand": in_code_made_by_hand,
    "weak keys": InWeakKeys,
    "another module": InAnotherModule,
    "array": InAnArray,
    "globals": InGlobals,
    "class": InTheClass,
    "memoised": Memoised,
    "memoised method": MemoisedMethod,
}


def fresh(name: str) -> Base:
    GLOBAL.clear()
    keeps.TABLES.clear()
    keeps.positions.cache_clear()
    CONTEXT.set(None)
    InTheClass.shared.clear()
    positions.cache_clear()
    nested_positions.cache_clear()
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "calls_before"),
    # From the first call on, these two answer with what a hook kept, which is no site.
    [(n, c) for n in MODELS for c in (0, 3) if not c or n not in ("hook", "forward replaced")],
)
def test_model_goes_on_like_an_untouched_twin(name: str, calls_before: int) -> None:
    inputs = [(X + i, T) for i in range(5)]
    twin = fresh(name)
    wanted = [twin(*one) for one in inputs]
    model = fresh(name)
    found = [model(*one) for one in inputs[:calls_before]]
    trace(model, inputs[0])
    found += [model(*one) for one in inputs[calls_before:]]
    assert [type(one) for one in found] == [Tensor] * 5
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_a_memoised_function_keeps_of_before_stays() -> None:
    fresh("memoised")
    kept = positions(4)
    trace(Base().eval(), (X, T))
    assert positions(4) is kept


def test_state_of_others_is_left_alone() -> None:
    """A Python module may be at work while a model of it is traced."""
    model = Keeps(lambda: None, lambda value: GLOBAL.update({-1: T})).eval()
    GLOBAL.clear()
    trace(model, (X, T))
    assert GLOBAL == {-1: T}
    GLOBAL.clear()


def test_state_that_cannot_be_put_back_is_refused() -> None:
    class Generator(Base):
        def __init__(self) -> None:
            super().__init__()

            def remember() -> Any:
                last = None
                while True:
                    given = yield last
                    last = given if last is None else last

            self.memory = remember()
            next(self.memory)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            kept = self.memory.send(self.body(x, t))
            return kept if kept is not None else x

    with pytest.raises(TraceError, match="Generator keeps values between calls in a generator"):
        trace(Generator().eval(), (X, T))
