"""One image being sampled: which of its calls go on with what was kept, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from cachegraph.errors import SessionError
from cachegraph.runtime.known import Lasting
from cachegraph.runtime.session import Session

from .call import Call
from .forms import Form, Forms
from .timeline import Timeline

_TWINS = 4  # branches that nothing tells apart: cond and uncond of one prompt, and guidance more


@dataclass
class Branch:
    """The calls of one prompt: cond, uncond, or both in one batch.

    Attributes:
        name: that the pipeline gives its calls.
        form: of its calls.
        session: what was kept of them.
        lasting: its text, class and whatever else stays the same for an image.
        run: first call of the trajectory, and the one after the last.
        index: of the last call.
        time: of the last call, where it had to be read.
    """

    name: str
    form: Form
    session: Session
    lasting: dict[str, Lasting]
    run: tuple[int, int]
    index: int = -1
    time: float | None = None

    def close(self) -> None:
        """Give the session back."""
        self.session.rewind()
        self.form.idle.append(self.session)

    def is_of(self, call: Call, contents: bool) -> bool:
        """Whether a call is one of this branch's.

        Args:
            call: of the same name.
            contents: compare contents of tensors that are not the very same, which waits for a GPU.
        """
        if self.name != call.context.name or self.lasting.keys() != call.lasting.keys():
            return False
        same = Lasting.is_same if contents else Lasting.is_untouched
        if not all(same(self.lasting[name], tensor) for name, tensor in call.lasting.items()):
            return False
        return self.form.inputs_of(call.arguments) is not None


@dataclass
class Image:
    """The trajectory between one ``set_timesteps`` of the scheduler and the next.

    Attributes:
        timesteps: the scheduler's tensor, which makes it this image.
        timeline: its calls.
        counted: the scheduler does not say how far it is, so calls are counted.
        time: of the first call, where they are.
        branches: that are being sampled.
        latest: the last call, of all branches.
    """

    timesteps: Tensor
    timeline: Timeline
    counted: bool = False
    time: float | None = None
    branches: list[Branch] = field(default_factory=list)
    latest: int = -1

    def branch_of(self, call: Call, index: int | None, forms: Forms) -> tuple[Branch | None, int]:
        """What a call goes on with, and its number; no branch where it cannot be cached.

        Args:
            call: the call.
            index: its number, where pipeline or scheduler tell.
            forms: compiles a call that begins a trajectory.

        Raises:
            InputError: the schedule or the model cannot be used.
        """
        alike = self._alike(call)
        for branch in alike:
            here = self._following(branch, call) if index is None else index
            if branch.index == here - 1:
                return self._continued(branch, call, here, forms), here
        here = self._new_one(call) if index is None else index
        run = self.timeline.run_of(here)
        if run is not None and run[0] == here and len(alike) < _TWINS:
            branch = begun(call, run, forms)
            self.branches.append(branch)
            return branch, here
        part = self._part_of(call, index)
        return part, here if part is None else part.index + 1

    def why_not(self, call: Call, index: int) -> str:
        """Why a call is not cached."""
        if self.timeline.run_of(index) is None:
            count = len(self.timeline.times)
            return f"number {index + 1} is none of the {count} calls that the scheduler plans"
        begun = [b for b in self.branches if b.name == call.context.name]
        begun = [b for b in begun if b.form.inputs_of(call.arguments) is not None]
        named = f" of {call.context.name!r}" if call.context.name else ""
        where = f"call {index + 1} of the image"
        if not begun:
            return f"{where} has a form that no call{named} had at its beginning"
        if any(b.is_of(call, contents=True) for b in begun):
            return f"{where} does not follow the last one{named}, number {begun[0].index + 1}"
        changed = [
            name
            for name, tensor in call.lasting.items()
            if not any(name in b.lasting and b.lasting[name].is_same(tensor) for b in begun)
        ]
        return (
            f"{where} has another {' and '.join(changed) or 'mixture of inputs'} than calls{named} "
            "had at its beginning; name inputs that differ from step to step with varying=[...]"
        )

    def close(self) -> None:
        """Give the sessions back."""
        for branch in self.branches:
            branch.close()
        self.branches = []

    def _alike(self, call: Call) -> list[Branch]:
        """Branches that the call may belong to; identical tensors first, for that is cheap."""
        for contents in (False, True):
            found = [b for b in self.branches if b.is_of(call, contents)]
            if found:
                return found
        return []

    def _following(self, branch: Branch, call: Call) -> int:
        """The number of a call by its branch alone: the next one, or the same once more."""
        again = call.time is not None and call.time == branch.time
        if again and not self.timeline.stands_still(branch.index):
            return branch.index
        return branch.index + 1

    def _new_one(self, call: Call) -> int:
        """The number of a call that no branch had before."""
        if self.latest in (-1, self.timeline.begin) and call.time == self.time:
            return self.timeline.begin
        return max(self.latest, self.timeline.begin + 1)

    def _continued(self, branch: Branch, call: Call, here: int, forms: Forms) -> Branch | None:
        """The branch itself, or the next trajectory of it where time turned back."""
        run = self.timeline.run_of(here)
        if run is None or run == branch.run:
            return branch if run is not None else None
        branch.close()
        fresh = begun(call, run, forms)
        self.branches[self.branches.index(branch)] = fresh
        return fresh

    def _part_of(self, call: Call, index: int | None) -> Branch | None:
        """A branch of some rows of another one: guidance was switched off for the other half."""
        for branch in self.branches:
            if branch.name != call.context.name or index not in (None, branch.index + 1):
                continue
            if (part := _rows_of(branch, call)) is not None:
                branch.close()
                self.branches[self.branches.index(branch)] = part
                return part
        return None


def begun(call: Call, run: tuple[int, int], forms: Forms) -> Branch:
    """A branch whose trajectory begins with a call."""
    form = forms.find(call.arguments, run[1] - run[0])
    lasting = {name: Lasting.of(tensor) for name, tensor in call.lasting.items()}
    return Branch(call.context.name, form, form.session(), lasting, run)


def _rows_of(branch: Branch, call: Call) -> Branch | None:
    """The branch with the rows of its batch that a call has; None where it is no part of it."""
    inputs = branch.form.inputs_of(call.arguments)
    program = branch.form.runner.program
    if inputs is None or program.batch is None or branch.lasting.keys() != call.lasting.keys():
        return None
    for rows in _candidates(branch, call):
        if not all(_holds(branch.lasting[n], rows, t) for n, t in call.lasting.items()):
            continue
        session = branch.form.session()
        try:
            session.take_rows(branch.session, rows, inputs)
        except SessionError:  # values that are no rows of a batch, or tokens chosen by both halves
            return None
        kept = {name: Lasting.of(tensor) for name, tensor in call.lasting.items()}
        return replace(branch, session=session, lasting=kept)
    return None


def _candidates(branch: Branch, call: Call) -> Iterator[slice]:
    """Equal parts of the batch, as many rows as the call has."""
    sizes = {
        (len(branch.lasting[name].tensor), len(tensor))
        for name, tensor in call.lasting.items()
        if tensor.ndim and len(branch.lasting[name].tensor) != len(tensor)
    }
    for whole, part in sizes if len(sizes) == 1 else ():
        if part and whole % part == 0:
            yield from (slice(start, start + part) for start in range(0, whole, part))


def _holds(kept: Lasting, rows: slice, tensor: Tensor) -> bool:
    """Whether these rows of what was kept, or all of it where it has no batch, is the tensor."""
    return any(
        one.shape == tensor.shape and Lasting.of(one).is_same(tensor)
        for one in (kept.copy, kept.copy[rows] if kept.copy.ndim else kept.copy)
    )
