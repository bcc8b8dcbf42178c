"""Weights that only prologues use, out of memory while steps run.

Modulation weights are a third of a DiT, and what they make is known before a step runs. On the CPU
the file of weights is mapped, so pages that are given back are read from it again when a prologue
asks for them: nothing is copied, nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from cachegraph.errors import InputError


def only_before(graphs: Iterable[fx.Graph], prologues: Iterable[fx.Graph]) -> set[str]:
    """Names of the weights that prologues use and steps do not; of a slice, the whole weight's."""
    during, before = (
        {str(n.target).partition("[")[0] for g in found for n in g.find_nodes(op="get_attr")}
        for found in (graphs, prologues)
    )
    return before - during


class Released:
    """Mapped weights that can be given back.

    Args:
        weights: views into a file that is mapped and was not written to.

    Raises:
        InputError: this system has no way to give pages back.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = tuple(weights)
        advise = getattr(ctypes.CDLL(None), "madvise", None)
        if advise is None or not hasattr(mmap, "MADV_DONTNEED"):
            raise InputError("release=True: this system cannot give mapped pages back")
        self._advise = advise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._ranges = [found for weight in self.weights if (found := _pages(weight))[1] > 0]

    @property
    def nbytes(self) -> int:
        """Bytes that are given back: whole pages."""
        return sum(length for _, length in self._ranges)

    def drop(self) -> None:
        """Give the pages back; whoever reads them next reads the file.

        Raises:
            OSError: the system refuses.
        """
        for start, length in self._ranges:
            if self._advise(start, length, mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")


def _pages(weight: Tensor) -> tuple[int, int]:
    """Where the whole pages of a weight begin, and their bytes."""
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, stop - start


def refuse_release(device: torch.device, *, mapped: bool, exact: bool, backend: str) -> None:
    """Say where weights cannot be released.

    Args:
        device: that the weights are on.
        mapped: they are read from an artifact's folder.
        exact: the backend computes known values step by step.
        backend: its name.

    Raises:
        InputError: they are not mapped, or every step needs them.
    """
    if device.type != "cpu":
        what, found = "release=True: weights are mapped on the CPU only", str(device)
        raise InputError(what, expected="device='cpu'", found=found)
    if not mapped:
        what = "release=True: the weights are in memory alone, so they cannot be read again"
        raise InputError(what, expected="an artifact that was read from a folder")
    if exact:
        what = f"release=True: the {backend} backend computes known values at every step"
        raise InputError(what, expected="a backend that computes them ahead, such as inductor")
