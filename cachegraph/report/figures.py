"""What was measured elsewhere, for a report: figures of others, and sampled tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cachegraph.bench.front import Point, front
from cachegraph.bench.result import UNCACHED
from cachegraph.errors import InputError
from cachegraph.show.token_map import LABEL, SEED, token_shares

from .data import listed

_READERS = "bench --out, compare --out or search"
Found = dict[str, Any] | None


def read_figures(path: Path, schedule: str) -> tuple[Found, Found]:
    """Seconds of each variant, and quality against time or steps, from what others wrote.

    Args:
        path: a file of ``bench``, ``compare`` or ``search``.
        schedule: name of the report's schedule; seconds are those of its entry in a bench.

    Returns:
        Seconds and quality; None for what the file does not have.

    Raises:
        InputError: the file cannot be read, is none of these, or has nothing of the schedule.
    """
    try:
        found = json.loads(path.read_text())
        if "entries" not in found:
            return None, _front_of(found)
        said, entries = _said(found), found["entries"]
        quality = _quality(entries, said)
        measured = _measured(entries, schedule, said)
    except OSError as error:
        raise InputError("the file cannot be read", place=str(path), found=str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            "not a file of figures",
            place=str(path),
            expected=f"JSON that {_READERS} wrote",
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


def _front_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``compare`` (by seconds) or ``search`` (by full steps) found."""
    by_time = "compared" in found
    points = [
        Point(one["name"], float(one["seconds" if by_time else "full_steps"]), float(one["psnr"]))
        for one in found["compared" if by_time else "checked"]
        if one["psnr"] is not None
    ]
    said = f"{found['model']}, {found['backend']}" if by_time else f"search on {found['model']}"
    return _picture(said, "seconds of a run" if by_time else "full steps", points)


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
    """PSNR against seconds."""
    points = [
        Point(
            f"{one['name']}, {one['backend']}",
            one["trajectory"]["median"],
            one["quality"]["psnr"],
        )
        for one in entries
        if one.get("quality") and one["name"] != UNCACHED
    ]
    return _picture(said, "seconds a trajectory", points) if points else None


def _picture(said: str, cost: str, points: Sequence[Point]) -> dict[str, Any]:
    """Points with the front marked."""
    best = front(points)
    shown = [{"name": p.name, "x": p.cost, "y": p.quality, "front": p in best} for p in points]
    return {"what": said, "x": cost, "y": "PSNR in dB", "points": shown}


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
