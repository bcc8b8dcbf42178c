"""Backends: what runs a lowered graph.

Every backend says what in a graph it cannot take (``check``). One :class:`InMemory` compiles, if it
does at all, when a graph is called for the first time. An :class:`AheadOfTime` one writes files,
which become part of the artifact, and opens them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from cachegraph.errors import BackendError, nearest
from cachegraph.runtime.known import StepFunction
from cachegraph.spec import TensorSpec

from .named import NamedGraph

Progress = Callable[[str], None]  # is told what is being done
Graphs = Mapping[str, NamedGraph]
Weights = Mapping[str, Tensor]


class Backend:
    """What every backend has.

    Attributes:
        name: on the command line.
        exact: computes bit for bit what torch does without compiling; so what is known beforehand
            is not computed for several steps at once.
    """

    name: str
    exact = False

    def check(self, graph: fx.Graph) -> list[str]:
        """Everything that the backend cannot take, with reasons; changes nothing."""
        return []


class InMemory(Backend):
    """Runs lowered graphs as they are."""

    def load(self, module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> StepFunction:
        """A function of flat tensors.

        Args:
            module: lowered graph with its weights.
            inputs: spec of every graph input; a symbolic size may differ from call to call.
        """
        raise NotImplementedError


class AheadOfTime(Backend):
    """Compiles lowered graphs to files, and runs these."""

    def emit(self, graphs: Graphs, weights: Weights, folder: Path, progress: Progress) -> None:
        """Compile every graph into files of a folder.

        The weights are in the artifact already, so the files are to do without their contents.

        Args:
            graphs: by name.
            weights: name -> tensor, shared by all graphs.
            folder: empty; all that is in it afterwards belongs to the artifact.
            progress: is told what is being done.

        Raises:
            BackendError: something could not be compiled, or is not installed.
        """
        raise NotImplementedError

    def open(
        self, graphs: Graphs, weights: Weights, folder: Path, device: torch.device
    ) -> list[StepFunction]:
        """A function of flat tensors for each graph, in the order of ``graphs``.

        Args:
            graphs: by name, as they were emitted.
            weights: name -> tensor, on the device.
            folder: what :meth:`emit` filled; it may be gone once the functions are made.
            device: where the functions run.

        Raises:
            BackendError: the files cannot run here.
        """
        raise NotImplementedError


def get_backend(name: str) -> InMemory | AheadOfTime:
    """The backend of that name.

    Raises:
        BackendError: there is none; lists those that exist.
    """
    from .aoti.backend import Aoti
    from .eager import Eager
    from .inductor import Inductor
    from .onnx.backend import Onnx
    from .tensorrt.backend import TensorRT

    every: tuple[InMemory | AheadOfTime, ...] = (Eager(), Inductor(), Aoti(), Onnx(), TensorRT())
    known = {backend.name: backend for backend in every}
    if name not in known:
        raise BackendError(
            f"unknown backend {name!r}", expected=", ".join(known), remedy=nearest(name, known)
        )
    return known[name]


def check_all(backend: Backend, graphs: Sequence[tuple[str, fx.Graph]]) -> None:
    """Refuse graphs that a backend cannot take.

    Args:
        backend: the one asked for.
        graphs: variant name and graph.

    Raises:
        BackendError: lists every reason of every variant at once.
    """
    reasons = [f"{name}: {why}" for name, graph in graphs for why in backend.check(graph)]
    if reasons:
        raise BackendError(
            f"backend {backend.name} cannot take this model", found="; ".join(reasons)
        )
