"""Which step a call is: found from the sampler's timestep, never from counting alone."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from cachegraph.errors import SessionError, TooManyCallsError, UnfinishedWarning
from cachegraph.model.signature import TIMESTEP_NAMES, CallSignature
from cachegraph.spec import TensorSpec

from .continuity import Link

Track = Literal["timestep", "count"]
_REPEATED = (
    "separate cond and uncond calls need run.cache_context('cond'), two images at a time a "
    "run.session() each, a sampler that repeats timesteps (Heun) track='count' or step="
)


@dataclass(frozen=True)
class Tracking:
    """How the step of a call is found.

    Attributes:
        steps: model calls per trajectory.
        input: index of the timestep among the graph's inputs, where one is named like it.
        counting: a call without ``step=`` is the next step, whatever its timestep.
        timesteps: the sampler's, one a step, or None to go by their order alone.
        ascending: time grows along a trajectory.
        latent: index of what is denoised among the inputs, where calls are to be told apart by it.
    """

    steps: int
    input: int | None
    counting: bool = False
    timesteps: tuple[float, ...] | None = None
    ascending: bool = False
    latent: int | None = None

    def locate(
        self,
        position: Position,
        inputs: Sequence[Tensor],
        step: int | None,
        link: Link = Link.UNKNOWN,
    ) -> Position:
        """Where the trajectory stands with this call.

        Args:
            position: where it stood before.
            inputs: the call's tensors, in graph order.
            step: what the caller says, or None.
            link: how the call's latent is related to the last call's.

        Raises:
            SessionError: the call does not fit the trajectory.
        """
        time = None
        if step is not None:
            step = self._given(step, position)
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
            step = self._by_time(position, time, inputs[self.input].dtype, link)
            if step == position.step + 1 > 0 and link is Link.APART and position.continuous:
                step = self._begun_anew(position, time)
        if step == 0:
            if position.step not in (-1, self.steps - 1):
                what = "a new trajectory begins though the last one ended after "
                warnings.warn(
                    f"{what}{position.step + 1} of {self.steps} steps (where timesteps are said, "
                    "cachegraph.load(..., timesteps=[...]), a sampler of other steps is refused "
                    "at its first call)",
                    UnfinishedWarning,
                    stacklevel=4,
                )
        elif step != position.step + 1:
            raise SessionError(
                f"step {step} is out of order",
                expected=self._expected(position),
                remedy=_REPEATED if time is not None and step == position.step else "",
            )
        seen = (
            _at_a_glance(inputs[self.input]) if self.counting and self.input is not None else time
        )
        self._warn_of_another(position, step, seen, link)
        moved = replace(self._moved(position, step, time), time=seen)
        # Noise falls along a trajectory: where the first latents hang together, all later ones do.
        goes_on = step == 1 or (step > 1 and position.continuous)
        return replace(moved, continuous=goes_on and link is Link.FOLLOWS)

    def _warn_of_another(
        self, position: Position, step: int, time: float | None, link: Link
    ) -> None:
        """Tell of what looks like another image where that cannot be known."""
        before = position.time
        if step == 1 and link is Link.APART:
            found = "the latent of step 1 was not made from that of step 0"
        elif step == 0 or not self.counting or time is None or before is None or time == before:
            return
        elif (time < before) is self.ascending:
            found = f"time goes back at step {step}, as steps are counted"
        else:
            return
        warnings.warn(
            f"{found}: if an image was aborted this one is wrong; call reset() after one",
            UnfinishedWarning,
            stacklevel=5,
        )

    def _begun_anew(self, position: Position, time: float) -> int:
        """The step of another image's call at a time that could be the next one of the last."""
        if self.timesteps is None and not position.learned:
            return 0
        raise SessionError(
            f"the latent at timestep {time:g} was not made from the last call's",
            place=f"step {position.step}",
            expected=self._expected(position),
            found="what looks like another image",
            remedy="call reset() after an aborted image; an image that begins at a later timestep "
            "needs a schedule of its own steps",
        )

    def _moved(self, position: Position, step: int, time: float | None) -> Position:
        """The position after a call; a whole trajectory teaches the timesteps of the next."""
        times = (*(position.times if step else ()), *(() if time is None else (time,)))
        learned = position.learned
        if step == 0 and time is not None and learned and not _near(time, learned[0]):
            learned = ()  # the sampler was set otherwise
        return Position(step, time, times, times if len(times) == self.steps else learned)

    def _given(self, step: Any, position: Position) -> int:
        """A step that the caller says, as a plain number; numpy's are fine."""
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if not 0 <= number < self.steps:
            raise SessionError(
                "no such step",
                expected=f"0 to {self.steps - 1}: the schedule has {self.steps} steps",
                found=repr(step),
            )
        if number and position.step < 0:
            raise SessionError(
                f"step {number} is the first call of the trajectory", expected="step 0"
            )
        return number

    def _by_time(self, position: Position, time: float, dtype: torch.dtype, link: Link) -> int:
        known = self.timesteps
        if known is None:
            return self._by_order(position, time, link)
        fitting = [
            s for s, t in enumerate(known) if _near(t, time) or _near(_rounded(t, dtype), time)
        ]
        if not fitting:
            near = min(known, key=lambda t: abs(t - time))
            raise SessionError(
                f"timestep {time:g} is not one of the schedule's",
                expected=f"{self._expected(position)}; nearest {near:g}",
                remedy="set the sampler's in the schedule, or load with timesteps=[...]",
            )
        # Neighbours may round to one value.
        goes_on = position.step + 1 in fitting and link is not Link.SAME
        return position.step + 1 if goes_on else fitting[0]

    def _by_order(self, position: Position, time: float, link: Link) -> int:
        """By the timesteps of the last whole trajectory, else by whether time goes on."""
        following, before = position.step + 1, position.time
        if position.step < 0 or (before is None and following == self.steps):
            return 0
        if time == before and link is Link.FOLLOWS and following < self.steps:
            return following  # rounded to the timestep before, or a sampler that repeats it
        if time == before and position.step > 0 and self.steps > 1:
            raise SessionError(
                f"timestep {time:g} is called twice",
                place=f"step {position.step}",
                expected=self._expected(position),
                remedy=_REPEATED,
            )
        learned = position.learned if following < self.steps else ()
        if learned and _near(time, learned[following]):
            return following
        if learned and _near(time, learned[0]):
            return 0
        if before is not None and not (time > before if self.ascending else time < before):
            return 0  # time went back: another setting of the sampler
        if learned:
            raise SessionError(
                f"timestep {time:g} is not the next one of the trajectory before",
                place=f"step {position.step}",
                expected=self._expected(position),
                remedy="call reset() if the last image was aborted or the sampler is set "
                "otherwise now; else load with timesteps=[...], or say the step: run(..., step=s)",
            )
        return self._next(position)

    def _next(self, position: Position) -> int:
        if position.step + 1 >= self.steps:
            raise TooManyCallsError(
                f"call {position.step + 2} of {self.steps}",
                expected=f"a trajectory of {self.steps} steps, then a new one",
                remedy="compile a schedule with the sampler's number of steps, or call reset()",
            )
        return position.step + 1

    def _expected(self, position: Position) -> str:
        following = position.step + 1
        if following >= self.steps:
            return "step 0: the trajectory is complete"
        times = self.timesteps or position.learned

        def shown(step: int) -> str:
            return f"step {step}" + (f" (timestep {times[step]:g})" if times else "")

        more = f", or {shown(0)} for a new trajectory" if following else ""
        return shown(following) + more


@dataclass(frozen=True)
class Position:
    """Where a trajectory stands.

    Attributes:
        step: of the last call; -1 before the first one.
        time: timestep of the last call, where it was read.
        times: timesteps of the trajectory's calls that were read.
        learned: all timesteps of the last trajectory that was whole; empty where there is none or
            one has begun at another timestep since.
        continuous: the latents of the trajectory's calls were all seen to follow from one another.
    """

    step: int = -1
    time: float | None = None
    times: tuple[float, ...] = ()
    learned: tuple[float, ...] = ()
    continuous: bool = False


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


def _at_a_glance(timestep: Tensor) -> float | None:
    """A call's timestep where nothing has to be waited for."""
    return float(timestep.flatten()[0]) if timestep.is_cpu and timestep.numel() else None


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
            "whether they fall or rise; one that repeats them (Heun) needs track='count' or step=",
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
        SessionError: ``track`` is unknown, or the model takes whole timesteps and these are not.
    """
    if track not in ("timestep", "count"):
        raise SessionError(
            "unknown way to track steps", expected="'timestep' or 'count'", found=repr(track)
        )
    found = timestep_input(signature)
    if found is not None:
        _check_whole(*signature.inputs[found], timesteps or ())
    latent = next((i for i in range(len(signature.inputs)) if i != found), None)
    told = latent if found is not None and track == "timestep" else None
    return Tracking(steps, found, track == "count", timesteps, ascending, told)


def timestep_input(signature: CallSignature) -> int | None:
    """Index of the timestep among a model's inputs; None where none is named like it."""
    names = [name for name, _ in signature.inputs]
    return next((names.index(name) for name in TIMESTEP_NAMES if name in names), None)


def _check_whole(name: str, spec: TensorSpec, timesteps: Sequence[float]) -> None:
    broken = [t for t in timesteps if abs(t - round(t)) > 1e-4]
    if broken and not spec.dtype.is_floating_point:
        raise SessionError(
            f"input {name!r} takes whole timesteps",
            expected=str(spec),
            found=str(broken[0]),
            remedy="give them as the sampler passes them to the model",
        )


def _rounded(time: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(time, dtype=dtype)) if dtype.is_floating_point else time


def _near(one: float, other: float) -> bool:
    """The same timestep, however it was rounded."""
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4)
