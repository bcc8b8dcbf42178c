"""A batch of one that a trace is not the model for, though nothing torch.export found says so.

Torch takes a symbol to be 2 or more and does not tell what it concludes from that: a batch of one
that is squeezed away, a transposed one that is contiguous, ``if batch - 1``. So the model is called
without data for one item: where it calls other functions than for the traced batch, one item is
suspect, and is tried with data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .conditions import failed
from .items import same_tensors
from .lines import quiet
from .sizes import inputs_of, symbols_of, tensors_in

_log = logging.getLogger(__name__)
_Call = tuple[str, int, tuple[Any, ...]]


@dataclass(frozen=True)
class OneItem:
    """What a call of one item is compared with.

    Attributes:
        model: what was traced.
        arguments: of the traced call.
        program: the trace.
        source: the same as a graph of operators.
        lists: arguments that are a list of the same constant for each item.
        replaying: what gives a call without data the numbers that the model reads.
        checks: operators that have no result and are left out of the graph later.
        runs: the model has weights to run with.
        restore: puts back what a call of the model changed.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    program: torch.export.ExportedProgram
    source: fx.GraphModule
    lists: Container[str]
    replaying: Callable[[], AbstractContextManager[Any]]
    checks: Container[Any]
    runs: bool
    restore: Callable[[], None]

    def conditions(self, known: Sequence[str]) -> tuple[str, ...]:
        """A condition on the batch beside those that are known, if there has to be one."""
        inputs = inputs_of(self.program)
        leaves = tensors_in(self.arguments)
        symbol, traced = str(inputs[0].shape[0]), leaves[0].shape[0]
        own = [str(value.shape[0]) == symbol if value.ndim else False for value in inputs]
        if failed(known, symbols_of(inputs, leaves) | {symbol: 1}) is not None:
            return ()
        one = self._first(own)
        if traced != 1 and self._is_suspect(one) and not self._is_right(one):
            return (f"{symbol} >= 2",)
        return ()

    def _is_suspect(self, one: Mapping[str, Any]) -> bool:
        """Whether other functions are called than for the traced batch."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        wanted = self._walk(mode, self.arguments)
        if isinstance(wanted, Exception):
            _log.info("a batch of one cannot be looked at without data: %s", wanted)
            return False
        return self._walk(mode, one) != wanted

    def _walk(self, mode: FakeTensorMode, arguments: Mapping[str, Any]) -> list[_Call] | Exception:
        try:
            given = _pytree.tree_map_only(Tensor, mode.from_tensor, dict(arguments))
            with quiet(), torch.no_grad(), mode, self.replaying(), _Calls() as calls:
                copy_context().run(self.model, **given)
        except Exception as error:  # noqa: BLE001 - whatever a model says of arguments
            return error
        finally:
            self.restore()
        return calls.found

    @torch.no_grad()
    def _is_right(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the trace does what the model does; what cannot be tried is not."""
        if not self.runs:
            return False
        try:
            given = _pytree.tree_map_only(Tensor, Tensor.clone, dict(arguments))
            wanted = copy_context().run(self.model, **given)
            self.restore()
            found = _Graph(self.source, self.checks).run(
                *_pytree.tree_leaves(dict(arguments)), enable_io_processing=False
            )
        except Exception:  # noqa: BLE001 - whatever a model says of arguments that do not fit
            return False
        finally:
            self.restore()
        return same_tensors(list(found), _pytree.tree_leaves(wanted))

    def _first(self, own: Sequence[bool]) -> dict[str, Any]:
        """The arguments of one item; ``own`` tells which tensors have a row for each."""
        rows = iter(own)

        def leaf(value: Any) -> Any:
            return value[:1].clone() if isinstance(value, Tensor) and next(rows) else value

        return {
            name: value[:1] if name in self.lists else _pytree.tree_map(leaf, value)
            for name, value in self.arguments.items()
        }


class _Calls(TorchFunctionMode):
    """Notes down what is called: its name, how many dimensions it makes, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        made = func(*args, **(kwargs or {}))
        given = _pytree.tree_leaves((args, kwargs))
        constants = tuple(one for one in given if isinstance(one, float | bool | str))
        dims = made.ndim if isinstance(made, Tensor) else -1
        self.found.append((getattr(func, "__name__", ""), dims, constants))
        return made


class _Graph(fx.Interpreter):
    """Runs a graph without its checks."""

    def __init__(self, source: fx.GraphModule, checks: Container[Any]) -> None:
        super().__init__(source)
        self._checks = checks

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that is no check."""
        return None if target in self._checks else super().call_function(target, args, kwargs)
