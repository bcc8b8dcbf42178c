"""YAML that remembers on which line each key and item stands.

Plain words and numbers are read as YAML 1.2 says: ``on`` and ``no`` are text, ``1e-3`` is a
number and ``010`` is ten. Keys are text, a repeated key is an error, and there is one document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import yaml

from cachegraph.errors import ScheduleError

KeyPath = tuple[str | int, ...]  # ("policy", "rows", 3)

MAX_BYTES = 10 * 1024 * 1024
MAX_VALUES = 1_000_000  # aliases can unfold into far more values than the file has bytes

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Composes nodes; what a plain word means is decided by the rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the loader above would read as something else."""


_Loader.add_implicit_resolver(
    f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Source:
    """Where a schedule came from; it takes no part in comparing schedules.

    Attributes:
        file: path as the user gave it, or empty for a mapping.
        lines: line, from 1, of each key path in the file.
        within: the keys that lead to the section whose paths :meth:`where` takes.
    """

    file: str = field(default="", compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict, compare=False)
    within: KeyPath = field(default=(), compare=False)

    def line(self, path: KeyPath) -> int:
        """Line of ``path``, or of the innermost thing around it that the file has; 0: no file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def where(self, path: KeyPath) -> str:
        """``file:line`` of ``path``, or ``schedule: policy.rows[3]`` where there is no file."""
        path = (*self.within, *path)
        if self.file:
            return f"{self.file}:{max(self.line(path), 1)}"
        return f"schedule: {dotted(path)}" if path else "schedule"


def dotted(path: KeyPath) -> str:
    """``("policy", "rows", 3)`` as ``policy.rows[3]``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def read_yaml(path: Path) -> tuple[object, Source]:
    """Reads one YAML document: mappings as dicts, lists as tuples.

    Raises:
        ScheduleError: the file cannot be read, or is not one YAML document with unique text keys.
    """
    text = _read_text(path)
    try:
        nodes = list(islice(yaml.compose_all(text, Loader=_Loader), 2))
        if not nodes:
            raise ScheduleError(
                "the file is empty", place=f"{path}:1", expected="a mapping of keys to values"
            )
        if len(nodes) > 1:
            raise ScheduleError(
                "a second document begins here",
                place=f"{path}:{_line(nodes[1])}",
                expected="one YAML document in the file",
            )
        reader = _Reader(str(path))
        data = reader.value(nodes[0], ())
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from error
    except RecursionError as error:
        raise ScheduleError(
            "nested too deeply, or an alias that contains itself", place=str(path)
        ) from error
    return data, Source(str(path), reader.lines)


def write_yaml(data: Mapping[str, object]) -> str:
    """``data`` as YAML text in the given order, innermost lists and mappings on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=96)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ScheduleError("this is a folder", place=str(path), expected="a schedule file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file system can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ScheduleError(f"the file cannot be read: {reason}", place=str(path)) from error
    if len(raw) > MAX_BYTES:
        raise ScheduleError(
            "the file is too large for a schedule", place=str(path), expected="at most 10 MiB"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        found = f"byte 0x{raw[error.start]:02x}"
        raise ScheduleError(
            "the file is not UTF-8 text", place=f"{path}:{line}", found=found
        ) from error


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> ScheduleError:
    line, column, reason = 1, 1, "unreadable"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (line, column)
        reason = error.problem or error.context or reason
    elif isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        reason = error.reason
    return ScheduleError(
        f"not YAML at column {column}: {reason}",
        place=f"{path}:{line}",
        remedy="indent with spaces, not tabs" if "'\\t'" in reason else "",
    )


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Reader:
    """Turns composed nodes into plain values and notes their lines."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self._values = 0

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        self.lines.setdefault(path, _line(node))  # a key's line, noted before, stays
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES} values, aliases unfolded")
        match node:
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                return self._mapping(node, path)
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                items = enumerate(node.value)
                return tuple([self.value(item, (*path, index)) for index, item in items])
            case yaml.ScalarNode():
                return self._scalar(node)
        raise self._error(node, f"unknown tag {node.tag!r}")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "no word"
                raise self._error(key_node, "a key that is not text", "a word", f"{shown!s}")
            key_path = (*path, key)
            if key in found:
                first = self.lines[key_path]
                raise self._error(
                    key_node, f"duplicate key {key!r}", "each key once", f"it on line {first} too"
                )
            self.lines[key_path] = _line(key_node)
            found[key] = self.value(value_node, key_path)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        text: str = node.value
        tag = node.tag.removeprefix(_TAG)
        try:
            match tag:
                case "str":
                    return text
                case "null":
                    return None
                case "bool" if text.lower() in ("true", "false"):
                    return text.lower() == "true"
                case "int":
                    return int(text)
                case "float":
                    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except ValueError as error:
            raise self._error(node, f"cannot be read as {tag}", found=text[:60]) from error
        raise self._error(node, f"unknown tag {node.tag!r}")

    def _error(
        self, node: yaml.Node, what: str, expected: str = "", found: str = ""
    ) -> ScheduleError:
        return ScheduleError(
            what, place=f"{self.file}:{_line(node)}", expected=expected, found=found
        )
