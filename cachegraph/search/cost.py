"""What steps cost on this machine: timed, not counted, for a step is slow for many reasons."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from cachegraph.bench.bench import run_bench
from cachegraph.bench.result import Entry, Measured
from cachegraph.compiler.compile import assemble, build
from cachegraph.errors import InputError
from cachegraph.model.trace import TracedModel
from cachegraph.schedule.schedule import Schedule

from .images import Sampler
from .space import Candidate, Family, Way

Progress = Callable[[str, int, int], object]
_ROUNDS = 5
_RUNS = 3  # of a whole sampler


@dataclass(frozen=True)
class PlaceCost:
    """Seconds of the steps of schedules that rule the same sites.

    Attributes:
        once: of what is computed before the first step.
        full: of a full step.
        skipped: of a step that forecasts from two values.
        value: what every further value adds to that.
    """

    once: float
    full: float
    skipped: float
    value: float


@dataclass(frozen=True)
class StepCosts:
    """What trajectories cost.

    Attributes:
        steps: of a trajectory.
        around: seconds of the sampler itself, its decoder included.
        places: sites of a family -> its costs.
        factor: measured over predicted seconds of a whole run.
    """

    steps: int
    around: float
    places: dict[tuple[tuple[str, Any], ...], PlaceCost]
    factor: float = 1.0

    def seconds(self, family: Way, count: int) -> float:
        """Of a run with so many full steps."""
        cost = self.places[family.sites]
        further = max(family.values(count) - 2, 0)
        skipped = max(cost.skipped + further * cost.value, 0.0)
        steps = cost.once + count * cost.full + (self.steps - count) * skipped
        return self.factor * (self.around + steps)

    def uncached(self) -> float:
        """Of a run without caching, by the same backend."""
        full = min(cost.full for cost in self.places.values())
        return self.factor * (self.around + self.steps * full)

    def most(self, family: Family, seconds: float) -> int:
        """How many full steps a run of that time can have; 0 where it cannot have one."""
        counts = range(self.steps, 0, -1)
        return next((n for n in counts if self.seconds(family, n) <= seconds), 0)

    def check(self, families: Sequence[Family], seconds: float) -> None:
        """Refuse a time that cannot be met, or that needs no caching.

        Raises:
            InputError: with the range that can be reached.
        """
        floor = min(self.seconds(family, 1) for family in families)
        ceiling = self.uncached()
        if not floor <= seconds < ceiling:
            raise InputError(
                "no schedule takes this time",
                expected=f"{floor:.3g} s (one full step) to {ceiling:.3g} s (uncached), "
                f"or a speed-up of 1 to {ceiling / floor:.3g}",
                found=f"{seconds:.3g} s, a speed-up of {ceiling / seconds:.3g}"
                if seconds > 0
                else f"{seconds:g} s",
            )


def measure_costs(
    model: nn.Module,
    call: tuple[Sequence[Any], dict[str, Any]],
    families: Sequence[Family],
    tokens: Sequence[Candidate],
    steps: int,
    around: float,
    backend: str,
    progress: Progress,
) -> StepCosts:
    """Time full and skipped steps of each place that steps can be skipped at.

    Args:
        model: in eval mode.
        call: positional and other arguments, as the sampler calls the model.
        families: whose costs are wanted.
        tokens: candidates of ToCa, whose costs are wanted too.
        steps: of a trajectory.
        around: seconds that a run spends outside of the model.
        backend: that is to run the schedule.
        progress: is told what is being done.
    """
    places = list(dict.fromkeys(family.sites for family in families))
    few, many = 1, 3  # orders: 2 and 4 values, which as many full steps make beforehand
    even = range(min(many + 1, steps - 1))
    entries = [
        Entry(f"{number} {order}", Family(sites, "lagrange", order).schedule(steps, even), backend)
        for number, sites in enumerate(places)
        for order in (few, many)
    ]
    shares = list({one.family.sites: one for one in tokens}.values())  # one of each share
    entries += [
        Entry(one.family.name, one.family.schedule(steps, one.full), backend) for one in shares
    ]
    found = run_bench(model, *call, entries, rounds=_ROUNDS, progress=progress)
    costs = {}
    for number, sites in enumerate(places):
        here = [_parts(one, even) for one in found[2 * number : 2 * number + 2]]
        (once, full, skipped), (_, other, deeper) = here
        value = (deeper - skipped) / (many - few)
        costs[sites] = PlaceCost(once, (full + other) / 2, skipped, value)
    for one, measured in zip(shares, found[2 * len(places) :], strict=True):
        costs[one.family.sites] = PlaceCost(*_parts(measured, one.full), value=0.0)
    return StepCosts(steps, around, costs)


def _parts(one: Measured, full: Collection[int]) -> tuple[float, float, float]:
    skipped = [seconds for step, seconds in enumerate(one.steps) if step not in full]
    return one.prologue.median, median(one.steps[s] for s in full), median(skipped)


def time_run(
    model: nn.Module,
    traced: TracedModel,
    schedule: Schedule,
    sampler: Sampler,
    backend: str,
    seed: int,
) -> float:
    """Seconds of a whole run of the sampler with a compiled schedule, after one that warms up."""
    artifact = assemble(build(model, schedule, traced=traced), backend)
    runner = artifact.runner()
    taken = []
    for _ in range(1 + _RUNS):
        began = time.perf_counter()
        sampler(runner, seed)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])
