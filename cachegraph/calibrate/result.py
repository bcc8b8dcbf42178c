"""What was measured of an uncached model, and the schedules that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cachegraph.model.site import Site
from cachegraph.plan.action import Reuse, Row
from cachegraph.schedule.schedule import Schedule, load_schedule

_DIGITS = 4  # of a measured error, in a schedule


@dataclass(frozen=True, eq=False)
class Calibration:
    """How much the values of every site change along a trajectory, averaged over trajectories.

    Attributes:
        sites: every site of the model, in execution order.
        steps: model calls per trajectory.
        trajectories: how many were measured.
        errors: ``(sites, max_distance, steps)``: ``errors[i, r - 1, s]`` is the relative L1 change
            ``|o_s - o_(s+r)| / |o_(s+r)|`` of the site's value o; NaN where ``s + r`` is no step.
        cosines: ``(sites, steps)``: ``cosines[i, s]`` is the cosine between the last two changes of
            the site's mean value over the batch, ``o_s - o_(s-1)`` and ``o_(s-1) - o_(s-2)``; NaN
            at steps 0 and 1, and 0 where nothing changed.
    """

    sites: tuple[Site, ...]
    steps: int
    trajectories: int
    errors: Tensor
    cosines: Tensor

    @property
    def max_distance(self) -> int:
        """The largest distance between steps whose change was measured."""
        return self.errors.shape[1]

    @property
    def extent(self) -> str:
        """``4 trajectories of 50 steps``."""
        counted = "1 trajectory" if self.trajectories == 1 else f"{self.trajectories} trajectories"
        return f"{counted} of {self.steps} steps"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites, in the order of the first of each."""
        return tuple(dict.fromkeys(str(site.kind) for site in self.sites))

    def indices(self, kind: str) -> list[int]:
        """The sites of a kind."""
        return [i for i, site in enumerate(self.sites) if site.kind == kind]

    def curves(self, kind: str) -> list[list[float]]:
        """``[distance - 1][step]``: the errors averaged over the sites of a kind."""
        mean = self.errors[self.indices(kind)].mean(0)
        return [mean[r, : self.steps - r - 1].tolist() for r in range(self.max_distance)]


def smoothcache_lists(calibration: Calibration, error_bound: float) -> dict[str, list[int]]:
    """For each kind of site, 1 at the steps that compute it and 0 at those that reuse it.

    At a step, the largest distance whose error is within the bound is taken: the step is computed
    and so many are skipped. The first and the last step are computed.
    Source: Roblox/SmoothCache, ``calibration/calibration_helper.py:203-347``.
    """
    return {
        kind: _greedy(calibration.curves(kind), calibration.steps, error_bound)
        for kind in calibration.kinds
    }


def smoothcache_schedule(
    calibration: Calibration, error_bound: float, *, model: str | None = None
) -> Schedule:
    """A schedule that reuses a kind of site as long as its measured error is within a bound.

    Args:
        calibration: what was measured.
        error_bound: the largest relative L1 change, averaged over the sites of a kind.
        model: name of the model, to be noted in the schedule.

    Returns:
        A schedule of its own: the lists and the measured curves are in it.
    """
    lists = smoothcache_lists(calibration, error_bound)
    return load_schedule(
        {
            "cachegraph": 1,
            "steps": calibration.steps,
            "policy": {"method": "smoothcache", "lists": lists},
            "calibration": calibration_block(calibration, error_bound, model),
        }
    )


def calibration_block(
    calibration: Calibration, error_bound: float | None = None, model: str | None = None
) -> dict[str, Any]:
    """The measured curves as a schedule's ``calibration`` carries them."""
    block: dict[str, Any] = {"trajectories": calibration.trajectories}
    block |= {} if model is None else {"model": model}
    block |= {} if error_bound is None else {"bound": error_bound}
    block["errors"] = {
        kind: [
            [float(f"{error:.{_DIGITS}g}") for error in curve] for curve in calibration.curves(kind)
        ]
        for kind in calibration.kinds
    }
    return block


def goc_steps(calibration: Calibration, rows: Sequence[Row]) -> tuple[int, ...]:
    """The steps at which GOC helps: where values keep moving in the direction they moved in.

    Corrected are the steps that reuse a site and where the cosine between the last two changes of
    the uncached values is positive, averaged over the sites that they reuse. The publication types
    its list in by hand and leaves out the steps where the direction turns.

    Args:
        calibration: what was measured.
        rows: what the schedule to correct does, one action for each of the calibration's sites.
    """
    chosen = []
    for step, row in enumerate(rows):
        reused = [i for i, action in enumerate(row) if isinstance(action, Reuse)]
        if reused and calibration.cosines[reused, step].mean() > 0:  # never at steps 0 and 1: NaN
            chosen.append(step)
    return tuple(chosen)


def _greedy(curves: Sequence[Sequence[float]], steps: int, bound: float) -> list[int]:
    rule = [1] * steps
    step = 0
    while step < steps:
        within = (
            distance
            for distance in range(len(curves), 0, -1)
            if step + distance < steps and curves[distance - 1][step] <= bound
        )
        skipped = next(within, 0)
        rule[step + 1 : step + 1 + skipped] = [0] * skipped
        step += skipped + 1
    rule[-1] = 1
    return rule
