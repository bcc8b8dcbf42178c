"""What was measured of an uncached model, and the schedules that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .schedule import Schedule, load_schedule
from .site import Site

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
        products: ``(sites, 2 * max_distance + 2, steps)``: ``products[i, k, s]`` is the inner
            product of the site's values at ``s`` and ``s + k``, averaged over the batch before;
            NaN where ``s + k`` is no step. Every cosine between changes follows from them.
    """

    sites: tuple[Site, ...]
    steps: int
    trajectories: int
    errors: Tensor
    products: Tensor

    @property
    def max_distance(self) -> int:
        """The largest distance between steps whose change was measured."""
        return self.errors.shape[1]

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

    def cosine(self, sites: Iterable[int], step: int, newest: int, older: int) -> float:
        """Cosine between the change up to a step and the one before, averaged over sites.

        Args:
            sites: indices.
            step: the change is ``f(step) - f(newest)``.
            newest: a step before it.
            older: a step before that; the change before is ``f(newest) - f(older)``.

        Raises:
            InputError: the steps are further apart than was measured.
        """
        if step - older >= self.products.shape[1]:
            raise InputError(
                f"the changes between steps {older}, {newest} and {step} were not measured",
                expected=f"steps at most {self.products.shape[1] - 1} apart",
                remedy=f"calibrate with max_distance {(step - older) // 2}",
            )
        chosen = list(sites)

        def product(first: int, second: int) -> Tensor:
            return self.products[chosen, abs(first - second), min(first, second)]

        def change(after: int, before: int) -> Tensor:
            return product(after, after) - 2 * product(after, before) + product(before, before)

        dots = (product(step, newest) - product(newest, newest)) - (
            product(step, older) - product(newest, older)
        )
        norms = (change(step, newest) * change(newest, older)).clamp_min(0).sqrt()
        return torch.where(norms > 0, dots / norms, torch.zeros_like(dots)).mean().item()


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


def goc_steps(
    calibration: Calibration, reuse_steps: Sequence[int] | Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """The steps at which GOC helps: where the values keep moving in the direction they moved in.

    At step s the correction pushes the newest computed value ``f(a)`` along the change before it,
    ``f(a) - f(b)``; that is right where the true change ``f(s) - f(a)`` has a positive cosine with
    it, averaged over the reused sites. Where every step before s is computed, ``a = s - 1`` and
    ``b = s - 2``; elsewhere a is the newest computed step and b the computed one before it. A step
    is left out where the two steps before it use one value, as there is no change to follow then.

    Args:
        calibration: what was measured.
        reuse_steps: the steps at which the host reuses all sites, or such a list for each kind.

    Raises:
        InputError: a host that reuses for longer than was measured.
    """
    by_kind = (
        {kind: frozenset(steps) for kind, steps in reuse_steps.items()}
        if isinstance(reuse_steps, Mapping)
        else dict.fromkeys(calibration.kinds, frozenset(reuse_steps))
    )
    corrected: list[int] = []
    for step in range(2, calibration.steps):
        cosines: list[float] = []
        for kind, reused in by_kind.items():
            moved = step - 1 not in reused or step - 1 in corrected
            computed = [s for s in range(step) if s not in reused][-2:]
            if step in reused and moved and len(computed) == 2:
                older, newest = computed
                sites = calibration.indices(kind)
                cosines += len(sites) * [calibration.cosine(sites, step, newest, older)]
        if cosines and sum(cosines) > 0:
            corrected.append(step)
    return tuple(corrected)


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
