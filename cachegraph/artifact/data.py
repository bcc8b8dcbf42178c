"""Frozen dataclasses as plain data and back, strictly: what a file says is checked field by field.

The types are those of the annotations. A dataclass that is one of several in a union says which
under ``is``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from cachegraph.spec import TensorSpec

_TAG = "is"
_PLAIN = (bool, int, float, str, NoneType)


class DataError(ValueError):
    """Data that does not fit a type.

    Args:
        path: the keys that lead to it.
        expected: what would have been right.
        found: what is there.
    """

    def __init__(self, path: str, expected: str, found: object) -> None:
        text = repr(found)
        self.path, self.expected = path.removeprefix("."), expected
        self.found = text if len(text) <= 60 else text[:57] + "..."
        super().__init__(f"{self.path}: expected {expected}, found {self.found}")


def to_data(value: Any, kind: Any) -> Any:
    """Dicts, lists, texts and numbers that say the same.

    Args:
        value: of the type ``kind``.
        kind: a dataclass, or what may stand in an annotation of one.
    """
    if isinstance(value, TensorSpec):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        members = _members(kind)
        tag = {_TAG: _word(type(value))} if len(members) > 1 else {}
        hints = _hints(type(value))
        return tag | {f.name: to_data(getattr(value, f.name), hints[f.name]) for f in fields(value)}
    inner = get_args(kind)
    if isinstance(value, Mapping):
        return {key: to_data(item, inner[1] if inner else Any) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        kinds = _item_kinds(kind, len(value))
        return [to_data(item, one) for item, one in zip(value, kinds, strict=True)]
    return value


def from_data(data: Any, kind: Any, path: str = "") -> Any:
    """The inverse of :func:`to_data`.

    Raises:
        DataError: the data is not of the type; unknown and missing keys are told by name.
    """
    if kind is Any:
        return _plain(data, path)
    if kind in _READERS:
        return _READERS[kind](data, path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        words = [one.value for one in kind]
        if data not in words:
            raise DataError(path, f"one of {', '.join(map(str, words))}", data)
        return kind(data)
    if is_dataclass(kind):
        return _dataclass(data, kind, path)
    match get_origin(kind):
        case origin if origin in (Union, UnionType):
            return _union(data, kind, path)
        case origin if origin in (tuple, frozenset):
            if not isinstance(data, list):
                raise DataError(path, "a list", data)
            kinds = _item_kinds(kind, len(data))
            if len(kinds) != len(data):
                raise DataError(path, f"a list of {len(kinds)}", data)
            pairs = enumerate(zip(data, kinds, strict=True))
            return origin(from_data(d, k, f"{path}[{i}]") for i, (d, k) in pairs)
    return _mapping(data, get_args(kind)[1], path)


def _dataclass(data: Any, kind: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise DataError(path, f"a mapping for a {kind.__name__}", data)
    hints = _hints(kind)
    for key in hints.keys() - data.keys():
        raise DataError(f"{path}.{key}", "this key", None)
    for key in data.keys() - hints.keys():
        raise DataError(f"{path}.{key}", "no such key", data[key])
    return kind(**{key: from_data(data[key], hints[key], f"{path}.{key}") for key in hints})


def _union(data: Any, kind: Any, path: str) -> Any:
    if data is None and NoneType in get_args(kind):
        return None
    members = _members(kind)
    if len(members) == 1:
        return from_data(data, members[0], path)
    by_word = {_word(one): one for one in members}
    tag = data.get(_TAG) if isinstance(data, dict) else None
    if tag not in by_word:
        raise DataError(path, f"a mapping with {_TAG!r}: one of {', '.join(by_word)}", data)
    return _dataclass({k: v for k, v in data.items() if k != _TAG}, by_word[tag], path)


def _mapping(data: Any, kind: Any, path: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataError(path, "a mapping", data)
    return {key: from_data(item, kind, f"{path}.{key}") for key, item in data.items()}


def _plain(data: Any, path: str) -> Any:
    if not isinstance(data, (*_PLAIN, list, dict)):
        raise DataError(path, "plain data", data)
    return data


def _spec(data: Any, path: str) -> TensorSpec:
    try:
        return TensorSpec.parse(data)
    except (ValueError, TypeError):
        raise DataError(path, "a spec such as f32[2, 16]", data) from None


def _number(data: Any, path: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
        raise DataError(path, "a finite number", data)
    return float(data)


def _exactly(kind: type, words: str) -> Callable[[Any, str], Any]:
    def read(data: Any, path: str) -> Any:
        if type(data) is not kind:
            raise DataError(path, words, data)
        return data

    return read


_READERS: dict[Any, Callable[[Any, str], Any]] = {
    TensorSpec: _spec,
    float: _number,
    int: _exactly(int, "a whole number"),
    bool: _exactly(bool, "true or false"),
    str: _exactly(str, "text"),
}


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(kind)


def _members(kind: Any) -> tuple[Any, ...]:
    """What a value of a union may be, but None."""
    if get_origin(kind) not in (Union, UnionType):
        return (kind,)
    return tuple(one for one in get_args(kind) if one is not NoneType)


def _item_kinds(kind: Any, count: int) -> tuple[Any, ...]:
    inner = get_args(_members(kind)[0])
    if not inner:
        return (Any,) * count
    return (inner[0],) * count if len(inner) == 1 or inner[1] is ... else inner


def _word(kind: type) -> str:
    return kind.__name__.lower()
