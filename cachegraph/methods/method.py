"""What a caching method is: the keys of a schedule's policy, and the rows that follow from them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self, TypeVar, get_args

from cachegraph.config.sections import Section
from cachegraph.errors import ScheduleError
from cachegraph.model.site import Site
from cachegraph.plan.action import Compute, Reuse, Row
from cachegraph.plan.selection import Selection

PRESETS = Path(__file__).parents[1] / "schedules"
EXAMPLE_STEPS = 7
NOTHING_YET = "nothing has been computed yet"

T = TypeVar("T")
Decisions = Sequence[Sequence[bool]]  # [step][site]: True where the site is computed


class Ruled(tuple[Site, ...]):
    """The sites that a method rules, in execution order; all others are computed at every step.

    Attributes:
        model: every site of the model.
        place: where the sites are chosen, for errors.
    """

    model: tuple[Site, ...]
    place: str

    def __new__(cls, model: Sequence[Site], names: Collection[str], place: str = "") -> Self:
        """The sites of the model that have one of the names."""
        made = super().__new__(cls, (site for site in model if site.name in names))
        made.model, made.place = tuple(model), place
        return made

    def pick(self, row: Iterable[T]) -> list[T]:
        """Of a row for every site of the model, what is there for the ruled ones."""
        names = {site.name for site in self}
        pairs = zip(row, self.model, strict=True)
        return [item for item, site in pairs if site.name in names]


class Method(Section):
    """What is computed when. A subclass has its keys as fields, ``method`` among them.

    Attributes:
        correctable: a correction may follow, as the method reuses values as they are.
        by_block: GOC's published code corrects attn and mlp of a block together on it, or neither.
        skips_stack: it may reuse what all blocks hand out together, so it rules the ``stack`` too.
        chooses_tokens: it recomputes some tokens of a site.
        fixes_steps: it says step by step what to do, so it is for one number of steps only.
        file_keys: the keys that name a file.
        example: keys that make a schedule of ``EXAMPLE_STEPS`` steps, for tests.
    """

    correctable: ClassVar[bool] = False
    by_block: ClassVar[bool] = False
    skips_stack: ClassVar[bool] = False
    chooses_tokens: ClassVar[bool] = False
    fixes_steps: ClassVar[bool] = False
    file_keys: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[Mapping[str, object]] = {}

    method: str

    @classmethod
    def name(cls) -> str:
        """What ``method`` says in a schedule."""
        word: str = get_args(cls.model_fields["method"].annotation)[0]
        return word

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What every step does at the ruled sites.

        Args:
            steps: of a trajectory.
            sites: the ruled ones, an action each in a row.

        Raises:
            PlanError: the keys do not fit the model.
            InputError: a file cannot be used.
        """
        raise NotImplementedError

    def make_selection(self, sites: Ruled) -> Selection | None:
        """How tokens are chosen; None where none are.

        Raises:
            PlanError: the choice does not fit the model.
        """
        return None

    def files(self) -> dict[str, Path]:
        """The files that the method reads, by the keys that name them.

        Raises:
            ScheduleError: one is not there.
        """
        return {key: self.find(key) for key in self.file_keys if getattr(self, key) is not None}

    def find(self, key: str) -> Path:
        """The file that a key names: beside the schedule, else in the current folder.

        Raises:
            ScheduleError: no such file.
        """
        name, file = getattr(self, key), self._source.file
        beside = Path(file).parent if file else Path()
        places = [beside / name, Path(name)]  # an absolute path stays what it is
        for place in places:
            if os.path.isfile(place):  # unlike Path.is_file, it takes any name
                return place
        if beside.resolve() == PRESETS.resolve():
            raise ScheduleError(
                f"the {self.method} policy reads {name!r}, which presets come without",
                place=self.where(key),
                expected="that file in the current folder",
                remedy=f"the preset says: {_whence(Path(file))}",
            )
        raise ScheduleError(
            f"no file {name!r}",
            place=self.where(key),
            expected=" or ".join(dict.fromkeys(map(str, places))),
            remedy="put the published file there, or give its path",
        )


def _whence(preset: Path) -> str:
    """What the comment on top of a preset says of the repository of its file."""
    lines = preset.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    sentences = re.split(r"\.(?:\s|$)", comment)
    return next((s for s in sentences if re.search(r"(in|with) \S+ of [\w-]+/\w", s)), comment)


def resolve(decisions: Decisions) -> tuple[Row, ...]:
    """Rows that reuse, wherever a site is not computed, the newest value that was."""
    newest: dict[int, int] = {}
    rows = []
    for step, row in enumerate(decisions):
        newest.update({i: step for i, computed in enumerate(row) if computed})
        rows.append(
            tuple(
                Compute() if computed else Reuse(newest.get(i, step))
                for i, computed in enumerate(row)
            )
        )
    return tuple(rows)
