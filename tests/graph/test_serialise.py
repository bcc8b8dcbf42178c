"""Graphs as JSON: they come back as they were, and bring nothing along that runs."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from cachegraph.errors import ArtifactError
from cachegraph.graph.serialise import graph_from_json, graph_to_json, weights_module
from tests.models import own_operator
from tests.tiny import call, stages, tiny

aten = torch.ops.aten
CPU = torch.device("cpu")


def round_trip(graph: fx.Graph, device: torch.device = CPU) -> fx.Graph:
    return graph_from_json(json.loads(json.dumps(graph_to_json(graph))), device)


def graph_of(build: Callable[[fx.Graph, fx.Node], Any]) -> fx.Graph:
    graph = fx.Graph()
    graph.output((build(graph, graph.placeholder("x")),))
    return graph


def lines(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.op, n.name, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


# --- there and back


def test_graphs_come_back_as_they_were() -> None:
    for step in stages()["lower"]:
        assert lines(round_trip(step.graph)) == lines(step.graph)


def test_a_graph_that_came_back_computes_the_same() -> None:
    step = stages()["lower"][0]
    root = weights_module(dict(tiny().named_parameters()))
    again = fx.GraphModule(root, round_trip(step.graph))
    for here, wanted in zip(again(*call(1)), step.module(*call(1)), strict=True):
        assert torch.equal(here, wanted)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 7, -1, 2**63 - 1, 1.5, 1e-5, "tanh", [1, [2.0, None]], slice(1, None, 2)),
        *(math.inf, -math.inf, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.strided),
        *(torch.contiguous_format, torch.channels_last_3d, "quo\"te\n'"),
    ],
    ids=str,
)
def test_every_kind_of_argument(value: Any) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.add.Tensor, (x, value), {"alpha": value})

    node = list(round_trip(graph_of(build)).nodes)[1]
    assert node.args[1] == node.kwargs["alpha"] == value
    assert type(node.args[1]) is type(value) or isinstance(value, list)


def test_not_a_number_comes_back() -> None:
    graph = graph_of(lambda g, x: g.call_function(aten.mul.Scalar, (x, math.nan)))
    assert math.isnan(list(round_trip(graph).nodes)[1].args[1])


def test_the_device_is_that_of_the_loader() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        made = graph.call_function(aten.arange.default, (4,), {"device": CPU})
        return graph.call_function(aten.to.device, (made, torch.device("cuda:1"), torch.half))

    meta = torch.device("meta")
    _, made, moved, _ = round_trip(graph_of(build), meta).nodes
    assert made.kwargs == {"device": meta}
    assert moved.args[1:] == (meta, torch.float16)


def test_sizes_are_worked_out_by_plain_functions() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        size = graph.call_function(aten.sym_size.int, (x, 0))
        half = graph.call_function(operator.floordiv, (size, 2))
        most = graph.call_function(torch.sym_max, (half, 1))
        rounded = graph.call_function(math.ceil, (most,))
        return graph.call_function(aten.slice.Tensor, (x, 0, 0, rounded))

    graph = graph_of(build)
    again = fx.GraphModule(nn.Module(), round_trip(graph))
    assert lines(again.graph) == lines(graph)
    assert [len(again(torch.zeros(n))[0]) for n in (0, 1, 2, 7)] == [0, 1, 1, 3]


def test_weights_stand_under_their_names() -> None:
    names = {"pos": torch.zeros(1), "blocks.0.a": torch.ones(2), "blocks.0.b-1.c": torch.ones(3)}
    root = weights_module(names)
    assert {name: id(t) for name, t in root.named_buffers()} == {n: id(t) for n, t in names.items()}


# --- what cannot be written


@own_operator
def twice(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.ops.elsewhere.twice.default, "operation elsewhere.twice.default"),
        (torch.relu, "operation <built-in method relu"),
        (operator.attrgetter, "operation <class 'operator.attrgetter'>"),
        (print, "operation <built-in function print>"),
    ],
)
def test_other_operations_are_not_written(target: Callable[..., Any], said: str) -> None:
    graph = graph_of(lambda g, x: g.call_function(target, (x,)))
    with pytest.raises(ArtifactError) as caught:
        graph_to_json(graph)
    message = str(caught.value)
    assert message.startswith("node ")
    assert f"{said}" in message
    assert message.endswith(
        "cannot be written to an artifact; expected aten operators and arithmetic on sizes"
    )


def test_other_arguments_are_not_written() -> None:
    graph = graph_of(lambda g, x: g.call_function(aten.add.Tensor, (x, torch.zeros(2))))
    with pytest.raises(ArtifactError, match="node add_tensor: a Tensor argument cannot be written"):
        graph_to_json(graph)


# --- what is not read

X = {"op": "placeholder", "name": "x", "target": "x"}
OUT = {"op": "output", "name": "output", "target": "output", "args": [[{"node": "x"}]]}
TOUCH = "__import__('pathlib').Path('made').touch()"


def run(nodes: list[Any]) -> Any:
    return fx.GraphModule(nn.Module(), graph_from_json(nodes, CPU))(torch.zeros(2))


def calling(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    entry = {"op": "call_function", "name": "f", "target": target, "args": list(args)}
    return entry | ({"kwargs": kwargs} if kwargs else {})


@pytest.mark.parametrize(
    "node",
    [
        calling("os.system", "touch made"),
        calling("builtins.eval", TOUCH),
        calling("operator.call", {"node": "x"}),
        calling("operator.methodcaller", "numpy"),
        calling("operator.attrgetter", "__class__"),
        calling("operator.setitem", {"node": "x"}, 0, 0),
        calling("operator.__builtins__"),
        calling("torch.load", "made"),
        calling("torch.ops.aten.add.Tensor", {"node": "x"}, 1),
        calling("math.__loader__"),
        calling("aten.__class__.__subclasses__"),
        calling("aten.__dict__.clear"),
        calling("aten.add.__class__"),
        calling("aten.add.op"),
        calling("aten.from_file.default", "made", True, 16),
        calling("aten._reshape_alias.default", {"node": "x"}, [9], [1]),
        calling("aten._print.default", "read"),
        calling("aten.fbgemm_linear_quantize_weight.default", {"node": "x"}),
        calling("aten.relu_.default", {"node": "x"}),
        calling("aten.add.out", {"node": "x"}, 1),
        calling("aten.no_such_operator.default"),
        calling(""),
        calling("aten.add.Tensor", {"node": "x"}, {"unknown": 1}),
        calling("aten.add.Tensor", {"node": "not made yet"}, 1),
        calling("aten.add.Tensor", {"node": "x"}, {"dtype": "f33"}),
        calling("aten.add.Tensor", {"node": "x"}, {"float": "much"}),
        calling("aten.add.Tensor", {"node": "x"}, 1, **{f"alpha={TOUCH}, beta": 1}),
        {"op": "call_method", "name": "f", "target": "numpy", "args": [{"node": "x"}]},
        {"op": "call_module", "name": "f", "target": "blocks", "args": [{"node": "x"}]},
        {"op": "placeholder", "name": "f", "target": f"f={TOUCH}"},
        {"op": "placeholder", "name": f"f={TOUCH}", "target": "f"},
        {"op": "placeholder", "name": "lambda", "target": "lambda"},
        {"op": "get_attr", "name": "f", "target": f'w", None) or {TOUCH}, ("'},
        {"op": "get_attr", "name": "f", "target": "__class__"},
        {"op": "get_attr", "name": "f", "target": "forward.__globals__"},
        {"op": "get_attr", "name": "f"},
        {"op": "call_function", "name": "f", "target": ["aten.add.Tensor"]},
        {"name": "f"},
        [],
    ],
    ids=str,
)
def test_graph_that_may_not_be_read(
    node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = dict(vars(torch.ops.aten))
    with pytest.raises(ArtifactError):
        run([X, node, OUT])
    assert not list(tmp_path.iterdir())
    assert kept.items() <= vars(torch.ops.aten).items()


def test_what_may_be_read_runs() -> None:
    output = OUT | {"args": [[{"node": "f"}]]}
    assert torch.equal(
        run([X, calling("aten.add.Tensor", {"node": "x"}, 1, alpha=3), output])[0],
        torch.full((2,), 3.0),
    )


def test_forbidden_function_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"^a graph may not call 'os.system'$"):
        graph_from_json([X, calling("os.system", "true"), OUT], CPU)
    with pytest.raises(ArtifactError, match=r"this torch has no operator aten.gone.default; found"):
        graph_from_json([X, calling("aten.gone.default"), OUT], CPU)
