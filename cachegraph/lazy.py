"""Collections whose values are made when they are asked for, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

V = TypeVar("V")


class LazyMapping(Mapping[str, V]):
    """Names are known, values are made.

    Args:
        names: in order.
        make: makes the value of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], V]) -> None:
        self._names = dict.fromkeys(names)
        self._make = cache(make)

    def __getitem__(self, name: str) -> V:
        """The value of a name."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        """The names in order."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


class LazySequence(Sequence[V]):
    """The values of a mapping, in its order."""

    def __init__(self, values: Mapping[str, V]) -> None:
        self._values, self._names = values, tuple(values)

    def __getitem__(self, index: Any) -> Any:
        """One value, or some."""
        if isinstance(index, slice):
            return [self._values[name] for name in self._names[index]]
        return self._values[self._names[index]]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)
