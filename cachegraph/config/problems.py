"""What is wrong with a schedule, in words for the person who wrote it.

Pydantic finds what is wrong with single keys; policies find the rest. Both become ``Problem``s
here, and the problems one ``ScheduleError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from cachegraph.errors import CachegraphError, ScheduleError, nearest

from .yaml_lines import KeyPath, Source, dotted

E = TypeVar("E", bound=CachegraphError)

MAX_SHOWN = 10  # problems in one message
MAX_COUNTED = 500  # a large file of anything else may have a million

_CUSTOM = "schedule_problem"
# Pydantic's name of an error: what is wrong, and what was expected of an item of a list; for a key
# of its own, its description says that.
_WORDS = {
    "int_type": ("has the wrong type", "a whole number"),
    "float_type": ("has the wrong type", "a number"),
    "string_type": ("has the wrong type", "text"),
    "tuple_type": ("has the wrong type", "a list"),
    "model_type": ("has the wrong type", "a mapping"),
    "model_attributes_type": ("has the wrong type", "a mapping"),
    "greater_than": ("is too small", ""),
    "greater_than_equal": ("is too small", ""),
    "less_than_equal": ("is too large", ""),
    "finite_number": ("is not finite", "a number"),
    "too_short": ("is empty", ""),
    "string_too_short": ("is empty", "text"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one place of a schedule.

    Attributes:
        path: the keys that lead to it, such as ``("policy", "rows", 3)``.
        what: what is wrong.
        expected: what would have been right.
        found: what is there.
        remedy: what to do about it.
    """

    path: KeyPath
    what: str
    expected: str = ""
    found: str = ""
    remedy: str = ""

    def error(self, kind: type[E], place: str) -> E:
        """The problem as an error of some kind."""
        parts = {"expected": self.expected, "found": self.found, "remedy": self.remedy}
        return kind(self.what, place=place, **parts)


def one_of(words: Iterable[str]) -> str:
    """``one of count, interval, method``; ``only method`` where there is no choice."""
    listed = sorted(words)
    return f"{'one of' if len(listed) > 1 else 'only'} {', '.join(listed)}"


def describe(value: object) -> str:
    """A value as a message shows it: ``text '3'``, ``2.5``, ``true``, ``a list of 4``."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"text {value[:60] + '...' if len(value) > 60 else value!r}"
        case int() | float():
            return f"{value!r}"
        case list() | tuple():
            return f"a list of {len(value)}"
        case Mapping():
            return "a mapping"
    return f"a value of type {type(value).__name__}"


def name_of(path: KeyPath) -> str:
    """The last key of ``path`` with its indices, quoted: ``'rows[3][5]'``."""
    start = max((at for at, key in enumerate(path) if isinstance(key, str)), default=0)
    return repr(dotted(path[start:])) if path else "the schedule"


def refuse(title: str, problems: Iterable[Problem]) -> None:
    """Raises pydantic's ValidationError with all ``problems``; does nothing without any.

    A validator may call it: pydantic adds these errors to those found elsewhere.
    """
    details = [
        InitErrorDetails(
            type=PydanticCustomError(
                _CUSTOM, "{what}; expected {expected}; found {found}", asdict(problem)
            ),
            loc=problem.path,
            input=None,
        )
        for problem in islice(problems, MAX_COUNTED)
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


def to_schedule_error(
    error: ValidationError, model: type[BaseModel], source: Source
) -> ScheduleError:
    """All problems of ``error`` as one ScheduleError, a line each, in the order of the file.

    Args:
        error: what pydantic found.
        model: the model that was to be filled.
        source: where the data came from.
    """
    every = error.errors(include_url=False)
    details = _without_consequences(every[:MAX_COUNTED])
    problems = [_translate(one, _locate(one["loc"], model)) for one in details]
    problems.sort(key=lambda problem: source.line(problem.path))  # stable
    errors = [one.error(ScheduleError, source.where(one.path)) for one in problems]
    if len(errors) == 1:
        return errors[0]
    lines = [str(one) for one in errors[:MAX_SHOWN]]
    if len(errors) > MAX_SHOWN:
        least = "at least " if len(every) >= MAX_COUNTED else ""
        lines.append(f"... and {least}{len(errors) - MAX_SHOWN} more")
    return ScheduleError("\n".join(lines))


@dataclass(frozen=True)
class _Spot:
    """A place in the model: the keys to it, and the section whose key it is.

    Attributes:
        path: keys without the tags that pydantic puts between them.
        section: the model that has (or lacks) the last key.
        title: the section in words.
        choices: the models by tag, where the value is a union of models.
    """

    path: KeyPath
    section: type[BaseModel]
    title: str
    choices: Mapping[str, type[BaseModel]]

    @property
    def key(self) -> str:
        return str(self.path[-1]) if self.path else ""

    @property
    def expected(self) -> str:
        """What the key's description asks for; empty for an item of a list."""
        info = self.section.model_fields.get(self.key)
        return (info.description or "") if info else ""


def _locate(loc: KeyPath, model: type[BaseModel]) -> _Spot:
    path: KeyPath = ()
    section, title = model, "the schedule"
    inner: type[BaseModel] | None = model  # the section that the next key is in
    inner_title = title
    choices: Mapping[str, type[BaseModel]] = {}
    for key in loc:
        if key in choices:  # a tag: no key of the schedule
            inner, inner_title, choices = choices[str(key)], f"{key} {path[-1]}", {}
            continue
        path = (*path, key)
        choices = {}
        if inner is not None:
            section, title = inner, inner_title
            info = section.model_fields.get(str(key))
            inner, choices = _inside(info) if info else (None, {})
            inner_title = str(key)
    return _Spot(path, section, title, choices)


def _inside(info: FieldInfo) -> tuple[type[BaseModel] | None, Mapping[str, type[BaseModel]]]:
    """The model that a key holds, or the models by tag where it is a union of them."""
    annotation = info.annotation
    models = [
        part
        for part in get_args(annotation) or (annotation,)
        if isinstance(part, type) and issubclass(part, BaseModel)
    ]
    if isinstance(info.discriminator, str):
        tag = info.discriminator
        return None, {get_args(one.model_fields[tag].annotation)[0]: one for one in models}
    return (models[0], {}) if models else (None, {})


def _without_consequences(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drops the missing key where a misspelt one stands for it."""
    unknown = [one["loc"] for one in details if one["type"] == "extra_forbidden"]
    return [
        one
        for one in details
        if one["type"] != "missing"
        or not any(
            loc[:-1] == one["loc"][:-1] and nearest(str(loc[-1]), [str(one["loc"][-1])])
            for loc in unknown
        )
    ]


def _translate(details: ErrorDetails, spot: _Spot) -> Problem:
    kind, value, path = details["type"], details["input"], spot.path
    if kind == _CUSTOM:
        return Problem(**{**details["ctx"], "path": path})
    if kind in ("missing", "extra_forbidden", "invalid_key"):
        return _wrong_key(kind, spot)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _wrong_tag(details, spot)
    name, found = name_of(path), describe(value)
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        if isinstance(value, str):
            near = nearest(value, words)
            return Problem(path, f"unknown word {value!r} for {name}", one_of(words), remedy=near)
        return Problem(path, f"{name} has the wrong type", one_of(words), found)
    if kind in _WORDS:
        what, expected = _WORDS[kind]
        return Problem(path, f"{name} {what}", spot.expected or expected, found)
    return Problem(path, f"{name}: {details['msg']}", spot.expected, found)


def _wrong_key(kind: str, spot: _Spot) -> Problem:
    key, known = spot.key, spot.section.model_fields
    if kind == "missing":
        return Problem(spot.path[:-1], f"missing key {key!r} in {spot.title}", spot.expected)
    if kind == "extra_forbidden":
        what = f"unknown key {key!r} in {spot.title}"
        return Problem(spot.path, what, one_of(known), remedy=nearest(key, known))
    return Problem(spot.path, f"a key of {spot.title} is not text", one_of(known), found=key)


def _wrong_tag(details: ErrorDetails, spot: _Spot) -> Problem:
    """A union of models whose tag (the policy's ``method``) is unknown, missing or misspelt."""
    tag_key = details["ctx"]["discriminator"].strip("'")
    given, known = details["input"], one_of(spot.choices)
    if tag_key in given:
        tag, path = given[tag_key], (*spot.path, tag_key)
        if not isinstance(tag, str):
            return Problem(path, f"{tag_key!r} has the wrong type", known, describe(tag))
        return Problem(path, f"unknown {tag_key} {tag!r}", known, remedy=nearest(tag, spot.choices))
    for key in given:
        if near := nearest(str(key), [tag_key]):
            what = f"unknown key {key!r} in {spot.key}"
            return Problem((*spot.path, key), what, repr(tag_key), remedy=near)
    return Problem(spot.path, f"missing key {tag_key!r} in {spot.key}", known)
