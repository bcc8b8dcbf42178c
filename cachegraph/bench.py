"""Time schedules and backends against the uncached model: one process, all in turn.

A trajectory has few kinds of steps, so each kind is timed a few times and the trajectory's time is
the sum over its steps. Steps of one variant that recompute different numbers of tokens are timed
where they have the least, a middling and the most work; the time of the others lies in between in
proportion to their predicted FLOPs. The values that a step takes from earlier ones are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .bench_choice import without_choice
from .bench_result import Entry, Measured, Spread, StepKind
from .compiler import Build, assemble, build
from .cost import PlanCost
from .plan import Plan
from .reference import ReferenceRunner
from .runner import Runner, StepFunction
from .schedule import Schedule, load_schedule
from .spec import TensorSpec
from .trace import TracedModel, trace

Progress = Callable[[str, int, int], object]  # is told what is being done, how many of how many
_POINTS = 3  # steps of a variant that are timed, where they differ in tokens


class Contestant(Protocol):
    """Something whose steps can be timed."""

    entry: Entry
    plan: Plan
    cost: PlanCost

    @property
    def points(self) -> Sequence[int]:
        """The steps to time, in order."""
        ...

    def call(self, step: int) -> None:
        """Run one step."""
        ...

    def bare(self, step: int) -> bool:
        """Run the step without choosing tokens; False where it chooses none."""
        ...

    def whole(self) -> None:
        """Run a trajectory."""
        ...


@dataclass
class _Inputs:
    """The model's inputs, the same for everybody, and made-up values of earlier steps."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    symbols: Mapping[str, int]
    device: torch.device
    kept: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def value(self, site: int, part: int, age: int, spec: TensorSpec) -> Tensor:
        """Random numbers or, for whole numbers, an order of tokens; a tensor of its own a slot."""
        key = site, part, age
        sizes = spec.sizes(self.symbols)
        if key not in self.kept or self.kept[key].shape != sizes:
            noise = torch.randn(sizes, generator=self.generator)
            made = noise.to(spec.dtype) if spec.dtype.is_floating_point else noise.argsort(-1)
            self.kept[key] = made.to(self.device)
        return self.kept[key]


class _Compiled:
    """The graphs of a schedule."""

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, choice: bool) -> None:
        artifact = assemble(built, entry.backend)
        self.entry, self.plan, self.inputs = entry, built.plan, inputs
        self.cost = built.cost
        self.runner = artifact.runner()
        self.flat = built.traced.signature.flatten(inputs.args, inputs.kwargs)
        functions: list[StepFunction | None] = [
            without_choice(graph, entry.backend) if choice else None for graph in built.graphs
        ]
        self.chooses = [function is not None for function in functions]
        usual = self.runner.functions
        self.bare_runner = Runner(
            artifact.program,
            [f or u for f, u in zip(functions, usual, strict=True)],
            artifact.weights,
        )
        self.points: Sequence[int] = _points(self.plan, self.cost.flops)

    def call(self, step: int) -> None:
        self.runner.run_step(step, self.flat, self._values(step))

    def bare(self, step: int) -> bool:
        if not self.chooses[self.plan.variant_of[step]]:
            return False
        self.bare_runner.run_step(step, self.flat, self._values(step))
        return True

    def whole(self) -> None:
        session = self.runner.session()
        for step in range(self.plan.steps):
            session(*self.inputs.args, step=step, **self.inputs.kwargs)

    def _values(self, step: int) -> dict[tuple[int, int, int], Tensor]:
        program = self.runner.program
        entry = program.steps[step]
        specs = program.variants[entry.variant].inputs[len(program.signature.inputs) :]
        ages: dict[tuple[int, int], int] = {}
        values = {}
        for (site, part, made), spec in zip(entry.slots, specs, strict=False):
            age = ages[site, part] = ages.get((site, part), -1) + 1
            values[site, part, made] = self.inputs.value(site, part, age, spec)
        return values


class _Uncached:
    """The model itself; all of its steps are alike."""

    points: Sequence[int] = (0,)

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, model: nn.Module) -> None:
        self.entry, self.plan, self.inputs, self.model = entry, built.plan, inputs, model
        self.cost = built.cost

    def call(self, step: int) -> None:
        with torch.no_grad():
            self.model(*self.inputs.args, **self.inputs.kwargs)

    def bare(self, step: int) -> bool:
        return False

    def whole(self) -> None:
        for step in range(self.plan.steps):
            self.call(step)


class _Hooks:
    """The model under hooks; every step is run, for each needs those before it."""

    def __init__(self, entry: Entry, built: Build, inputs: _Inputs, model: nn.Module) -> None:
        self.entry, self.plan, self.inputs = entry, built.plan, inputs
        self.cost = built.cost
        self.points: Sequence[int] = range(built.plan.steps)
        self.runner = ReferenceRunner.of_plan(model, built.traced, built.plan, built.schedule)

    def call(self, step: int) -> None:
        self.runner(*self.inputs.args, step=step, **self.inputs.kwargs)

    def bare(self, step: int) -> bool:
        return False

    def whole(self) -> None:
        for step in range(self.plan.steps):
            self.call(step)


def _points(plan: Plan, flops: Sequence[int]) -> tuple[int, ...]:
    """The steps to time: one a variant or, where their FLOPs differ, several from low to high."""
    chosen: set[int] = set()
    for variant in plan.variants:
        ranked = sorted({flops[step]: step for step in reversed(variant.steps)}.items())
        places = np.linspace(0, len(ranked) - 1, min(_POINTS, len(ranked)))
        chosen.update(ranked[round(place)][1] for place in places)
    return tuple(sorted(chosen))


def run_bench(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    rounds: int = 5,
    whole: bool = False,
    choice: bool = False,
    progress: Progress,
) -> list[Measured]:
    """Time every entry.

    Args:
        model: in eval mode.
        args: inputs, the batch as it is to be timed.
        kwargs: inputs by name.
        entries: what to compare, in the order of the result.
        rounds: how often each kind of step is timed; everybody takes a turn in each.
        whole: run whole trajectories too, as many.
        choice: also time graphs that take the first tokens instead of choosing some.
        progress: is told what is being done.

    Raises:
        InputError: a schedule or backend does not fit the model.
    """
    progress("tracing the model", 0, 1)
    traced = trace(model, args, kwargs)
    contestants = _contestants(model, traced, args, kwargs, entries, choice, progress)
    first, samples, bare = [], [], []
    for index, contestant in enumerate(contestants):
        progress(f"first calls: {_label(contestant.entry)}", index, len(contestants))
        began = time.perf_counter()
        for step in contestant.points:
            contestant.call(step)
            contestant.bare(step)
        first.append(time.perf_counter() - began)
        samples.append({step: list[float]() for step in contestant.points})
        bare.append({step: list[float]() for step in contestant.points})
    device = next(model.parameters()).device
    for number in range(rounds):
        for index, contestant in enumerate(contestants):
            done = number * len(contestants) + index
            progress(f"timing {_label(contestant.entry)}", done, rounds * len(contestants))
            for step in contestant.points:
                samples[index][step].append(_seconds(device, contestant.call, step)[0])
                seconds, ran = _seconds(device, contestant.bare, step)
                if ran:
                    bare[index][step].append(seconds)
    wholes: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds if whole else 0):
        for index, contestant in enumerate(contestants):
            done = number * len(contestants) + index
            progress(f"whole: {_label(contestant.entry)}", done, rounds * len(contestants))
            wholes[index].append(_seconds(device, contestant.whole)[0])
    return [
        _measured(one, samples[i], bare[i], wholes[i], first[i])
        for i, one in enumerate(contestants)
    ]


def _contestants(
    model: nn.Module,
    traced: TracedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    entries: Sequence[Entry],
    choice: bool,
    progress: Progress,
) -> list[Contestant]:
    inputs = _Inputs(args, kwargs, traced.symbols, next(model.parameters()).device)
    steps = max((e.schedule.steps for e in entries if e.schedule is not None), default=1)
    builds: dict[str, Build] = {}
    found: list[Contestant] = []
    for number, entry in enumerate(entries):
        schedule = entry.schedule or full_schedule(steps)
        if schedule.digest() not in builds:
            progress(f"rewriting {entry.name}", number, len(entries))
            builds[schedule.digest()] = build(model, schedule, traced=traced)
        built = builds[schedule.digest()]
        if entry.hooks:
            found.append(_Hooks(entry, built, inputs, model))
        elif entry.schedule is None and entry.backend == "eager":
            found.append(_Uncached(entry, built, inputs, model))
        else:
            found.append(_Compiled(entry, built, inputs, choice))
    return found


def full_schedule(steps: int) -> Schedule:
    """The schedule that caches nothing."""
    return load_schedule({"cachegraph": 1, "steps": steps, "policy": {"method": "full"}})


def _seconds(device: torch.device, run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """How long a call takes, the device's work included, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = run(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def _label(entry: Entry) -> str:
    return f"{entry.name}, {'hooks' if entry.hooks else entry.backend}"


def _measured(
    one: Contestant,
    samples: Mapping[int, Sequence[float]],
    bare: Mapping[int, Sequence[float]],
    whole: Sequence[float],
    first: float,
) -> Measured:
    by_round = _per_step(one, samples)
    chosen = {step: found for step, found in bare.items() if found}
    model_itself = isinstance(one, _Uncached)
    kinds = []
    for variant in one.plan.variants:
        at = list(variant.steps)
        points = [step for step in chosen if step in at]
        # Each step against itself, so that the share does not hang on which steps were timed.
        shares = [
            1 - float(np.median(np.asarray(chosen[p]) / np.asarray(samples[p]))) for p in points
        ]
        kinds.append(
            StepKind(
                variant.name,
                len(at),
                float(np.mean([one.cost.flops[s] for s in at])),
                Spread.of([float(found[at].mean()) for found in by_round]),
                float(np.mean(shares)) if shares else None,
            )
        )
    return Measured(
        name=one.entry.name,
        backend="hooks" if one.entry.hooks else "model" if model_itself else one.entry.backend,
        trajectory=Spread.of([float(found.sum()) for found in by_round]),
        whole=Spread.of(whole) if whole else None,
        steps=tuple(float(s) for s in np.median(np.stack(by_round), axis=0)),
        kinds=tuple(kinds),
        limit=one.cost.limit,
        first_calls=first,
    )


def _per_step(one: Contestant, samples: Mapping[int, Sequence[float]]) -> list[Any]:
    """Seconds of every step, for each round."""
    rounds = len(next(iter(samples.values())))
    result = []
    for number in range(rounds):
        seconds = np.zeros(one.plan.steps)
        for variant in one.plan.variants:
            timed = sorted((one.cost.flops[s], s) for s in variant.steps if s in samples)
            known = [samples[step][number] for _, step in timed]
            work = [flops for flops, _ in timed]
            for step in variant.steps:
                exact = samples.get(step)
                between = float(np.interp(one.cost.flops[step], work, known))
                seconds[step] = exact[number] if exact is not None else between
        result.append(seconds)
    return result
