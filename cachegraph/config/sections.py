"""What the parts of a schedule have in common."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, PrivateAttr

from .problems import Problem
from .yaml_lines import Source


class Section(BaseModel):
    """A part of a schedule: nothing unknown, nothing converted, nothing changed later.

    Every field has a description that completes "expected ...": error messages show it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    _source: Source = PrivateAttr(default_factory=Source)

    def problems(self, steps: int) -> Iterator[Problem]:
        """What is wrong with the section on so many steps, as far as no model is needed to tell."""
        yield from ()

    def where(self, *path: str | int) -> str:
        """Where a key stands, for messages: ``path.yaml:17``, or ``schedule: policy.rows[3]``.

        Args:
            path: the keys that lead to it from this section, such as ``"rows", 3``; a key that is
                not in the file (a default) stands where the nearest key around it does.
        """
        return self._source.where(path)
