"""Sessions: the state of trajectories being sampled, over the graphs and weights of a runner."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from cachegraph.errors import (
    SessionError,
    TooManyCallsError,
    UnfinishedWarning,
    out_of_memory,
)
from cachegraph.model.items import joined

from .continuity import Link, Trail
from .cuda_graph import Replays
from .forms import forms_in_words
from .known import KnownValues
from .program import Made
from .tracking import Position

if TYPE_CHECKING:
    from .runner import Runner

_Shapes = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


_LESS = "sample fewer images at a time, or free some memory"


@dataclass
class _Branch:
    """The state of one trajectory of cond or uncond calls.

    A call changes it only when it has succeeded, so a failed one can be repeated.
    """

    runner: Runner  # of the form that the trajectory has
    known: dict[Runner, KnownValues]  # each with the timesteps that it has learned
    trail: Trail | None = None
    position: Position = field(default_factory=Position)
    shapes: _Shapes = ()
    values: dict[Made, Tensor] = field(default_factory=dict)
    replays: Replays | None = None  # in place of values, where CUDA graphs are used


class Session:
    """One trajectory being sampled; independent of all others over the same weights.

    Sessions may interleave and may run in threads of their own; one session serves one thread.

    Args:
        runner: whose graphs and weights it uses.
        quiet: do not warn of a trajectory that is left unfinished.
    """

    def __init__(self, runner: Runner, *, quiet: bool = False) -> None:
        self._runner = runner
        self._quiet = quiet
        self._step_index: int | None = None
        self._recorder = runner.recorder() if runner.recorder is not None else None
        self._branches: dict[str, _Branch] = {}
        self._branch_name = ""
        _OPEN.add(self)

    @torch.no_grad()
    def __call__(self, *args: Any, step: int | None = None, **kwargs: Any) -> Any:
        """Call the model for one step.

        Args:
            args: as the traced model takes them.
            step: the step, where the sampler knows it; else it is found from the timestep.
            kwargs: as the traced model takes them.

        Returns:
            What the traced model returns.

        Raises:
            SessionError: the call does not have the traced form, or does not fit the trajectory.
        """
        runner = self._form(args, kwargs)
        program = runner.program
        if program.items is not None:
            given = program.signature.bind(args, kwargs)
            if (count := program.items.count(given)) > 1:
                parts = [program.items.part(given, number) for number in range(count)]
                return self._item_by_item(runner, parts, step)
        return self._call(runner, program.signature.flatten(args, kwargs), kwargs, step)

    def _form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Runner:
        """The first form that a call has, where there are several."""
        forms = self._runner.forms
        if len(forms) == 1:
            return forms[0]
        branch = self._branches.get(self._branch_name)
        if branch is not None:
            inputs = branch.runner.inputs_of(args, kwargs)
            if inputs is not None and _shapes_of(inputs) == branch.shapes:
                return branch.runner
        return self._runner.form_of(args, kwargs)

    def _item_by_item(
        self, runner: Runner, parts: Sequence[dict[str, Any]], step: int | None
    ) -> Any:
        """A call of each item of a batch, in branches of their own; all of them or none."""
        name, before = self._branch_name, dict(self._branches)
        kept = {one: replace(b, values=dict(b.values)) for one, b in before.items()}
        results = []
        try:
            for number, part in enumerate(parts):
                self._branch_name = f"{name} (item {number})".lstrip() if number else name
                inputs = runner.program.signature.flatten((), part)
                results.append(self._call(runner, inputs, part, step))
        except BaseException:
            self._branches = kept
            raise
        finally:
            self._branch_name = name
        return joined(results)

    def _call(
        self, runner: Runner, inputs: list[Tensor], kwargs: Mapping[str, Any], step: int | None
    ) -> Any:
        branch = self._branches.get(self._branch_name)
        if branch is None:
            branch = _Branch(runner, {runner: runner.known_values()})
            self._branches[self._branch_name] = branch
        said = self._step_index if step is None else step
        position = self._locate(runner, branch, inputs, said)
        shapes = _shapes_of(inputs)
        if position.step in runner.checked_steps:
            runner.check_weights(moved=position.step > 0)
        if position.step == 0:
            runner.check_inputs(inputs, self._branch_name)
            self._begin(runner, branch, shapes, position)
        elif runner is not branch.runner or shapes != branch.shapes:
            self._refuse_change(runner, branch, shapes, position.step)
        try:
            outputs = self._outputs(branch, position.step, inputs)
        except (
            *(RuntimeError, TypeError, ValueError),
            *(LookupError, ArithmeticError, MemoryError),
        ) as error:
            place = f"{runner.place}, step {position.step}".removeprefix(", ")
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(f"{place}: {_LESS}")  # whoever knows torch tries a smaller batch
                raise
            if not runner.place and not out_of_memory(error):
                raise
            name = runner.program.layout(position.step).name
            raise SessionError(
                "not enough memory" if out_of_memory(error) else f"the graph of {name} fails",
                place=place,
                found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                remedy=_LESS if out_of_memory(error) else "compile the artifact again",
            ) from error
        branch.position = position
        # Where the step is said, nothing is to be told by the latent.
        latent = runner.tracking.latent if said is None else None
        branch.trail = None if latent is None else Trail.of(inputs[latent], outputs)
        return runner.program.signature.unflatten(outputs, kwargs.get("return_dict"))

    def _begin(self, runner: Runner, branch: _Branch, shapes: _Shapes, position: Position) -> None:
        """A new trajectory of a branch, perhaps of another form than the last one."""
        branch.values.clear()
        if runner is not branch.runner:
            branch.known[branch.runner].end()
            branch.known.setdefault(runner, runner.known_values())
        if self._recorder is not None and (runner, shapes) != (branch.runner, branch.shapes):
            branch.replays = runner.replays(self._recorder)
        branch.runner, branch.shapes = runner, shapes
        branch.position = Position(learned=position.learned)

    def _outputs(self, branch: _Branch, step: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        runner, values = branch.runner, branch.known[branch.runner]
        if step == 0:
            values.begin(inputs)
        known = values.at(step, inputs)
        if branch.replays is None:
            return runner.run_step(step, inputs, branch.values, known)
        return branch.replays.run(step, inputs, runner.constants(step), known)

    def _locate(
        self, runner: Runner, branch: _Branch, inputs: Sequence[Tensor], step: int | None
    ) -> Position:
        tracking, link = runner.tracking, Link.UNKNOWN
        if branch.trail is not None and tracking.latent is not None and step is None:
            link = branch.trail.link(inputs[tracking.latent])
        try:
            return tracking.locate(branch.position, inputs, step, link)
        except TooManyCallsError:
            # These were the calls of a longer trajectory: nothing is to be learned from them.
            branch.position = replace(branch.position, learned=(), times=())
            raise

    def reset(self) -> None:
        """Forget every value and recorded graph, and begin a new trajectory.

        Warns:
            UnfinishedWarning: a trajectory ends before the schedule's last step.
        """
        steps, branches = len(self._runner.program.steps), self._branches
        self._branches = {}
        for name, branch in branches.items():
            done = branch.position.step + 1
            if 0 < done < steps and not self._quiet:
                of = f" of {name!r}" if name else ""
                warnings.warn(
                    f"a trajectory{of} ends after {done} of {steps} steps; a sampler of {done} "
                    f"steps needs a schedule of {done} steps (where timesteps are said, "
                    "cachegraph.load(..., timesteps=[...]), its first call is refused)",
                    UnfinishedWarning,
                    stacklevel=3,
                )

    def rewind(self) -> None:
        """Begin a new trajectory: whoever samples knows that the last one is over, whole or not.

        What was learned of the sampler's timesteps and recorded graphs are kept.
        """
        for branch in self._branches.values():
            branch.values.clear()
            branch.trail, branch.position = None, Position(learned=branch.position.learned)

    def take_rows(self, other: Session, rows: slice, inputs: Sequence[Tensor]) -> None:
        """Go on with some rows of the batch of another session's trajectory.

        Args:
            other: of the same runner; one branch, that has begun.
            rows: of its batch.
            inputs: of the next call, in graph order.

        Raises:
            SessionError: a value that is kept is no row a sample, the graphs take no such batch, or
                the trajectory is one of recorded CUDA graphs.
        """
        ((name, branch),) = other._branches.items()
        runner = branch.runner
        runner.check_inputs(inputs, name)
        dims = runner.program.batch_dims()
        if branch.replays is not None or any(slot not in dims for slot, _ in branch.values):
            raise SessionError(
                "a trajectory cannot go on with a part of its batch",
                expected="values with a row for each sample, and no recorded CUDA graphs",
            )
        known = runner.known_values()
        known.begin(inputs)
        values = {
            made: tensor.narrow(dims[made[0]], rows.start, rows.stop - rows.start).clone()
            for made, tensor in branch.values.items()
        }
        shapes = _shapes_of(inputs)
        part = replace(branch, known={runner: known}, trail=None, values=values, shapes=shapes)
        self._branches = {name: part}

    def __del__(self) -> None:
        """A session that nobody has any more tells what it leaves unfinished."""
        self.reset()

    @contextmanager
    def cache_context(
        self,
        name: str,
        *,
        step_index: int | None = None,
        num_inference_steps: int | None = None,
        sigma: object = None,
    ) -> Iterator[None]:
        """Name the branch that the calls inside belong to, such as ``cond`` or ``uncond``.

        Args:
            name: of the branch.
            step_index: the step of the calls inside, where the sampler knows it.
            num_inference_steps: of the sampler.
            sigma: of the step; the calls' timesteps say the same.

        Raises:
            SessionError: the sampler has another number of steps than the schedule.
        """
        steps = len(self._runner.program.steps)
        if num_inference_steps not in (None, steps):
            raise SessionError(
                "the sampler has another number of steps than the schedule",
                expected=str(steps),
                found=str(num_inference_steps),
                remedy=f"compile a schedule with steps: {num_inference_steps}",
            )
        before = self._branch_name, self._step_index
        self._branch_name, self._step_index = name, step_index
        try:
            yield
        finally:
            self._branch_name, self._step_index = before

    def cache_bytes(self) -> int:
        """Bytes of the values that are kept now, over all branches."""
        recorded = sum(b.replays.nbytes for b in self._branches.values() if b.replays is not None)
        return recorded + sum(t.nbytes for b in self._branches.values() for t in b.values.values())

    def known_bytes(self) -> int:
        """Bytes of the values known beforehand that are held now, over all branches."""
        return sum(k.nbytes for b in self._branches.values() for k in b.known.values())

    def _refuse_change(self, runner: Runner, branch: _Branch, shapes: _Shapes, step: int) -> None:
        remedy = "begin a new trajectory with the first timestep, or use a session each"
        if runner is not branch.runner:
            forms = forms_in_words([branch.runner.program, runner.program])
            raise SessionError(
                "a call has another form in the middle of a trajectory",
                place=f"step {step}",
                expected=forms[0],
                found=forms[1],
                remedy=remedy,
            )
        names = [name for name, _ in runner.program.signature.inputs]
        for name, before, now in zip(names, branch.shapes, shapes, strict=True):
            if before != now:
                raise SessionError(
                    f"input {name!r} changed in the middle of a trajectory",
                    place=f"step {step}",
                    expected=" ".join(map(str, before)),
                    found=" ".join(map(str, now)),
                    remedy=remedy,
                )


def _shapes_of(inputs: Sequence[Tensor]) -> _Shapes:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in inputs)


_OPEN: WeakSet[Session] = WeakSet()


@atexit.register
def _close() -> None:
    """What is still open when the process ends is told then."""
    for session in list(_OPEN):
        session.reset()
