"""The suite's own memory of traces: nothing that differs shares one."""

from __future__ import annotations

import pytest

from tests.models import dit_steps, tiny_dit
from tests.traces import trace_once

ARGS = dit_steps(1)[0]


def changes_nothing(*_: object) -> None:
    """A hook."""


def test_equal_models_share_a_trace() -> None:
    first = trace_once(tiny_dit(depth=1), ARGS)
    assert trace_once(tiny_dit(depth=1), ARGS) is first
    assert trace_once(tiny_dit(depth=1, seed=1), ARGS) is not first
    assert trace_once(tiny_dit(depth=1), ARGS, dynamic_batch=False) is not first
    hooked = tiny_dit(depth=1)
    hooked.register_forward_hook(changes_nothing)
    assert trace_once(hooked, ARGS) is not first


@pytest.mark.parametrize("part", ["weights", "graph"])
def test_what_was_changed_is_traced_anew(part: str) -> None:
    first = trace_once(tiny_dit(depth=1, seed=2), ARGS)
    if part == "weights":
        next(iter(first.module.parameters())).data.add_(1.0)
    else:
        node = next(n for n in first.module.graph.nodes if n.op == "call_function")
        node.name = f"{node.name}_changed"
    assert trace_once(tiny_dit(depth=1, seed=2), ARGS) is not first
