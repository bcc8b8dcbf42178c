"""CUDA graphs: record a step's kernels once, then launch them all at once.

A recorded graph reads and writes the addresses that it was recorded with. So inputs are copied to
addresses that stay, and the values that live between steps have places: a graph writes a value to
place 0 of its slot; one that is needed for longer is moved to the next place before place 0 is
written anew. Where each value lies is decided ahead of time, see :func:`plan_launches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachegraph.errors import BackendError, InputError
from cachegraph.graph.interface import Role

from .known import StepFunction
from .program import Made, Program

Place = tuple[str, int]  # slot, number
_RECORDABLE = ("eager", "inductor", "aoti")  # the others have streams and memory of their own
_WARM_UPS = 3  # as torch.cuda.make_graphed_callables
_RECORDING = Lock()  # torch records one graph at a time in a process


@dataclass(frozen=True)
class Launch:
    """What a step launches; steps that agree in all but the moves replay the same graph.

    Attributes:
        variant: index of the graph.
        reads: the place of each slot input, in graph order.
        sizes: the shape of each step constant; numbers of tokens are such shapes.
        moves: copies from place to place afterwards, in order, to make room for the next step.
    """

    variant: int
    reads: tuple[Place, ...]
    sizes: tuple[tuple[int, ...], ...]
    moves: tuple[tuple[Place, Place], ...] = field(default=(), compare=False)


def plan_launches(program: Program) -> tuple[Launch, ...]:
    """Where each value lies at each step; as many different ones as graphs are recorded.

    A value that a step uses for the last time stays in place 0 though the step writes there, for a
    graph writes when it has read everything.
    """
    at: dict[Made, Place] = {}
    launches: list[Launch] = []
    for number, step in enumerate(program.steps):
        interface = program.layout(number).interface
        ending = set(step.frees) & at.keys()
        holds = {place: made for made, place in at.items()}
        moves: list[tuple[Place, Place]] = []
        for slot in (port.of for port in interface.writes):
            if (first := holds.get((slot, 0))) is None or first in ending:
                continue
            free = next(i for i in count() if (slot, i) not in holds)
            for i in range(free, 0, -1):
                moves.append(((slot, i - 1), (slot, i)))
                at[holds[slot, i - 1]] = (slot, i)
        if moves:
            launches[-1] = replace(launches[-1], moves=tuple(moves))
        reads = tuple(at[port.of, step.slots[port.name]] for port in interface.slots)
        sizes = tuple(np.shape(step.constants[port.name]) for port in interface.constants)
        launches.append(Launch(step.variant, reads, sizes))
        for made in ending:
            del at[made]
        kept = [port.of for port in interface.writes if port.name in step.keeps]
        at.update({(slot, number): (slot, 0) for slot in kept})
    return tuple(launches)


class Recorder:
    """Records the graphs of a session with ``torch.cuda.graph``.

    They share one pool of memory: they run one after another, and nothing in it is needed once a
    graph is done.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: StepFunction) -> Sequence[Tensor]:
        """A few calls on the stream that will record, so that nothing of a first one is left."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                made = call()
        current.wait_stream(self._stream)
        return made

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches; gives what launches it again."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        # The outer stream is what a recording that fails returns to. Other threads may go on.
        with (
            _RECORDING,
            torch.cuda.stream(current),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay


def recorders(device: torch.device, backend: str) -> Callable[[], Recorder]:
    """What makes a recorder for each session.

    Raises:
        InputError: the device is no CUDA device.
        BackendError: the backend's work cannot be recorded.
    """
    remedy = "load with cuda_graphs=False"
    if device.type != "cuda":
        remedy = f"load with device='cuda', or {remedy}"
        raise InputError("CUDA graphs need a CUDA device", found=str(device), remedy=remedy)
    if backend not in _RECORDABLE:
        what = f"CUDA graphs cannot record backend {backend}"
        raise BackendError(what, expected=" or ".join(_RECORDABLE), remedy=remedy)
    return lambda: Recorder(device)


class Replays:
    """The recorded graphs of one branch, for one batch, and all that they read and write.

    Args:
        program: what the steps do.
        launches: see :func:`plan_launches`.
        functions: one compiled graph a variant.
        recorder: of the session.
    """

    def __init__(
        self,
        program: Program,
        launches: Sequence[Launch],
        functions: Sequence[StepFunction],
        recorder: Recorder,
    ) -> None:
        self._program, self._launches = program, launches
        self._functions, self._recorder = functions, recorder
        self._recorded: dict[Launch, Callable[[], None]] = {}
        self._places: dict[Place, Tensor] = {}
        self._results: list[Tensor] = []  # the model's outputs
        self._inputs: dict[tuple[Any, ...], Tensor] = {}
        self._copied: set[tuple[Any, ...]] = set()  # values of the request that are in place

    @property
    def nbytes(self) -> int:
        """Bytes of the places of values that live between steps."""
        return sum(t.nbytes for t in self._places.values())

    @torch.inference_mode(False)  # what is made in that mode cannot be written outside of it
    @torch.no_grad()
    def run(
        self,
        step: int,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        known: Sequence[Tensor],
    ) -> list[Tensor]:
        """Replay the graph of a step; the first time, record it.

        Args:
            step: 0, or the one after the last that succeeded.
            inputs: the model's, in graph order.
            constants: of the step.
            known: values known beforehand.

        Returns:
            The model's outputs, which no later call writes to.

        Raises:
            BackendError: the graph cannot be recorded.
        """
        launch = self._launches[step]
        variant = launch.variant
        if step == 0:
            self._copied.clear()
        given = [self._fixed(("input", i), t) for i, t in enumerate(inputs)]
        given += [self._places[place] for place in launch.reads]
        given += [self._fixed((variant, i, t.shape), t) for i, t in enumerate(constants)]
        for port, tensor in zip(self._program.layout(step).interface.known, known, strict=True):
            lasting = port.role is Role.REQUEST
            given.append(self._fixed((port.role, "" if lasting else variant, port.of), tensor))
        replay = self._recorded.get(launch) or self._record(launch, given)
        for source, target in launch.moves:
            if target not in self._places:
                self._places[target] = torch.empty_like(self._places[source])
        results = [torch.empty_like(result) for result in self._results]
        # From here on nothing is allocated: what fails after a replay could not be repeated.
        replay()
        for result, fixed in zip(results, self._results, strict=True):
            result.copy_(fixed)
        for source, target in launch.moves:
            self._places[target].copy_(self._places[source])
        return results

    def _fixed(self, key: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """A copy where the graphs look for it; what lasts for a trajectory is copied once."""
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(tensor)
        if key not in self._copied:
            self._inputs[key].copy_(tensor)
        if key[0] is Role.REQUEST:
            self._copied.add(key)
        return self._inputs[key]

    def _record(self, launch: Launch, given: Sequence[Tensor]) -> Callable[[], None]:
        layout, function = self._program.variants[launch.variant], self._functions[launch.variant]
        written = [(port.of, 0) for port in layout.interface.writes]
        made = self._recorder.warm_up(lambda: function(*given))
        outputs = len(made) - len(written)
        self._results = self._results or [torch.empty_like(t) for t in made[:outputs]]
        for place, tensor in zip(written, made[outputs:], strict=True):
            if place not in self._places:
                self._places[place] = torch.empty_like(tensor)
        targets = [*self._results, *(self._places[place] for place in written)]
        del made

        def body() -> None:
            for target, output in zip(targets, function(*given), strict=True):
                target.copy_(output)

        try:
            replay = self._recorder.record(body)
        except RuntimeError as error:
            raise BackendError(
                "the graph cannot be recorded as a CUDA graph",
                place=layout.name,
                found=str(error).splitlines()[0],
                remedy="load with cuda_graphs=False",
            ) from error
        return self._recorded.setdefault(launch, replay)
