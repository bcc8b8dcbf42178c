"""Backends: what runs a lowered graph.

A backend answers three questions: :meth:`Backend.check` (what in this graph can it not take?),
:meth:`Backend.load` (a function that runs it) and whether compiling happens ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import fx

from cachegraph.errors import BackendError, nearest
from cachegraph.known import StepFunction
from cachegraph.spec import TensorSpec


class Backend(Protocol):
    """Runs lowered graphs.

    Attributes:
        name: on the command line.
        exact: computes bit for bit what torch does without compiling; so what is known beforehand
            is not computed for several steps at once.
    """

    name: str
    exact: bool

    def check(self, graph: fx.Graph) -> list[str]:
        """Everything that the backend cannot take, with reasons; changes nothing."""
        ...

    def load(self, module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> StepFunction:
        """A function of flat tensors.

        Args:
            module: lowered graph with its weights.
            inputs: spec of every graph input; a symbolic size may differ from call to call.
        """
        ...


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: there is none; lists those that exist.
    """
    from .eager import Eager
    from .inductor import Inductor

    known: dict[str, Backend] = {b.name: b for b in (Eager(), Inductor())}
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
