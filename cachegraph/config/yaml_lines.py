"""YAML that remembers on which line each key and item stands.

Plain words and numbers are read as YAML 1.2 says: ``on`` and ``no`` are text, ``1e-3`` is a
number and ``010`` is ten. Keys are text, a repeated key is an error, and there is one document.
"""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import yaml

from cachegraph.downloads import mistaken
from cachegraph.errors import ScheduleError

from .yaml_values import FLOAT, TAG, Lines, Reader, events

KeyPath = tuple[str | int, ...]  # ("policy", "rows", 3)

MAX_BYTES = 10 * 1024 * 1024
_LONG = 100_000  # characters that Python's parser takes a moment for


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the loader above would read as something else."""


_Dumper.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Source:
    """Where a schedule came from; it takes no part in comparing schedules.

    Attributes:
        file: path as the user gave it, or empty for a mapping.
        lines: from 1, of the keys and items in the file.
        within: the keys that lead to the section whose paths :meth:`where` takes.
    """

    file: str = field(default="", compare=False)
    lines: Lines = field(default=(0, {}), compare=False)
    within: KeyPath = field(default=(), compare=False)

    def line(self, path: KeyPath) -> int:
        """Line of ``path``, or of the innermost thing around it that the file has; 0: no file."""
        line, inside = self.lines
        for key in path:
            if key not in inside:
                break
            line, inside = inside[key]
        return line

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
        documents = list(islice(Reader(str(path), events(text)).documents(), 2))
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from error
    if not documents:
        raise ScheduleError(
            "the file is empty", place=f"{path}:1", expected="a mapping of keys to values"
        )
    if len(documents) > 1:
        raise ScheduleError(
            "a second document begins here",
            place=f"{path}:{documents[1][1][0]}",
            expected="one YAML document in the file",
        )
    data, lines = documents[0]
    return data, Source(str(path), lines)


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
    instead, remedy = mistaken(path) if raw else ("", "")
    if instead:
        raise ScheduleError("the file holds no YAML", place=str(path), found=instead, remedy=remedy)
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
            "the file is not UTF-8 text",
            place=f"{path}:{line}",
            found=found,
            remedy="save it as UTF-8",
        ) from error


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> ScheduleError:
    if len(text) < _LONG:
        try:
            deque(events(text, quick=False), 0)  # says more of what is wrong
        except yaml.YAMLError as better:
            error = better
    line, column, reason, found = 1, 1, "unreadable", ""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (line, column)
        reason = error.problem or error.context or reason
    elif isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        reason, found = error.reason, f"U+{ord(text[error.position]):04X}"
    return ScheduleError(
        f"not YAML at column {column}: {reason}",
        place=f"{path}:{line}",
        found=found,
        remedy="indent with spaces, not tabs" if "'\\t'" in reason else _look_alikes(text, line),
    )


def _look_alikes(text: str, line: int) -> str:
    """What to type anew on a line, or the one before: what seems to be a space or a sign."""
    lines = text.split("\n")
    for number in range(line, max(line - 2, 0), -1):
        for character in "".join(lines[number - 1 : number]):
            odd = not character.isascii() and unicodedata.category(character)[0] in "ZCP"
            if odd and character != "\ufeff":
                name = unicodedata.name(character, "no letter")
                return f"line {number} holds U+{ord(character):04X} ({name}): type a plain one"
    return ""
