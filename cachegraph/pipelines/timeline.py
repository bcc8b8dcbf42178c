"""Which model calls an image is made of, told from the pipeline and its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Timeline:
    """The model calls of one image, numbered from 0 as the scheduler lists its timesteps.

    Attributes:
        times: one a call.
        runs: where each trajectory begins and where it ends (exclusive). There is one, unless time
            turns back on the way: what was kept of a cleaner latent is of no use to a noisier one.
    """

    times: tuple[float, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def begin(self) -> int:
        """The first call."""
        return self.runs[0][0]

    def run_of(self, index: int) -> tuple[int, int] | None:
        """The trajectory that a call belongs to; None where the image has no such call."""
        return next((run for run in self.runs if run[0] <= index < run[1]), None)

    def stands_still(self, index: int) -> bool:
        """Whether the call after this one has the same timestep (Heun, PNDM)."""
        return index + 1 < len(self.times) and self.times[index] == self.times[index + 1]


def make_timeline(pipe: Any, component: str, time: Callable[[], float | None]) -> Timeline:
    """The calls that one transformer of a pipeline gets for the image that begins now.

    Args:
        pipe: has set its scheduler's timesteps.
        component: ``transformer`` or ``transformer_2``.
        time: reads the timestep of the first call, where the model names one.
    """
    scheduler = pipe.scheduler
    listed = [float(t) for t in scheduler.timesteps.tolist()]
    begin, times = _begin(pipe, listed, time), tuple(listed)
    if hasattr(scheduler, "undo_step"):  # RePaint: on the way back no model is called
        times = (listed[0], *(b for a, b in pairwise(listed) if b < a))
    end = len(times)
    boundary = _boundary(pipe)
    if boundary is not None:
        high = sum(t >= boundary for t in times)
        begin, end = (max(begin, high), end) if component.endswith("_2") else (begin, high)
    return Timeline(times, _runs(times, begin, max(end, begin + 1)))


def _begin(pipe: Any, times: Sequence[float], time: Callable[[], float | None]) -> int:
    """Index of the first timestep: img2img begins at a later one than the scheduler's first.

    Most pipelines tell their scheduler; the others note how many timesteps they go through; a loop
    by hand does neither, but passes one of the scheduler's.
    """
    begin = getattr(pipe.scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    noted = vars(pipe).get("_num_timesteps")
    if isinstance(noted, int) and 0 < noted <= len(times):
        return len(times) - noted
    first = time()
    return times.index(first) if first in times else 0


def _boundary(pipe: Any) -> float | None:
    """The timestep from which on the second transformer is called (Wan 2.2)."""
    ratio = getattr(pipe.config, "boundary_ratio", None)
    if ratio is None or getattr(pipe, "transformer_2", None) is None:
        return None
    return float(ratio * pipe.scheduler.config.num_train_timesteps)


def _runs(times: Sequence[float], begin: int, end: int) -> tuple[tuple[int, int], ...]:
    """The calls from begin to end, cut where time goes against the way that it goes as a whole."""
    way = times[-1] - times[0]
    turns = (i for i in range(begin + 1, end) if (times[i] - times[i - 1]) * way < 0)
    return tuple(pairwise((begin, *turns, end)))
