"""What is compared by a benchmark, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cachegraph.schedule.schedule import Schedule

UNCACHED = "uncached"


@dataclass(frozen=True)
class Entry:
    """One way of running the model.

    Attributes:
        name: of the schedule, or UNCACHED.
        schedule: what is cached; None for the model as it is, with no pass that optimises it.
        backend: that runs the graphs; ``eager`` without a schedule is the model itself.
        hooks: run by :class:`ReferenceRunner`, as published codes do, instead of a backend.
        disable: names of exact optimisations to leave out.
    """

    name: str
    schedule: Schedule | None
    backend: str
    hooks: bool = False
    disable: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        """True for the eager model itself."""
        return self.schedule is None and self.backend == "eager" and not self.hooks


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in seconds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        low, median, high = np.quantile(np.asarray(samples), [0.25, 0.5, 0.75])
        return cls(float(low), float(median), float(high))


@dataclass(frozen=True)
class StepKind:
    """What was measured of the steps of one variant.

    Attributes:
        variant: its name.
        calls: how many steps run it.
        flops: predicted, mean of its steps.
        seconds: of a call, mean of its steps.
        moved: predicted bytes that a call must read and write at least, mean of its steps; None
            under hooks.
        bandwidth: that many bytes a second of the measured time.
        choice: share of that which is spent on choosing tokens, gathering and scattering them; None
            where no tokens are chosen or it was not asked for.
    """

    variant: str
    calls: int
    flops: float
    seconds: Spread
    moved: float | None
    bandwidth: float | None
    choice: float | None


@dataclass(frozen=True)
class Compared:
    """Bytes, predicted and measured; not measured where torch's allocator does not see them."""

    predicted: int
    measured: int | None


@dataclass(frozen=True)
class Memory:
    """Memory of a trajectory.

    Attributes:
        weights: stored once for all variants.
        slots: values kept between steps, at most.
        known: tables of what is known beforehand, at most.
        peak: all that is in use at a time, at most: the above, inputs, and what a step works with.
    """

    weights: Compared
    slots: Compared
    known: Compared
    peak: Compared


@dataclass(frozen=True)
class Quality:
    """Mean PSNR to the uncached model's images in dB; share that shows what was asked for.

    Both are of so many images.
    """

    psnr: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one entry.

    Attributes:
        name: of the schedule.
        backend: or ``model`` (the eager model itself), ``hooks`` (published style).
        trajectory: seconds of all steps, composed of the kinds of steps, and of the prologue.
        prologue: seconds of what is computed once a trajectory, for all steps.
        whole: seconds of whole trajectories, where these were run.
        steps: median seconds of each step.
        kinds: by variant.
        limit: speed-up over uncached if time were FLOPs.
        first_calls: seconds of the first, untimed round, compiling included.
        memory: predicted and measured; None under hooks.
        quality: of images, where they were sampled.
    """

    name: str
    backend: str
    trajectory: Spread
    prologue: Spread
    whole: Spread | None
    steps: tuple[float, ...]
    kinds: tuple[StepKind, ...]
    limit: float
    first_calls: float
    memory: Memory | None = None
    quality: Quality | None = None
