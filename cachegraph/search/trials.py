"""The log of a search: what was tried on which noise, so that a search can go on where it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachegraph.errors import InputError


@dataclass
class Trials:
    """Quality by candidate and seed; written line by line as it is measured.

    Attributes:
        path: of the log, or None to keep none.
        scores: candidate -> seed -> mean PSNR of its images in dB.
    """

    path: Path | None
    scores: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any]) -> Trials:
        """A log, with what it holds already.

        Args:
            path: of the log.
            settings: what was searched for; the first line of the log.

        Raises:
            InputError: it is the log of another search, or no log.
        """
        trials = cls(path)
        if path is None:
            return trials
        if not path.is_file():
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return trials
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            first, *rest = [json.loads(line) for line in lines]
            for entry in rest:
                trials.scores.setdefault(entry["candidate"], {})[entry["seed"]] = entry["psnr"]
        except (ValueError, KeyError, TypeError) as error:
            what = "not the log of a search, or its last line was not finished"
            remedy = "take out the damaged line, or delete the log"
            raise InputError(what, place=str(path), found=str(error), remedy=remedy) from error
        different = [key for key in settings if first.get(key) != settings[key]]
        if different:
            raise InputError(
                "the log is of another search",
                place=str(path),
                expected=", ".join(f"{key} {settings[key]}" for key in different),
                found=", ".join(f"{key} {first.get(key)}" for key in different),
                remedy="choose another --out, or delete the log",
            )
        return trials

    def get(self, candidate: str, seed: int) -> float | None:
        """What was measured before."""
        return self.scores.get(candidate, {}).get(seed)

    def add(self, candidate: str, seed: int, psnr: float) -> None:
        """Remember a measurement and write it down."""
        self.scores.setdefault(candidate, {})[seed] = psnr
        if self.path is not None:
            entry = {"candidate": candidate, "seed": seed, "psnr": psnr}
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
