"""Traces that the suite needs again and again, made once in each of its processes.

A trace follows from the model, its weights and the example call. So where all of these are as
before, down to the byte, and nobody changed what was traced, the former trace stands for it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cachegraph.bench import bench
from cachegraph.cli import _Commands
from cachegraph.compiler import compile as compiler
from cachegraph.model import trace as tracing
from cachegraph.model.trace import TracedModel
from cachegraph.search import player

# Models that are nothing but their attributes; classes of tests keep state elsewhere, too.
PLAIN = ("cachegraph.zoo.", "tests.tiny.")
_TRACES: dict[str, tuple[TracedModel, str]] = {}
_trace = tracing.trace


def fingerprint(traced: TracedModel) -> str:
    """Of a trace's graph, its shapes (what asks a free one fixes it) and its model's weights."""
    digest = hashlib.sha256(str(traced.module.graph).encode())
    for node in traced.module.graph.nodes:
        values = _pytree.tree_leaves(node.meta.get("val"))
        digest.update(str([getattr(value, "shape", value) for value in values]).encode())
    for name, tensor in traced.module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tensor.device}".encode() + _bytes(tensor))
    return digest.hexdigest()


def trace_once(model: nn.Module, *args: Any, **options: Any) -> TracedModel:
    """As ``trace``, of which every call costs a second."""
    if not f"{type(model).__module__}.".startswith(PLAIN):
        return _trace(model, *args, **options)
    written = io.BytesIO()
    _Pickler(written).dump((model, args, options))
    key = hashlib.sha256(written.getvalue()).hexdigest()
    if key not in _TRACES or fingerprint(_TRACES[key][0]) != _TRACES[key][1]:
        traced = _trace(model, *args, **options)
        _TRACES[key] = traced, fingerprint(traced)
    return _TRACES[key][0]


@contextmanager
def traced_once() -> Iterator[None]:
    """What commands and the search trace.

    A test that calls ``trace`` or ``compile`` itself may go on to change the model that it has.
    """
    invoke = _Commands.invoke

    def invoke_tracing_once(*args: Any) -> Any:
        with _in_place_of_trace(tracing, compiler, bench):
            return invoke(*args)

    with _in_place_of_trace(player), mock.patch.object(_Commands, "invoke", invoke_tracing_once):
        yield


@contextmanager
def _in_place_of_trace(*modules: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "trace", trace_once))
        yield


class _Pickler(pickle.Pickler):
    """Equal models give equal bytes: torch would write where in memory a tensor lies."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        form = type(obj), obj.dtype, obj.device, obj.shape, obj.stride(), obj.requires_grad
        return list, ((str(form), _bytes(obj)),)


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
