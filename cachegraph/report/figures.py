"""What was measured elsewhere, for a report: files of ``bench``, and sampled tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cachegraph.bench.result import UNCACHED
from cachegraph.errors import InputError
from cachegraph.show.token_map import LABEL, SEED, token_shares

from .data import listed

_KEYS = ("model", "machine", "entries")


def read_bench(path: Path, schedule: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Seconds of each variant, and quality against time, from what ``bench --out`` wrote.

    Args:
        path: of the file.
        schedule: name of the report's schedule; seconds are those of its entry.

    Returns:
        Seconds and quality; None for what the file does not have.

    Raises:
        InputError: the file cannot be read, is none of bench, or has nothing of the schedule.
    """
    try:
        found = json.loads(path.read_text())
        said, entries = _said(found), found["entries"]
        quality = _quality(entries, said)
        measured = _measured(entries, schedule, said)
    except OSError as error:
        raise InputError("the file cannot be read", place=str(path), found=str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            "not a file of figures",
            place=str(path),
            expected=f"what bench --out writes: JSON with {', '.join(_KEYS)}",
            found=repr(error),
        ) from error
    if measured is None and quality is None:
        names = dict.fromkeys(str(one["name"]) for one in entries)
        raise InputError(
            f"the file has no figures of {schedule}",
            place=str(path),
            expected="an entry of that name",
            found=listed(list(names)),
        )
    return measured, quality


def _said(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{found['model']} on {machine['processor']}{threads}, torch {machine['torch']}"


def _measured(
    entries: Sequence[Mapping[str, Any]], schedule: str, said: str
) -> dict[str, Any] | None:
    """Of the schedule's entry against the uncached one of the same backend."""
    by_name = {(one["name"], one["backend"]): one for one in entries}
    for (name, backend), one in by_name.items():
        full = by_name.get((UNCACHED, backend))
        if name == schedule and full is not None and one["kinds"]:
            return {
                "what": f"{said}, {backend}",
                "speed_up": full["trajectory"]["median"] / one["trajectory"]["median"],
                "full_seconds": full["kinds"][0]["seconds"]["median"],
                "steps": list(one["steps"]),
                "variants": [
                    {
                        "name": kind["variant"],
                        "seconds": kind["seconds"]["median"],
                        "flops": kind["flops"],
                    }
                    for kind in one["kinds"]
                ],
            }
    return None


def _quality(entries: Sequence[Mapping[str, Any]], said: str) -> dict[str, Any] | None:
    """PSNR against seconds; the front is what nothing beats in both."""
    points = [
        {
            "name": f"{one['name']}, {one['backend']}",
            "x": one["trajectory"]["median"],
            "y": one["quality"]["psnr"],
        }
        for one in entries
        if one.get("quality") and one["name"] != UNCACHED
    ]
    if not points:
        return None
    for one in points:
        at = one["x"], -one["y"]
        others = [(p["x"], -p["y"]) for p in points]
        one["front"] = not any(p != at and p[0] <= at[0] and p[1] <= at[1] for p in others)
    return {"what": said, "x": "seconds a trajectory", "y": "PSNR in dB", "points": points}


def sampled_tokens(model: nn.Module, schedule: str) -> dict[str, Any]:
    """Which tokens are recomputed at each step while a digit is sampled.

    Raises:
        InputError: the schedule chooses no tokens.
    """
    image, shares, plan = token_shares(model, schedule, LABEL, SEED)
    grid = plan.selection.grid if plan.selection is not None else ()
    return {
        "what": f"Digit {LABEL}, seed {SEED}, as sampled with this schedule.",
        "grid": list(grid or ()),
        "image": [[round(float(value), 3) for value in row] for row in image],
        "shares": [[round(float(v), 3) for v in share.flatten()] for share in shares],
    }
