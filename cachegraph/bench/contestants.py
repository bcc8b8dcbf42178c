"""What a benchmark compares: the model itself, the model under hooks, compiled step graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachegraph.backends import get_backend
from cachegraph.compiler.compile import Build, assemble, build
from cachegraph.compiler.cost import (
    known_bytes,
    moved_bytes,
    predict_peaks,
    token_sizes,
    working_bytes,
)
from cachegraph.graph.interface import Port, Role
from cachegraph.model.trace import TracedModel
from cachegraph.oracle.reference import ReferenceRunner
from cachegraph.oracle.trial import Progress, calls, times
from cachegraph.passes import OPTIONAL
from cachegraph.plan.plan import Plan
from cachegraph.runtime.known import StepFunction
from cachegraph.runtime.program import Made
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.schedule import uncached

from .choice import without_choice
from .memory import OWN_ALLOCATORS, Watched, allocated, nbytes
from .result import Compared, Entry, Memory

_POINTS = 3  # steps of a variant that are timed, where they differ in tokens


@dataclass
class _Inputs:
    """The model's inputs, the same for everybody, and made-up values of earlier steps."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    symbols: Mapping[str, int]
    device: torch.device
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def value(self, slot: Port) -> Tensor:
        """Random numbers or, for whole numbers, an order of tokens; a tensor of its own a slot."""
        key, spec = (slot.of, slot.age), slot.spec
        sizes = spec.sizes(self.symbols)
        if key not in self.kept or self.kept[key].shape != sizes:
            noise = torch.randn(sizes, generator=self.generator)
            made = noise.to(spec.dtype) if spec.dtype.is_floating_point else noise.argsort(-1)
            self.kept[key] = made.to(self.device)
        return self.kept[key]


class Contestant:
    """Something whose steps can be timed; by default nothing of a step is known or chosen."""

    points: Sequence[int]  # the steps to time, in order
    moved: Sequence[int] = ()  # bytes that each step must read and write; empty where not known

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs) -> None:
        self.entry, self.built, self.inputs = entry, built, inputs
        self.plan, self.cost = built.plan, built.cost

    def call(self, step: int) -> None:
        """Run one step."""
        raise NotImplementedError

    def bare(self, step: int) -> bool:
        """Run the step without choosing tokens; False where it chooses none."""
        return False

    def before(self) -> None:
        """Compute what is known before the first step."""

    def whole(self) -> None:
        """Run a trajectory."""
        for step in range(self.plan.steps):
            self.call(step)

    def memory(self) -> Memory | None:
        """Of a trajectory; None where it cannot be told. All points have been called before."""
        return None

    def sampled(self) -> Callable[..., Any]:
        """Something to call as the model, for the calls of a trajectory in order."""
        raise NotImplementedError


class _Compiled(Contestant):
    """The graphs of a schedule."""

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, choice: bool) -> None:
        super().__init__(entry, built, inputs)
        artifact = assemble(built, entry.backend)
        self.runner = artifact.runner()
        self.flat = built.traced.signature.flatten(inputs.args, inputs.kwargs)
        functions: list[StepFunction | None] = (
            without_choice(artifact, built.graphs) if choice else [None] * len(built.graphs)
        )
        self.chooses = [function is not None for function in functions]
        usual = self.runner.functions
        self.bare_runner = Runner(
            artifact.program,
            [f or u for f, u in zip(functions, usual, strict=True)],
            artifact.weights,
        )
        self.points = _points(self.plan, self.cost.flops)
        self.times = times(artifact.program)
        # A backend that is not exact computes known values for all steps at once.
        self.ahead = not get_backend(entry.backend).exact
        self.moved = _moved(built, ahead=self.ahead)
        self.known: dict[int, list[Tensor]] = {}
        self.session = self.runner.session()
        self.calls = list(calls(artifact.program, seed=0))

    @torch.no_grad()
    def call(self, step: int) -> None:
        self.runner.run_step(step, self.flat, self._values(step), self._known(step))

    @torch.no_grad()
    def bare(self, step: int) -> bool:
        if not self.chooses[self.plan.variant_of[step]]:
            return False
        self.bare_runner.run_step(step, self.flat, self._values(step), self._known(step))
        return True

    @torch.no_grad()
    def before(self) -> None:
        known = self.runner.known_values()
        clock = self.runner.tracking.input
        if clock is not None:
            known.expect(self.times, self.flat[clock])
        known.begin(self.flat)
        first = {variant.steps[0] for variant in self.plan.variants} if self.ahead else set[int]()
        for step in sorted({*self.points, *first}):
            self.known[step] = known.at(step, self._at(step))

    def _known(self, step: int) -> list[Tensor]:
        if self.ahead:
            return self.known[step]
        known = self.runner.known_values()
        known.begin(self.flat)
        return known.at(step, self.flat)

    def _at(self, step: int) -> list[Tensor]:
        """The model's inputs at a step: only the timestep differs."""
        clock = self.runner.tracking.input
        return [
            torch.full_like(t, self.times[step]) if i == clock else t
            for i, t in enumerate(self.flat)
        ]

    def whole(self) -> None:
        for step, kwargs in enumerate(self.calls):
            self.session(**kwargs, step=step)

    @torch.no_grad()
    def memory(self) -> Memory:
        built, cost, plan, runner = self.built, self.cost, self.plan, self.runner
        device, at = runner.device, self._at
        variants = [Watched(function) for function in runner.functions]
        watched = Runner(runner.program, variants, built.weights)
        known, clock = runner.known_values(), runner.tracking.input
        if clock is not None:
            known.expect(self.times, at(0)[clock])
        known.begin(at(0))
        work, before, tables = [0] * len(variants), [0] * plan.steps, [0] * plan.steps
        for step, variant in enumerate(plan.variant_of):
            compute, held = partial(known.at, step, at(step)), known.nbytes
            if step == plan.variants[variant].steps[0]:
                rise, row = allocated(device, compute)
                before[step] = held + rise
            else:
                row = compute()
            ports = runner.program.layout(step).interface.known
            own = [t for t, port in zip(row, ports, strict=True) if port.role is Role.STEP]
            tables[step] = known.nbytes + nbytes(own)
            if step in self.points:
                run = partial(watched.run_step, step, at(step), self._values(step), row)
                work[variant] = max(work[variant], allocated(device, run)[0])
        slots, kept = [0], dict[Made, Tensor]()
        replayed = Runner(runner.program, [v.replay for v in variants], built.weights)
        for step in range(plan.steps):
            replayed.run_step(step, (), kept, ())
            slots.append(nbytes(list(kept.values())))
        lasting = nbytes(list(built.weights.values())) + nbytes(at(0))
        peak = max(
            lasting + slots[step] + max(tables[step] + work[variant], before[step])
            for step, variant in enumerate(plan.variant_of)
        )
        expected = known_bytes(plan, built.graphs, cost.symbols, ahead=self.ahead)
        peaks = predict_peaks(plan, built.graphs, cost, compiled=self.ahead)
        return Memory(
            weights=Compared(cost.weight_bytes, nbytes(list(built.weights.values()))),
            slots=Compared(max(cost.cache_bytes), max(slots)),
            known=Compared(max(expected), max(tables)),
            peak=Compared(max(peaks), None if self.entry.backend in OWN_ALLOCATORS else peak),
        )

    def sampled(self) -> Callable[..., Any]:
        return self.runner.session()

    def _values(self, step: int) -> dict[Made, Tensor]:
        program = self.runner.program
        made = program.steps[step].slots
        slots = program.layout(step).interface.slots
        return {(slot.of, made[slot.name]): self.inputs.value(slot) for slot in slots}


class _Uncached(Contestant):
    """The model itself; all of its steps are alike."""

    points = (0,)

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, model: nn.Module) -> None:
        super().__init__(entry, built, inputs)
        self.model = model
        self.moved = (moved_bytes(built.traced.module, self.cost.symbols),) * self.plan.steps

    def call(self, step: int) -> None:
        with torch.no_grad():
            self.model(*self.inputs.args, **self.inputs.kwargs)

    @torch.no_grad()
    def memory(self) -> Memory:
        model, cost, signature = self.model, self.cost, self.built.traced.signature
        flat = signature.flatten(self.inputs.args, self.inputs.kwargs)
        weights = nbytes([*model.parameters(), *model.buffers()])
        # Its code may hold values longer than it must.
        work = working_bytes(self.built.traced.module, cost.symbols)[0]
        given = sum(spec.nbytes(cost.symbols) for _, spec in signature.inputs)
        rise = allocated(flat[0].device, partial(self.call, 0))[0]
        return Memory(
            weights=Compared(cost.weight_bytes, weights),
            slots=Compared(0, 0),
            known=Compared(0, 0),
            peak=Compared(cost.weight_bytes + given + work, weights + nbytes(flat) + rise),
        )

    def sampled(self) -> Callable[..., Any]:
        return self.model


class _Hooks(Contestant):
    """The model under hooks; every step is run, for each needs those before it."""

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, model: nn.Module) -> None:
        super().__init__(entry, built, inputs)
        self.points = range(built.plan.steps)
        self.runner = ReferenceRunner.of_plan(model, built.traced, built.plan, built.schedule)

    def call(self, step: int) -> None:
        self.runner(*self.inputs.args, step=step, **self.inputs.kwargs)

    def sampled(self) -> Callable[..., Any]:
        self.runner.reset()
        return self.runner


def _moved(built: Build, *, ahead: bool) -> list[int]:
    """Bytes that each step must read and write, and its prologue where that is part of it."""
    moved, symbols = [], built.cost.symbols
    for step, variant in enumerate(built.plan.variant_of):
        graph = built.graphs[variant]
        prologue = 0 if ahead or graph.prologue is None else moved_bytes(graph.prologue, symbols)
        moved.append(prologue + moved_bytes(graph.module, {**symbols, **token_sizes(graph, step)}))
    return moved


def _points(plan: Plan, flops: Sequence[int]) -> tuple[int, ...]:
    """The steps to time: one a variant or, where their FLOPs differ, several from low to high."""
    chosen: set[int] = set()
    for variant in plan.variants:
        ranked = sorted({flops[step]: step for step in reversed(variant.steps)}.items())
        places = np.linspace(0, len(ranked) - 1, min(_POINTS, len(ranked)))
        chosen.update(ranked[round(place)][1] for place in places)
    return tuple(sorted(chosen))


def make_contestants(
    model: nn.Module,
    traced: TracedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    entries: Sequence[Entry],
    choice: bool,
    progress: Progress,
) -> list[Contestant]:
    """One contestant an entry, none of them called yet; for the arguments see ``run_bench``."""
    inputs = _Inputs(args, kwargs, traced.symbols, next(model.parameters()).device)
    steps = max((e.schedule.steps for e in entries if e.schedule is not None), default=1)
    builds: dict[tuple[str, ...], Build] = {}
    found: list[Contestant] = []
    for number, entry in enumerate(entries):
        schedule = entry.schedule or uncached(steps)
        disable = entry.disable if entry.schedule else OPTIONAL
        key = schedule.digest(), *disable
        if key not in builds:
            progress(f"rewriting {entry.name}", number, len(entries))
            builds[key] = build(model, schedule, traced=traced, disable=disable)
        built = builds[key]
        if entry.hooks:
            found.append(_Hooks(entry, built, inputs, model))
        elif entry.is_model:
            found.append(_Uncached(entry, built, inputs, model))
        else:
            found.append(_Compiled(entry, built, inputs, choice))
    return found
