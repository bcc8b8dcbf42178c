"""Plain values from the events of a YAML parser, and the lines that they stand on.

Nothing here recurses deeper than ``MAX_DEPTH``, and an alias costs as much as what it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from cachegraph.errors import ScheduleError

MAX_VALUES = 1_000_000  # aliases can unfold into far more values than the file has bytes
MAX_DEPTH = 200

# Line of a key or item, and the same for what is in it and does not stand on that line.
Lines = tuple[int, dict[str | int, Any]]

TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9]+")
_NULLS = {"~", "null", "Null", "NULL", ""}
_BOOLS = {"true", "True", "TRUE", "false", "False", "FALSE"}
# libyaml reads a megabyte in a fraction of a second, Python in several.
_QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class _Anchored:
    """What an alias stands for: a value, the lines in it, how many values it is."""

    value: object
    inside: dict[str | int, Any]
    count: int


def events(text: str, *, quick: bool = True) -> Iterator[yaml.Event]:
    """The events of all documents of a text.

    Args:
        text: of the file.
        quick: by libyaml where it is there, whose errors say less.

    Raises:
        YAMLError: it is not YAML.
    """
    return yaml.parse(text, Loader=_QUICK if quick else yaml.SafeLoader)


class Reader:
    """Reads one document after another as plain values: mappings as dicts, lists as tuples.

    Args:
        file: for errors.
        source: of the events.
    """

    def __init__(self, file: str, source: Iterator[yaml.Event]) -> None:
        self._file, self._events = file, source
        self._anchors: dict[str, _Anchored | None] = {}  # None: what is being read
        self._values = self._depth = 0

    def documents(self) -> Iterator[tuple[object, Lines]]:
        """Values and lines of each document.

        Raises:
            ScheduleError: a key that is no text or is there twice, a tag, too much of something.
            YAMLError: it is not YAML.
        """
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                self._anchors = {}
                root = next(self._events)
                line = _line(root)
                value, inside = self._value(root, line)
                yield value, (line, inside)

    def _value(self, event: Any, line: int) -> tuple[object, dict[str | int, Any]]:
        """A value whose line is noted, and the lines in it."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._values
        self._count(event, 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        inside: dict[str | int, Any] = {}
        value: object
        match event:
            case yaml.ScalarEvent():
                value = self._scalar(event)
            case yaml.SequenceStartEvent(tag=None | "!" | "tag:yaml.org,2002:seq"):
                value = self._sequence(line, inside)
            case yaml.MappingStartEvent(tag=None | "!" | "tag:yaml.org,2002:map"):
                value = self._mapping(line, inside)
            case _:
                raise self._error(event, f"unknown tag {event.tag!r}")
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchored(value, inside, self._values - before)
        return value, inside

    def _alias(self, event: Any) -> tuple[object, dict[str | int, Any]]:
        if event.anchor not in self._anchors:
            raise yaml.composer.ComposerError(
                None, None, f"found undefined alias {event.anchor!r}", event.start_mark
            )
        found = self._anchors[event.anchor]
        if found is None:
            raise self._too_deep()
        self._count(event, found.count)
        return found.value, found.inside

    def _sequence(self, line: int, inside: dict[str | int, Any]) -> tuple[object, ...]:
        self._enter()
        items: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            own = _line(event)
            value, lines = self._value(event, own)
            if own != line or lines:
                inside[len(items)] = own, lines
            items.append(value)
        self._depth -= 1
        return tuple(items)

    def _mapping(self, line: int, inside: dict[str | int, Any]) -> dict[str, object]:
        self._enter()
        found: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key, own = self._key(event), _line(event)
            if key in found:
                also = f"it on line {inside.get(key, (line,))[0]} too"
                raise self._error(event, f"duplicate key {key!r}", "each key once", also)
            found[key], lines = self._value(next(self._events), own)
            if own != line or lines:
                inside[key] = own, lines
        self._depth -= 1
        return found

    def _key(self, event: Any) -> str:
        scalar = isinstance(event, yaml.ScalarEvent)
        key = self._scalar(event) if scalar else None
        if not isinstance(key, str):
            shown = event.value if scalar else "no word"
            raise self._error(event, "a key that is not text", "a word", f"{shown!s}")
        if key == "<<" and event.implicit[0]:
            raise self._error(
                event,
                "merge keys ('<<') are no part of YAML 1.2",
                "each key written out; one value may stand for another by an alias (*name)",
            )
        return key

    def _scalar(self, event: Any) -> str | int | float | bool | None:
        text: str = event.value
        if event.tag in (None, "!"):
            tag = _kind(text) if event.implicit[0] else "str"
        else:
            tag = event.tag.removeprefix(TAG)
        try:
            match tag:
                case "str":
                    text.encode()
                    return text
                case "null":
                    return None
                case "bool" if text.lower() in ("true", "false"):
                    return text.lower() == "true"
                case "int":
                    return int(text)
                case "float":
                    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X}"
            raise self._error(event, "half of a character", "whole ones", found) from error
        except ValueError as error:
            raise self._error(event, f"cannot be read as {tag}", found=text[:60]) from error
        raise self._error(event, f"unknown tag {event.tag!r}")

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._too_deep()

    def _count(self, event: Any, values: int) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise self._error(event, f"more than {MAX_VALUES} values, aliases unfolded")

    def _too_deep(self) -> ScheduleError:
        return ScheduleError(
            "nested too deeply, or an alias that contains itself", place=self._file
        )

    def _error(self, event: Any, what: str, expected: str = "", found: str = "") -> ScheduleError:
        return ScheduleError(
            what, place=f"{self._file}:{_line(event)}", expected=expected, found=found
        )


def _kind(word: str) -> str:
    """What a plain word is by the rules of YAML 1.2."""
    if word in _NULLS:
        return "null"
    if word[0] in "-+.0123456789":
        if _INT.fullmatch(word):
            return "int"
        if FLOAT.match(word):
            return "float"
    return "bool" if word in _BOOLS else "str"


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
