"""Which step a call is: found from the sampler's timestep, never from counting alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .errors import SessionError
from .signature import CallSignature

Track = Literal["timestep", "count"]
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "time_step")


@dataclass(frozen=True)
class Tracking:
    """How the step of a call is found.

    Attributes:
        steps: model calls per trajectory.
        input: index of the timestep among the graph's inputs, where one is named like it.
        counting: a call without ``step=`` is the next step, whatever its timestep.
        timesteps: the sampler's, one a step, or None to go by their order alone.
        ascending: time grows along a trajectory.
    """

    steps: int
    input: int | None
    counting: bool = False
    timesteps: tuple[float, ...] | None = None
    ascending: bool = False

    def locate(self, position: Position, inputs: Sequence[Tensor], step: int | None) -> Position:
        """Where the trajectory stands with this call.

        Args:
            position: where it stood before.
            inputs: the call's tensors, in graph order.
            step: what the caller says, or None.

        Raises:
            SessionError: the call does not fit the trajectory.
        """
        time = None
        if step is not None:
            self._check_given(step, position)
        elif self.counting:
            step = (position.step + 1) % self.steps
        elif self.input is None:
            raise SessionError(
                "no input is named like a timestep",
                expected=" or ".join(TIMESTEP_NAMES),
                remedy="load with track='count', or say the step with every call: run(..., step=s)",
            )
        else:
            time = timestep_of(inputs[self.input])
            step = self._by_time(position, time)
        if step == 0:
            if position.step not in (-1, self.steps - 1):
                warnings.warn(
                    f"a new trajectory begins though the last one ended after "
                    f"{position.step + 1} of {self.steps} steps",
                    stacklevel=4,
                )
        elif step != position.step + 1:
            raise SessionError(f"step {step} is out of order", expected=self._expected(position))
        return Position(step, time)

    def _check_given(self, step: int, position: Position) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self.steps:
            raise SessionError(
                "no such step",
                expected=f"0 to {self.steps - 1}: the schedule has {self.steps} steps",
                found=repr(step),
            )
        if step and position.step < 0:
            raise SessionError(
                f"step {step} is the first call of the trajectory", expected="step 0"
            )

    def _by_time(self, position: Position, time: float) -> int:
        known = self.timesteps
        if known is not None:
            near = min(range(self.steps), key=lambda s: abs(known[s] - time))
            if not math.isclose(known[near], time, rel_tol=1e-4, abs_tol=1e-4):
                raise SessionError(
                    f"timestep {time:g} is not one of the schedule's",
                    expected=f"{self._expected(position)}; nearest {known[near]:g}",
                    remedy="set the sampler's in the schedule, or load with timesteps=[...]",
                )
            return near
        if position.step < 0 or position.time is None:
            return 0 if position.step < 0 else self._next(position)
        if time == position.time and position.step > 0 and self.steps > 1:
            raise SessionError(
                f"timestep {time:g} is called twice",
                place=f"step {position.step}",
                expected=self._expected(position),
                remedy="separate cond and uncond calls need run.cache_context('cond'), "
                "two images at a time a run.session() each",
            )
        onward = time > position.time if self.ascending else time < position.time
        return self._next(position) if onward else 0

    def _next(self, position: Position) -> int:
        if position.step + 1 >= self.steps:
            raise SessionError(
                f"call {position.step + 2} of {self.steps}",
                expected=f"a trajectory of {self.steps} steps, then a new one",
                remedy="compile a schedule with the sampler's number of steps, or call reset()",
            )
        return position.step + 1

    def _expected(self, position: Position) -> str:
        following = position.step + 1
        if following >= self.steps:
            return "step 0: the trajectory is complete"
        at = f" (timestep {self.timesteps[following]:g})" if self.timesteps else ""
        return f"step {following}{at}" + (", or step 0 for a new trajectory" if following else "")


@dataclass(frozen=True)
class Position:
    """Where a trajectory stands; before its first step ``step`` is -1."""

    step: int = -1
    time: float | None = None


def timestep_of(timestep: Tensor) -> float:
    """The one timestep of a batch; reading it from a GPU waits for the GPU.

    Raises:
        SessionError: the elements differ, or there is none.
    """
    values = set(timestep.detach().reshape(-1).tolist())
    if len(values) != 1 or not all(map(math.isfinite, values)):
        raise SessionError(
            "the step of this call cannot be told from its timestep",
            expected="one finite timestep for the whole batch",
            found=", ".join(f"{v:g}" for v in sorted(values)[:4]) or "an empty tensor",
            remedy="say it: run(..., step=s)",
        )
    return float(values.pop())


def checked_timesteps(timesteps: Sequence[float], steps: int, ascending: bool) -> tuple[float, ...]:
    """A sampler's timesteps as plain numbers.

    Args:
        timesteps: one a step; numbers, or tensors of one element.
        steps: model calls per trajectory.
        ascending: whether time has to grow.

    Raises:
        SessionError: another count, not finite, or they do not fall (or grow).
    """
    times = tuple(map(float, timesteps))
    order = "rise" if ascending else "fall"
    expected = f"{steps} finite numbers that {order}, one a step"
    if len(times) != steps:
        found = str(len(times))
    elif not all(map(math.isfinite, times)):
        found = f"{next(t for t in times if not math.isfinite(t))}"
    else:
        turns = ((a, b) for a, b in pairwise(times) if not (a < b if ascending else a > b))
        found = next((f"{b:g} after {a:g}" for a, b in turns), "")
    if found:
        raise SessionError(
            "the timesteps do not fit the schedule",
            expected=expected,
            found=found,
            remedy="give what the sampler passes to the model; the schedule's 'order:' says "
            "whether they fall or rise",
        )
    return times


def make_tracking(
    signature: CallSignature,
    steps: int,
    *,
    track: Track = "timestep",
    timesteps: tuple[float, ...] | None = None,
    ascending: bool = False,
) -> Tracking:
    """How calls of a traced model find their step.

    Raises:
        SessionError: ``track`` is unknown.
    """
    if track not in ("timestep", "count"):
        raise SessionError(
            "unknown way to track steps", expected="'timestep' or 'count'", found=repr(track)
        )
    found = timestep_input(signature)
    return Tracking(steps, found, track == "count", timesteps, ascending)


def timestep_input(signature: CallSignature) -> int | None:
    """Index of the timestep among a model's inputs; None where none is named like it."""
    names = [name for name, _ in signature.inputs]
    return next((names.index(name) for name in TIMESTEP_NAMES if name in names), None)
