"""Values that are known before a step runs: computed once a trajectory, handed to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cachegraph.errors import SessionError
from cachegraph.graph.interface import Interface, Role
from cachegraph.spec import version_of

from .batching import over_steps
from .program import Program
from .release import Released
from .tracking import Tracking, timestep_input

REQUEST = "request"
_SMALL = 64 * 1024  # bytes that are compared at each step, for the price of a kernel or two
StepFunction = Callable[..., Sequence[Tensor]]  # a graph that can be called


@dataclass(frozen=True)
class Prologues:
    """The graphs that compute known values from the model's inputs.

    Attributes:
        request: those that no step changes; None where there are none.
        steps: one a variant, those of one step; None where there are none.
        ahead: one a variant, those of several steps, see :func:`.batching.over_steps`;
            None where each step's are computed when it runs.
        released: weights to be given back when values were computed ahead; None for none.
    """

    request: fx.GraphModule | None = None
    steps: tuple[fx.GraphModule | None, ...] = ()
    ahead: tuple[StepFunction | None, ...] = ()
    released: Released | None = None

    @classmethod
    def of(
        cls, program: Program, modules: Mapping[str, fx.GraphModule], *, batched: bool
    ) -> Prologues:
        """The graphs by their names.

        Args:
            program: for the variants.
            modules: ``request``, and ``variant0-prologue`` and so on.
            batched: compute the values of all steps of a variant in one go, as far as timesteps
                are known and the variant allows it. Products then round differently in the last
                digit.
        """
        steps = tuple(modules.get(prologue_name(v.name)) for v in program.variants)
        clock = timestep_input(program.signature)
        ahead = tuple(
            over_steps(module, clock)
            if batched and module is not None and clock is not None and not variant.step_by_step
            else None
            for module, variant in zip(steps, program.variants, strict=True)
        )
        return cls(modules.get(REQUEST), steps, ahead)


def prologue_name(variant: str) -> str:
    """The name of a variant's prologue."""
    return f"{variant}-prologue"


@dataclass(frozen=True)
class Lasting:
    """An input that stays the same throughout a trajectory.

    Attributes:
        tensor: as it was given.
        version: how often it was written to by then.
        copy: what it held.
    """

    tensor: Tensor
    version: int
    copy: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Lasting:
        """An input as it is now."""
        return cls(tensor, version_of(tensor), tensor.clone())

    def is_untouched(self, tensor: Tensor) -> bool:
        """Whether it is the very same tensor and nobody has written to it; compares nothing."""
        return tensor is self.tensor and self.version == version_of(tensor) >= 0

    def is_same(self, tensor: Tensor) -> bool:
        """Compares the contents where the tensor is another one, was written to, or is small.

        Writes through ``.data`` or numpy are not counted by torch, so they are found in small
        tensors on the CPU only.
        """
        small = tensor.is_cpu and tensor.nbytes <= _SMALL
        return (self.is_untouched(tensor) and not small) or _equal(tensor, self.copy)


class KnownValues:
    """The known values of one trajectory.

    The timesteps of later steps are those of the program or, where it has none, those of the
    trajectory before; a step whose timestep turns out to be another one is computed by itself.
    Where steps are counted a call's timestep is not looked at, so there the program's are used.
    """

    def __init__(self, program: Program, prologues: Prologues, tracking: Tracking) -> None:
        self._program = program
        self._prologues = prologues
        self._tracking = tracking
        self._lasting: list[Lasting] = []
        self._request: dict[str, Tensor] = {}  # by the names of values
        self._rows: dict[int, dict[str, Tensor]] = {}  # step -> its own values, not used yet
        self._times: dict[int, Tensor] = {}  # step -> timestep that it is expected to have

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """A new trajectory: compute what no step changes.

        Args:
            inputs: the model's.

        Raises:
            SessionError: an input has other contents than the graphs were made for.
        """
        self._check_contents(inputs)
        self._lasting = [Lasting.of(inputs[i]) for i in self._program.lasting]
        self._rows.clear()
        request = self._prologues.request
        made = request(*inputs) if request is not None else ()
        self._request = _named(self._program.request, made)
        clock, times = self._tracking.input, self._program.timesteps
        if clock is not None and times is not None:
            # Calls may round them differently; what was learned of that is kept.
            learned = self._times.get(0)
            if learned is None or learned.shape != inputs[clock].shape:
                self.expect(times, inputs[clock])

    def end(self) -> None:
        """Give back the values of a trajectory; what was learned of timesteps is kept."""
        self._lasting, self._request = [], {}
        self._rows.clear()

    def expect(self, times: Sequence[float], like: Tensor) -> None:
        """Take these for the timesteps of the trajectories to come, until calls differ.

        Args:
            times: one a step.
            like: a timestep as the model takes it; for whole ones they are rounded.
        """
        given = times if like.is_floating_point() else map(round, times)
        self._times = {step: torch.full_like(like, time) for step, time in enumerate(given)}

    def at(self, step: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The known values that a step's graph takes, in its order.

        Args:
            step: which.
            inputs: the model's, at this step.

        Raises:
            SessionError: an input changed that has to stay the same.
        """
        self._check_lasting(step, inputs)
        known = self._program.layout(step).interface.known
        own = self._row(step, inputs) if any(p.role is Role.STEP for p in known) else {}
        return [(own if p.role is Role.STEP else self._request)[p.of] for p in known]

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        held = (self._request, *self._rows.values())
        return sum(tensor.nbytes for values in held for tensor in values.values())

    def _row(self, step: int, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        expected = self._is_expected(step, inputs)
        row = self._rows.pop(step, None)
        if row is None or not expected:
            self._compute(step, inputs, ahead=expected)
            row = self._rows.pop(step)
        return row

    def _is_expected(self, step: int, inputs: Sequence[Tensor]) -> bool:
        """Whether the call has the timestep that it was expected to have; remembers it."""
        clock = self._tracking.input
        if clock is None or self._prologues.ahead[self._program.steps[step].variant] is None:
            return False
        if self._tracking.counting:  # the timestep is not looked at
            return self._program.timesteps is not None
        time = inputs[clock]
        known = self._times.get(step)
        if known is not None and known.shape == time.shape and torch.equal(known, time):
            return True
        self._times[step] = time.clone()
        return False

    def _compute(self, step: int, inputs: Sequence[Tensor], ahead: bool) -> None:
        """The values of a step and, ahead of time, of the later steps of its variant."""
        program, clock = self._program, self._tracking.input
        variant, interface = program.steps[step].variant, program.layout(step).prologue
        compute, compute_ahead = self._prologues.steps[variant], self._prologues.ahead[variant]
        if compute is None:
            raise LookupError(f"variant {variant} has no prologue")
        if not ahead or clock is None or compute_ahead is None:
            self._rows[step] = _named(interface, compute(*inputs))
            return
        steps = [
            s
            for s in range(step, len(program.steps))
            if program.steps[s].variant == variant
            and s in self._times
            and self._times[s].shape == inputs[clock].shape
        ]
        given = list(inputs)
        given[clock] = torch.stack([self._times[s] for s in steps])
        tables = list(compute_ahead(*given))
        rows: list[list[Tensor]] = [[] for _ in steps]
        while tables:
            # Clones, so that values are freed after their step; one table at a time is twice there.
            for row, value in zip(rows, tables.pop(0), strict=True):
                row.append(value.clone(memory_format=torch.contiguous_format))
        self._rows.update((s, _named(interface, row)) for s, row in zip(steps, rows, strict=True))
        if self._prologues.released is not None:
            self._prologues.released.drop()

    def _check_contents(self, inputs: Sequence[Tensor]) -> None:
        for one in self._program.contents:
            if not one.fit(inputs[one.input]):
                name = self._program.signature.inputs[one.input][0]
                raise SessionError(
                    f"the model does something else for these contents of {name!r} "
                    "than was compiled",
                    place=one.place,
                    expected="those of the example call, which decide what is computed",
                    found="other contents",
                    remedy="compile the model with these inputs",
                )

    def _check_lasting(self, step: int, inputs: Sequence[Tensor]) -> None:
        for index, lasting in zip(self._program.lasting, self._lasting, strict=True):
            if not lasting.is_same(inputs[index]):
                name = self._program.signature.inputs[index][0]
                raise SessionError(
                    f"input {name!r} changed in the middle of a trajectory",
                    place=f"step {step}",
                    expected="the contents that it had at step 0",
                    found="other contents",
                    remedy=f"compile with varying=[{name!r}] if it differs from step to step; "
                    "two images at a time need a run.session() each",
                )


def _named(interface: Interface | None, made: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a prologue returned, by the names of the values."""
    ports = interface.outputs if interface is not None else ()
    return {port.of: tensor for port, tensor in zip(ports, made, strict=True)}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same, also where that is NaN."""
    if torch.equal(one, other):
        return True
    fractional = one.is_floating_point() or one.is_complex()
    return fractional and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
