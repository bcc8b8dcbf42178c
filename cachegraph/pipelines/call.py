"""One call of a transformer: what it is given, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from cachegraph.model.signature import TIMESTEP_NAMES


@dataclass(frozen=True)
class Context:
    """What a pipeline says of its calls with ``cache_context``.

    Attributes:
        name: of the branch, such as ``cond``.
        step_index: the how-manieth step of the pipeline, where it says so.
        steps: of the pipeline, where it says so.
    """

    name: str = ""
    step_index: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Call:
    """The arguments of a call.

    Attributes:
        arguments: by the names of ``forward``'s parameters, in their order.
        context: what the pipeline says of it.
        varying: names of inputs that differ from step to step.
    """

    arguments: Mapping[str, Any]
    context: Context
    varying: Collection[str] = ()

    @cached_property
    def clock(self) -> str:
        """The input that is the timestep; empty where none is named like it."""
        return next((name for name in TIMESTEP_NAMES if name in self.arguments), "")

    @cached_property
    def time(self) -> float | None:
        """The timestep, of the noisiest token where each has its own; waits for a GPU."""
        value = self.arguments.get(self.clock)
        if isinstance(value, Tensor):
            return float(value.max()) if value.numel() else None
        return float(value) if isinstance(value, int | float) else None

    @cached_property
    def lasting(self) -> dict[str, Tensor]:
        """The inputs that stay the same for an image: all but latent, timestep, varying ones."""
        tensors = {n: v for n, v in leaves_of(self.arguments) if isinstance(v, Tensor)}
        latent = next((name for name in tensors if name != self.clock), "")
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name not in (latent, self.clock)
            and not {name, name.partition(".")[0]} & set(self.varying)
        }


def leaves_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of everything in arguments, as signatures name it: ``ids.0``."""
    parts: Iterator[tuple[Any, Any]]
    match value:
        case Mapping():
            parts = iter(value.items())
        case list() | tuple():
            parts = enumerate(value)
        case _:
            yield path, value
            return
    for key, part in parts:
        yield from leaves_of(part, f"{path}.{key}" if path else str(key))
