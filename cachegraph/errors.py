"""Every error that cachegraph raises on purpose.

An error says what is wrong, where, what was expected, what was found and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CachegraphError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence without a full stop: what is wrong.
        place: where: ``file:line``, a site, or ``pass/variant/site/node``.
        expected: what would have been right.
        found: what was there instead.
        remedy: what the reader can do about it.
    """

    exit_code = 1  # of the command line: 1 failure, 2 wrong input

    def __init__(
        self, what: str, *, place: str = "", expected: str = "", found: str = "", remedy: str = ""
    ) -> None:
        self.what, self.place = what, place
        self.expected, self.found, self.remedy = expected, found, remedy
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"{self.place}: {self.what}" if self.place else self.what
        if self.expected:
            text += f"; expected {self.expected}"
        if self.found:
            text += f"; found {self.found}"
        if self.remedy:
            text += f"; {self.remedy}"
        return printable(text)


class InputError(CachegraphError):
    """Something that the user gave is wrong; the command line exits with 2."""

    exit_code = 2


class ScheduleError(InputError):
    """A schedule file, preset name or dict that cannot be used."""


class ModelError(InputError):
    """A model that cannot be recognised, read or called."""


class TraceError(ModelError):
    """A model that torch.export cannot turn into a functional graph."""


class SiteError(InputError):
    """No site, or not the asked one, was found in the traced graph."""


class PlanError(InputError):
    """A schedule that is well formed but cannot work on this model."""


class ArtifactError(InputError):
    """A compiled artifact that is damaged, truncated, half-written or too new."""


class BackendError(InputError):
    """A backend that is unknown, not installed, or cannot take the graph."""


class SessionError(CachegraphError):
    """A call that does not fit the trajectory being sampled."""


class VerifyError(CachegraphError):
    """A rewritten graph broke a rule of the verifier: a bug in a pass, never the user's fault."""


class TrainingError(CachegraphError):
    """Training went where no router can follow, such as a loss that is no number."""


class TooManyCallsError(SessionError):
    """A trajectory of more calls than the schedule has steps."""


class UnfinishedWarning(UserWarning):
    """A trajectory that ended before the schedule's last step, or seems to have done so."""


def printable(text: str) -> str:
    """A text that any terminal can show: what is no character, or steers it, is escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a device; torch has no one error for it."""
    kind = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return kind or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a misspelt ``name``, or an empty string where nothing is near."""
    found = near(name, known)
    return f"did you mean {found[0]!r}?" if found else ""


def near(name: str, known: Iterable[str]) -> list[str]:
    """Names like a misspelt one, the nearest first.

    Where difflib makes no difference, the closest letters and digits do, then the lower name:
    ``DiT-XL/2`` is nearer to ``DiT-XL/3`` than ``DiT-XL/8`` is.
    """

    def distance(word: str) -> tuple[float, int, str]:
        letters = sum(abs(ord(a) - ord(b)) for a, b in zip(word, name, strict=False))
        return -difflib.SequenceMatcher(None, word, name).ratio(), letters, word

    words = list(known)
    return sorted(difflib.get_close_matches(name, words, len(words) or 1, 0.6), key=distance)
