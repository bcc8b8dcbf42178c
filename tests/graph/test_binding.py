"""Inputs that are said to vary are the model's; what is known when is in ``test_known``."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import networkx
import pytest
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.errors import InputError
from cachegraph.graph.binding import (
    Binding,
    Roofline,
    binding_times,
    model_bindings,
    worth_hoisting,
)
from tests.models import compile_traced, fora, shared_dit

UNKNOWN = "varying: unknown input 'q'; expected one of x, t, y"


def test_when_inputs_are_known() -> None:
    assert model_bindings("xty", "t") == (Binding.DYNAMIC, Binding.STEP, Binding.REQUEST)
    assert model_bindings("xty", "t", ["y"]) == (Binding.DYNAMIC, Binding.STEP, Binding.DYNAMIC)
    assert model_bindings("xty", None) == (Binding.DYNAMIC,) * 3


@pytest.mark.parametrize("timestep", ["t", None])
def test_only_inputs_of_the_model_vary(timestep: str | None) -> None:
    with pytest.raises(InputError) as caught:
        model_bindings(["x", "t", "class_labels"], timestep, ["class_label"])
    assert str(caught.value) == (
        "varying: unknown input 'class_label'; expected one of x, t, class_labels; did you mean "
        "'class_labels'?"
    )


@pytest.mark.parametrize(
    ("varying", "message"),
    [
        (["y", "q"], UNKNOWN),
        ("y", "varying: a text instead of a list; expected names in a list: ['y']"),
    ],
)
def test_compile_refuses_them(varying: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        compile_traced(*shared_dit(depth=1), fora(2, 2), backend="inductor", varying=varying)
    assert str(caught.value) == message


def test_so_does_the_command() -> None:
    line = ["compile", "digits", "-s", "fora-n3", "--varying", "q", "-o", "nowhere.cgraph"]
    found = CliRunner().invoke(cli.app, line)
    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"error: {UNKNOWN}\n")


def test_costs_are_exact() -> None:
    """Sums of floats depend on their order, and values that cost the same would change places."""
    graph = shared_dit()[1].module.graph
    times = binding_times(graph, {"t": Binding.STEP, "y": Binding.REQUEST})
    with mock.patch.object(networkx, "minimum_cut", wraps=networkx.minimum_cut) as cut:
        worth_hoisting(graph, times, 3, Roofline(flops_per_byte=7.0))
    costs = [cost for *_, cost in cut.mock_calls[0].args[0].edges.data("capacity", default=0)]
    assert len(costs) > 3
    assert all(isinstance(cost, int) or cost == math.inf for cost in costs)
