"""Memory of a trajectory, measured: each kind of step is run once, the state followed step by step.

What a step allocates is what torch's allocator had. What lives between steps is what the runner
keeps and frees, in the sizes that its graphs handed out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cachegraph.backends import get_backend
from cachegraph.compiler.compile import Build
from cachegraph.compiler.cost import known_bytes, predict_peaks, storages, working_bytes
from cachegraph.graph.interface import Role
from cachegraph.runtime.known import StepFunction
from cachegraph.runtime.program import Made
from cachegraph.runtime.runner import Runner

from .result import Compared, Memory

_OWN_ALLOCATORS = ("onnx", "tensorrt")  # torch does not see what these allocate


def allocated(device: torch.device, run: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes that a call allocated at a time, beyond those in use before; and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return torch.cuda.max_memory_allocated(device) - before, result
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells on stderr when it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    events: Any = seen.profiler
    events = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result


class _Watched:
    """A variant's function that notes the memory blocks behind its outputs, and can stand in."""

    def __init__(self, function: StepFunction) -> None:
        self.function = function
        self.blocks: list[tuple[int, int]] = []

    def call(self, *given: Tensor) -> Sequence[Tensor]:
        made = self.function(*given)
        self.blocks = [block for tensor in made for block in storages([tensor]).items()]
        return made

    def replay(self, *_: Tensor) -> Sequence[Tensor]:
        """Blocks of the same sizes, new ones and without contents."""
        made = {k: torch.empty(n, dtype=torch.uint8, device="meta") for k, n in self.blocks}
        return [made[key] for key, _ in self.blocks]


def compiled_memory(
    built: Build,
    backend: str,
    runner: Runner,
    at: Callable[[int], Sequence[Tensor]],
    values: Callable[[int], dict[Made, Tensor]],
    points: Sequence[int],
    times: Sequence[float],
) -> Memory:
    """Memory of a trajectory of compiled graphs that have all been called before.

    ``at`` gives the model's inputs at a step and ``values`` made-up values of earlier ones;
    ``points`` are the steps to run, at least one of each variant.
    """
    cost, plan, device = built.cost, built.plan, runner.device
    variants = [_Watched(function) for function in runner.functions]
    watched = Runner(runner.program, [v.call for v in variants], built.weights)
    known, clock = runner.known_values(), runner.tracking.input
    if clock is not None:
        known.expect(times, at(0)[clock])
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
        tables[step] = known.nbytes + _nbytes(own)
        if step in points:
            run = partial(watched.run_step, step, at(step), values(step), row)
            work[variant] = max(work[variant], allocated(device, run)[0])
    slots, kept = [0], dict[Made, Tensor]()
    replayed = Runner(runner.program, [v.replay for v in variants], built.weights)
    for step in range(plan.steps):
        replayed.run_step(step, (), kept, ())
        slots.append(_nbytes(list(kept.values())))
    lasting = _nbytes(list(built.weights.values())) + _nbytes(at(0))
    peak = max(
        lasting + slots[step] + max(tables[step] + work[variant], before[step])
        for step, variant in enumerate(plan.variant_of)
    )
    fuses = not get_backend(backend).exact
    expected = known_bytes(plan, built.graphs, cost.symbols, ahead=fuses)
    peaks = predict_peaks(plan, built.graphs, cost, compiled=fuses)
    return Memory(
        weights=Compared(cost.weight_bytes, _nbytes(list(built.weights.values()))),
        slots=Compared(max(cost.cache_bytes), max(slots)),
        known=Compared(max(expected), max(tables)),
        peak=Compared(max(peaks), None if backend in _OWN_ALLOCATORS else peak),
    )


def model_memory(
    model: nn.Module, built: Build, inputs: Sequence[Tensor], call: Callable[[], object]
) -> Memory:
    """Memory of calls of the model itself, whose code may hold values longer than it must."""
    weights, cost = _nbytes([*model.parameters(), *model.buffers()]), built.cost
    work = working_bytes(built.traced.module, cost.symbols)[0]
    given = sum(s.nbytes(cost.symbols) for _, s in built.traced.signature.inputs)
    rise = allocated(inputs[0].device, call)[0]
    return Memory(
        weights=Compared(cost.weight_bytes, weights),
        slots=Compared(0, 0),
        known=Compared(0, 0),
        peak=Compared(cost.weight_bytes + given + work, weights + _nbytes(inputs) + rise),
    )


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Of the memory blocks behind tensors."""
    return sum(storages(tensors).values())
