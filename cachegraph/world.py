"""The processes that work together, as ``torchrun`` starts them; one alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError

_PATIENCE = timedelta(days=7)  # of a process that is done, for those that are not


@dataclass(frozen=True)
class World:
    """Which process this is.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """That of the process group, if one has been made."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; each must call it."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Those of all processes, by rank; each must call it with one shape on the CPU."""
        if self.size == 1:
            return [tensor]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, tensor)
        return found

    def barrier(self) -> None:
        """Wait for all others."""
        if self.size > 1:
            dist.barrier()

    def share(self, count: int, what: str) -> slice:
        """This process's part of ``count`` equal things.

        Raises:
            InputError: they cannot be shared evenly.
        """
        if count % self.size:
            raise InputError(
                f"{what} cannot be shared by {self.size} processes",
                expected=f"a multiple of {self.size}",
                found=str(count),
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


@contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[World]:
    """The processes that ``torchrun`` has started, joined by nccl on GPUs, else by gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield World.current()
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()


def own_device(kind: str) -> torch.device:
    """The device of this process: ``cuda`` is its own GPU among those of the machine."""
    device = torch.device(kind)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device
