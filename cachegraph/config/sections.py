"""What the parts of a schedule have in common."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from .problems import Problem


class Section(BaseModel):
    """A part of a schedule: nothing unknown, nothing converted, nothing changed later.

    Every field has a description that completes "expected ...": error messages show it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PolicySection(Section):
    """What is computed when; a subclass has a ``method``."""

    def problems(self, steps: int) -> Iterator[Problem]:
        """What is wrong with the policy on so many steps, as far as no model is needed to tell."""
        yield from ()
