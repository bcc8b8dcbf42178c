"""Schedules: what is computed at which step of the sampling loop, as YAML or a dict.

``schedules/README.md`` shows the format by example; the policies are in ``methods``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from cachegraph.config.problems import Problem, describe, one_of, refuse, to_schedule_error
from cachegraph.config.sections import Section
from cachegraph.config.yaml_lines import Source, read_yaml, write_yaml
from cachegraph.errors import ScheduleError, near, nearest
from cachegraph.methods import METHODS, UNCACHED
from cachegraph.methods.correction import GOCCorrection
from cachegraph.methods.method import PRESETS, Method

from .calibration import CalibrationData

FORMAT = 1  # the newest file format that can be read
MAX_STEPS = 100_000

if TYPE_CHECKING:
    Policy = Method
else:
    Policy = Annotated[Union[METHODS], Field(discriminator="method")]  # noqa: UP007

_NEAR = 4  # presets that are listed for a misspelt one


class SiteFilter(Section):
    """Which sites the policy rules; every other site is computed at every step.

    The kind ``stack`` makes a site of all blocks together or, with ranges such as ``blocks[2:26]``
    in ``include``, of each range. What is kept of it is what the blocks add to the stream, or with
    ``relative: false`` the stream behind them.
    """

    kinds: tuple[Literal["attn", "cross_attn", "mlp", "stack"], ...] = Field(
        default=("attn", "cross_attn", "mlp"),
        min_length=1,
        description="a list of attn, cross_attn, mlp, stack",
    )
    include: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("*",), min_length=1, description="a list of globs over the names of sites"
    )
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="a list of globs over the names of sites"
    )
    relative: bool | None = Field(
        default=None, description="true or false: whether of a stack what it adds is kept"
    )

    def problems(self, steps: int) -> Iterator[Problem]:
        """Kinds that are named twice, or a key for stacks without any."""
        if self.relative is not None and "stack" not in self.kinds:
            what = "'relative' without a stack"
            yield Problem(("relative",), what, "'kinds: [stack]', or no such key")
        for at, kind in enumerate(self.kinds):
            if kind in self.kinds[:at]:
                what = f"'kinds[{at}]' repeats an earlier one"
                yield Problem(("kinds", at), what, "each kind once", kind)


class Schedule(Section):
    """What is computed at which step of a trajectory.

    ``load_schedule`` makes one from a file, preset or dict and explains what is wrong with them;
    calling the class is for code, and raises pydantic's ValidationError.

    Attributes:
        cachegraph: version of the format.
        steps: model calls per trajectory and branch.
        policy: what is computed when.
        correction: what is done to reused values, or None.
        sites: which sites the policy rules.
        timesteps: the sampler's, one a step in the order of the calls, or None.
        order: whether timesteps fall or rise along a trajectory.
        max_variants: the most graphs the plan may need, or None for any number.
        calibration: what the schedule was made from, or None; it changes nothing.
    """

    cachegraph: int = Field(
        ge=1, le=FORMAT, description=f"{FORMAT}, the version of the schedule format"
    )
    steps: int = Field(
        ge=1,
        le=MAX_STEPS,
        description=f"a whole number from 1 to {MAX_STEPS}: model calls per trajectory",
    )
    policy: Policy = Field(description="a mapping with a method")
    sites: SiteFilter = Field(
        default=SiteFilter(), description="a mapping with any of kinds, include, exclude"
    )
    timesteps: tuple[FiniteFloat, ...] | None = Field(
        default=None, description="a list of numbers, one a step"
    )
    order: Literal["descending", "ascending"] = Field(
        default="descending", description="one of ascending, descending"
    )
    max_variants: int | None = Field(default=None, ge=1, description="a whole number, at least 1")
    correction: GOCCorrection | None = Field(default=None, description="a mapping with a method")
    calibration: CalibrationData | None = Field(
        default=None, description="a mapping with trajectories and errors"
    )

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        self._stands_in(Source())
        refuse(
            "Schedule",
            [
                *self._problems_of("policy"),
                *self._problems_of("correction"),
                *self._correction_problems(),
                *self._problems_of("sites"),
                *self._stack_problems(),
                *self._timestep_problems(),
                *self._problems_of("calibration"),
            ],
        )
        return self

    def _problems_of(self, key: str) -> Iterator[Problem]:
        """The problems of a section that is there."""
        section: Section | None = getattr(self, key)
        for one in section.problems(self.steps) if section is not None else ():
            yield replace(one, path=(key, *one.path))

    def _correction_problems(self) -> Iterator[Problem]:
        if self.correction is not None and not self.policy.correctable:
            able = ", ".join(sorted(one.name() for one in METHODS if one.correctable))
            yield Problem(
                ("correction",),
                f"a correction of the {self.policy.method} policy",
                f"a policy that reuses: {able}",
                self.policy.method,
            )

    def _stack_problems(self) -> Iterator[Problem]:
        if "stack" in self.sites.kinds and (self.policy.chooses_tokens or self.policy.skips_stack):
            what = f"a stack under the {self.policy.method} policy, which chooses tokens"
            at = self.sites.kinds.index("stack")
            yield Problem(("sites", "kinds", at), what, "a policy of whole sites", "stack")

    def _timestep_problems(self) -> Iterator[Problem]:
        times = self.timesteps
        if times is None:
            return
        if len(times) != self.steps:
            expected = f"{self.steps}, one a step"
            yield Problem(
                ("timesteps",), "wrong number of timesteps", expected, describe(len(times))
            )
        falling = self.order == "descending"
        for at, (before, here) in enumerate(pairwise(times), start=1):
            if not (here < before if falling else here > before):
                other = "ascending" if falling else "descending"
                turned = all((b > a) if falling else (b < a) for a, b in pairwise(times))
                bound = f"less than {before:.15g}" if falling else f"more than {before:.15g}"
                yield Problem(
                    ("timesteps", at),
                    f"'timesteps[{at}]' does not fit 'order: {self.order}'",
                    bound,
                    f"{here:.15g}",
                    f"did you mean 'order: {other}'?" if turned else "",
                )
                return

    def _stands_in(self, source: Source) -> None:
        """Say where the schedule is from, for errors that come later."""
        self._source = source
        self.policy._source = replace(source, within=("policy",))
        if self.correction is not None:
            self.correction._source = replace(source, within=("correction",))

    def fixed_by(self) -> str | None:
        """The section that is for this number of steps and no other; None where it scales."""
        if self.policy.fixes_steps:
            return f"the {self.policy.method} policy"
        if self.correction is not None:
            return f"the {self.correction.method} correction"
        return "'timesteps'" if self.timesteps is not None else None

    def for_steps(self, steps: int) -> Schedule:
        """The same with another number of steps.

        Raises:
            ScheduleError: a key does not fit so many steps.
        """
        contents = self.model_dump(exclude_none=True, exclude={"calibration"})
        return _build({**contents, "steps": steps}, self._source)

    def digest(self) -> str:
        """SHA-256 of what the schedule says; equal for equal schedules, wherever they stand."""
        text = json.dumps(self._contents(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The schedule as YAML, defaults written out; it loads as an equal schedule."""
        return write_yaml(self._contents())

    def _contents(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude_none=True)


def load_schedule(source: str | Path | Mapping[str, object] | Schedule) -> Schedule:
    """Reads and checks a schedule.

    Args:
        source: a file; or the name of a preset; or what would stand in the file, as a mapping; or
            a Schedule, which is returned as it is. A name is that of a file if it has a suffix or
            a separator or if such a file exists.

    Raises:
        ScheduleError: it cannot be read, or something in it is wrong. All misspelt, missing and
            ill-typed keys are reported at once, a line each; once there are none, all that does
            not fit together.
    """
    match source:
        case Schedule():
            return source
        case Mapping():
            return _build(_plain(source), Source())
        case str() | Path():
            return _build(*_read(_find(str(source))))
    raise ScheduleError(
        "not a schedule",
        expected="a path, a preset, a mapping or a Schedule",
        found=describe(source),
    )


def uncached(steps: int) -> Schedule:
    """The schedule that caches nothing."""
    return Schedule(cachegraph=FORMAT, steps=steps, policy=UNCACHED)


def presets() -> dict[str, Path]:
    """The schedules that come with cachegraph, by name and in the order of the names."""
    paths = {path.stem: path for path in PRESETS.glob("*.yaml")}
    return dict(sorted(paths.items()))


def _build(data: object, source: Source) -> Schedule:
    version = data.get("cachegraph") if isinstance(data, Mapping) else None
    if type(version) is int and version > FORMAT:  # its other keys may well be right
        raise ScheduleError(
            "written for a newer cachegraph",
            place=source.where(("cachegraph",)),
            expected=f"format {FORMAT}",
            found=f"format {version}",
            remedy="update cachegraph",
        )
    try:
        schedule = Schedule.model_validate(data)
    except ValidationError as error:
        raise to_schedule_error(error, Schedule, source) from None
    schedule._stands_in(source)
    return schedule


def _find(name: str) -> Path:
    if "\n" in name:
        raise ScheduleError(
            "the text of a schedule instead of its path", expected="a path, a preset or a mapping"
        )
    path, known = Path(name), presets()
    if path.suffix or "/" in name or "\\" in name or os.path.isfile(name):
        return path
    if name in known:
        return known[name]
    if name and os.path.isdir(name):
        return path  # reading it says that it is a folder
    alike = near(name, known)[:_NEAR]
    listed = f"a preset such as {', '.join(alike)}" if alike else one_of(known)
    raise ScheduleError(
        f"unknown preset {name!r}",
        expected=f"the path of a file or {listed}",
        remedy=nearest(name, known),
    )


def _read(path: Path) -> tuple[object, Source]:
    if not os.path.exists(path):  # unlike Path.exists, it takes any name
        beside = path.parent.glob("*.yaml") if os.path.isdir(path.parent) else ()
        remedy = nearest(str(path), [*map(str, beside), *presets()])
        raise ScheduleError("no such file", place=str(path), remedy=remedy)
    return read_yaml(path)


def _plain(value: object) -> object:
    """Mappings as dicts and lists as tuples, all the way down, as a file would give them."""
    match value:
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return tuple(_plain(item) for item in value)
    return value
