"""Published step lists, step masks and tables of errors as schedules that can be reviewed.

Each source says which steps are full and nothing of what skipped ones do, so what becomes of them
is a choice: the order of a forecast, 0 for reuse, and the sites that it is made at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cachegraph.errors import InputError, nearest
from cachegraph.methods.smoothcache import list_problems
from cachegraph.schedule.schedule import FORMAT, Schedule, load_schedule
from cachegraph.zoo.checkpoint import read_pickle

Weight = Literal["none", "linear", "quadratic"]
_POWERS = {"none": 0, "linear": 1, "quadratic": 2}
_MOST_APART = 10  # steps from one full step to the next in CEM's tables

# cache-dit's step masks for 28 steps: computed and cached steps in turn.
SCM = {
    "slow": (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "medium": (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "fast": (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "ultra": (4, 2, 1, 5, 1, 6, 1, 7, 1),
}


def import_schedule(
    source: str,
    *,
    steps: int | None = None,
    full: int | None = None,
    spread: int = 1,
    weight: Weight = "quadratic",
    order: int = 0,
    kinds: Sequence[str] = ("stack",),
) -> tuple[Schedule, str]:
    """A schedule from what others published.

    Args:
        source: ``scm:NAME``; or a file: CEM's table (``.pt``), SmoothCache's lists (a JSON object
            of lists of 0 and 1), or text with a list: numbers of full steps (LeMiCa, MeanCache),
            or one 0 or 1 a step (cache-dit).
        steps: of a trajectory; where the source does not say, it must be given.
        full: how many full steps, of a table.
        spread: how far gaps may be from the mean one, of a table.
        weight: of the gap's length in a table's errors.
        order: of the forecast at skipped steps; 0 reuses.
        kinds: of the sites.

    Returns:
        The schedule, and a comment that says where it is from.

    Raises:
        InputError: it is none of these, or does not fit.
    """
    path = Path(source)
    if source.startswith("scm:"):
        listed, steps = scm_steps(source.removeprefix("scm:"), steps or sum(SCM["slow"]))
    elif not path.is_file():
        known = ", ".join(f"scm:{name}" for name in SCM)
        raise InputError("no such file", place=source, expected=f"a file, or one of {known}")
    elif path.suffix in (".pt", ".pth"):
        if full is None:
            raise InputError(
                "a table needs the number of full steps", place=source, expected="--full"
            )
        listed, steps = cem_steps(read_pickle(path), full, spread, weight, source)
    else:
        found = _read_list(path)
        if isinstance(found, Mapping):
            return _smoothcache(found, path), f"SmoothCache's lists in {path.name}"
        listed, steps = _steps_of(found, steps, source)
    policy = {"method": "forecast", "basis": "lagrange", "order": order, "full_steps": listed}
    keys = {"cachegraph": FORMAT, "steps": steps, "policy": policy, "sites": {"kinds": list(kinds)}}
    count = f"{len(listed)} of {steps} steps full"
    how = "reuse" if order == 0 else f"forecast of order {order}"
    return load_schedule(keys), f"From {path.name}: {count}; {how} is no part of it."


def scm_steps(name: str, steps: int) -> tuple[list[int], int]:
    """Full steps of cache-dit's masks; for fewer steps runs are cut from the end.

    The last step is never cached.

    Raises:
        InputError: there is no such mask, or it is for fewer steps.
    """
    if name not in SCM:
        expected = ", ".join(f"scm:{known}" for known in SCM)
        remedy = nearest(name, SCM)
        raise InputError(f"no mask {name!r}", expected=expected, remedy=remedy)
    whole = sum(SCM[name])
    if not 2 <= steps <= whole:
        what = f"the mask {name!r} is for {whole} steps"
        raise InputError(what, expected=f"2 to {whole} steps", found=str(steps))
    mask = [run % 2 == 0 for run, length in enumerate(SCM[name]) for _ in range(length)][:steps]
    return [step for step, computed in enumerate(mask) if computed or step == steps - 1], steps


def cem_steps(
    table: object, full: int, spread: int, weight: Weight, place: str = "table"
) -> tuple[list[int], int]:
    """CEM's path of least cumulative error through its table (leaves162/CEM, ``DCS_module.py``).

    ``table["C=n"][t]`` is the error of skipping n steps in a row before step t. Its sum over t,
    times n to the power of the weight, is what a gap of n + 1 steps that ends at t costs; a gap is
    at most ``spread`` off the mean one. DiT's table counts down and FLUX's up: steps that cannot
    have so many before them are zero, and tell.

    Args:
        table: ``C=1`` ... -> tensor of one number a step.
        full: how many full steps, the first and the last among them.
        spread: see above.
        weight: see above.
        place: of the table, for errors.

    Raises:
        InputError: it is no such table, or there is no such path.
    """
    errors = _table(table, place)
    steps = len(errors[1])
    if not 2 <= full <= steps:
        raise InputError("no such number of full steps", expected=f"2 to {steps}", found=str(full))
    mean = round(steps / full)
    gaps = range(max(1, mean - spread), min(_MOST_APART, mean + spread, len(errors) + 1) + 1)
    cost = {1: np.zeros(steps)}
    for skipped, row in errors.items():
        total = row.astype(np.float32).cumsum().astype(np.float64) * skipped ** _POWERS[weight]
        cost[skipped + 1] = np.where(total == 0, np.inf, total)
    best, parents = np.full(steps, np.inf), list[np.ndarray]()
    best[0] = 0
    for _ in range(full - 1 if gaps else 0):
        rows = np.full((len(gaps), steps), np.inf)
        for number, gap in enumerate(gaps):
            rows[number, gap:] = best[:-gap] + cost[gap][gap:]
        parents.append(np.asarray([gaps[i] for i in rows.argmin(0)]))
        best = rows.min(0)
    if not np.isfinite(best[-1]):
        raise InputError(
            f"no path has {full} full steps",
            place=place,
            expected=f"gaps of {max(1, mean - spread)} to {mean + spread} steps, at most "
            f"{_MOST_APART}, from the first step to the last",
            remedy="raise the spread, or choose another number",
        )
    path = [steps - 1]
    for apart in reversed(parents):
        path.append(path[-1] - int(apart[path[-1]]))
    return path[::-1], steps


def _table(table: object, place: str) -> dict[int, np.ndarray]:
    """Rows by the number of skipped steps, counted up."""
    found = {}
    for key, row in table.items() if isinstance(table, Mapping) else ():
        named = re.fullmatch(r"C=(\d+)", str(key))
        if named is None or not isinstance(row, torch.Tensor) or row.ndim != 1:
            break
        found[int(named[1])] = row.detach().float().cpu().numpy()
    lengths = {len(row) for row in found.values()}
    if sorted(found) != list(range(1, len(found) + 1)) or len(lengths) != 1:
        expected = "C=1, C=2, ... -> a tensor with one number a step"
        raise InputError("not a table of CEM", place=place, expected=expected)
    last = found[len(found)]
    if last[-1] == 0 and last[0] != 0:
        return {skipped: row[::-1] for skipped, row in found.items()}
    return found


def _read_list(path: Path) -> object:
    """A JSON list or object; else the numbers in a text."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError:
        if re.search(r"[A-Za-z]", text):
            expected = "a list of steps, of 0 and 1, or SmoothCache's lists"
            raise InputError("not a list", place=str(path), expected=expected) from None
        return [int(number) for number in re.findall(r"\d+", text)]


def _steps_of(found: object, steps: int | None, place: str) -> tuple[list[int], int]:
    """Full steps from their numbers, or from a mask."""
    if not isinstance(found, list) or not found or any(type(n) is not int for n in found):
        expected = "whole numbers: of full steps, or 0 and 1"
        raise InputError("not a list of steps", place=place, expected=expected)
    if set(found) <= {0, 1} and len(found) > 2:  # a mask; a list of steps names each once
        if steps not in (None, len(found)):
            raise InputError(
                "the mask has another number of steps",
                place=place,
                expected=str(steps),
                found=str(len(found)),
            )
        return [step for step, computed in enumerate(found) if computed], len(found)
    if steps is None:
        what = "a list of full steps does not say how many there are in all"
        raise InputError(what, place=place, expected="--steps")
    return sorted(found), steps


def _smoothcache(lists: Mapping[str, object], path: Path) -> Schedule:
    for problem in list_problems(lists):
        raise problem.error(InputError, str(path))
    steps = len(next(iter(lists.values())))  # type: ignore[arg-type]
    policy = {"method": "smoothcache", "lists": dict(lists)}
    return load_schedule({"cachegraph": FORMAT, "steps": steps, "policy": policy})
