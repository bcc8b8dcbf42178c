"""Calls that differ in the symbols of token counts alone are looked at once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses import FakeTensorMode  # noqa: TID251 - has no public name
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cachegraph.model import shapes


def test_each_call_keeps_its_own_symbols() -> None:
    mode, found, graph = FakeTensorMode(shape_env=ShapeEnv()), shapes.Shapes(), fx.Graph()
    calls = []
    for name in ("tokens0", "tokens1"):
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        given = graph.placeholder(name)
        given.meta["val"] = mode.from_tensor(torch.arange(3), symbolic_context=context)
        found.inputs[name] = given.meta["val"]
        calls.append(graph.call_function(torch.ops.aten.unsqueeze.default, (given, 1)))
    first, second = (call.all_input_nodes[0].meta["val"].shape[0] for call in calls)
    assert str(first) != str(second)
    with mock.patch.object(shapes, "_evaluate", wraps=shapes._evaluate) as evaluated:
        made = [found.evaluate(call) for call in calls]
    assert [str(value.shape) for value in made] == [
        f"torch.Size([{s}, 1])" for s in (first, second)
    ]
    assert len(evaluated.mock_calls) == 1
