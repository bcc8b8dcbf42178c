"""Memory of a trajectory, measured: each kind of step is run once, the state followed step by step.

What a step allocates is what torch's allocator had. What lives between steps is what the runner
keeps and frees, in the sizes that its graphs handed out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cachegraph.compiler.cost import storages
from cachegraph.runtime.known import StepFunction

OWN_ALLOCATORS = ("onnx", "tensorrt")  # torch does not see what these allocate


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


class Watched:
    """A variant's function that notes the memory blocks behind its outputs, and can stand in."""

    def __init__(self, function: StepFunction) -> None:
        self.function = function
        self.blocks: list[tuple[int, int]] = []

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        """As the function."""
        made = self.function(*given)
        self.blocks = [block for tensor in made for block in storages([tensor]).items()]
        return made

    def replay(self, *_: Tensor) -> Sequence[Tensor]:
        """Blocks of the same sizes, new ones and without contents."""
        made = {k: torch.empty(n, dtype=torch.uint8, device="meta") for k, n in self.blocks}
        return [made[key] for key, _ in self.blocks]


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Of the memory blocks behind tensors."""
    return sum(storages(tensors).values())
