"""What ran in a pipeline, in numbers."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cachegraph.plan.action import Compute, Refresh

from .forms import Form

COMPUTED, REUSED, PARTLY, UNCACHED = "computed", "reused", "partly reused", "uncached"


@dataclass
class Tally:
    """Counts of one transformer.

    Attributes:
        images: begun.
        calls: kind -> how many.
        flops: of all cached calls, as predicted.
        uncached_flops: what these calls had cost without a cache.
        seconds: kind -> seconds of its calls, first ones of each graph left out: these compile.
        timed: kind -> how many calls that were.
    """

    images: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    uncached_flops: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    timed: Counter[str] = field(default_factory=Counter)
    _warm: set[tuple[int, int]] = field(default_factory=set)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def cached(self, form: Form, step: int) -> Iterator[None]:
        """Count and time a call of a form; one that fails is not counted."""
        program = form.runner.program
        kind = kind_of(program.rows[step])
        graph = (id(form), program.steps[step].variant)
        with self._timed(kind, form.runner.device, graph in self._warm):
            yield
        self._warm.add(graph)
        self.calls[kind] += 1
        self.flops += program.cost.flops[step]
        self.uncached_flops += program.cost.full_flops

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Count a call of the model itself."""
        yield
        self.calls[UNCACHED] += 1

    @property
    def seconds_saved(self) -> float:
        """What reused calls would have taken more, had they been computed."""
        for kind, begin, end in self._events:
            end.synchronize()
            self.seconds[kind] += begin.elapsed_time(end) / 1000
        self._events.clear()
        if not self.timed[COMPUTED]:
            return 0.0
        whole = self.seconds[COMPUTED] / self.timed[COMPUTED]
        return sum(
            self.calls[kind] * (whole - self.seconds[kind] / self.timed[kind])
            for kind in (REUSED, PARTLY)
            if self.timed[kind]
        )

    @contextmanager
    def _timed(self, kind: str, device: torch.device, warm: bool) -> Iterator[None]:
        if device.type == "cuda" and warm:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds[kind] += time.perf_counter() - start if warm else 0
        self.timed[kind] += warm


def kind_of(row: tuple[object, ...]) -> str:
    """Whether a step computes everything, reuses wherever it may, or does some of both."""
    if all(isinstance(action, Compute) for action in row):
        return COMPUTED
    return PARTLY if any(isinstance(action, Compute | Refresh) for action in row) else REUSED
