"""Graph text: the same everywhere, different for different graphs; differences; DOT."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

from cachegraph.compiler.pipeline import rewrite
from cachegraph.graph import ops
from cachegraph.graph.binding import Binding
from cachegraph.graph.step_graph import ORIGIN, SLOT, Origin, Stage, StepGraph
from cachegraph.graph.text import difference, digest, dot, graph_text
from cachegraph.model.trace import trace
from cachegraph.plan.plan import Variant
from cachegraph.plan.slot import Slot
from cachegraph.spec import TensorSpec
from tests.tiny import plan, stages, tiny, traced

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]

TEXTS = """
import hashlib, tests.tiny as t
from cachegraph.graph.text import graph_text
for name, steps in t.stages().items():
    for step in steps:
        print(name, hashlib.sha256(graph_text(step).encode()).hexdigest())
"""


def hand_built(build: Callable[[fx.Graph, list[fx.Node]], fx.Node]) -> StepGraph:
    """A graph of inputs x, a and b."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "xab"]
    graph.output((build(graph, inputs),))
    variant = Variant("variant0", (0,), (), (), ())
    module = fx.GraphModule(torch.nn.Module(), graph)
    return StepGraph(module, variant, (), Stage.LOWERED, (Binding.DYNAMIC,) * 3, model_outputs=1)


def combined(first: int, second: int, factor: float = 2.0) -> StepGraph:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Node:
        added = graph.call_function(aten.add.Tensor, (inputs[0], inputs[first]))
        product = graph.call_function(aten.mul.Tensor, (added, inputs[second]))
        return graph.call_function(aten.mul.Scalar, (product, factor))

    return hand_built(build)


# --- the same graph has the same text


def test_two_traces_and_two_rewrites_have_equal_texts() -> None:
    model = tiny()
    again = trace(model, *model.example_inputs())
    first = [graph_text(step) for step in rewrite(traced(), plan())]
    assert [graph_text(step) for step in rewrite(again, plan())] == first


def test_another_process_prints_the_same() -> None:
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONWARNINGS": "ignore"}
    other = subprocess.run(
        [sys.executable, "-c", TEXTS], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    here = [
        f"{name} {digest(graph_text(step))}" for name, steps in stages().items() for step in steps
    ]
    assert other.stdout.splitlines() == here


def test_no_memory_address_and_no_version_is_in_it() -> None:
    for steps in stages().values():
        for step in steps:
            text = graph_text(step)
            assert "0x" not in text
            assert torch.__version__ not in text


# --- different graphs have different texts


def test_wiring_changes_the_digest() -> None:
    one, other = combined(1, 2), combined(2, 1)
    assert sorted(str(n.target) for n in one.graph.nodes) == sorted(
        str(n.target) for n in other.graph.nodes
    )
    assert digest(graph_text(one)) != digest(graph_text(other))
    assert digest(graph_text(one)) == digest(graph_text(combined(1, 2)))


def test_a_constant_changes_the_digest() -> None:
    assert graph_text(combined(1, 2, 2.0)) != graph_text(combined(1, 2, 2.0000000000000004))


@pytest.mark.parametrize("change", ["slot", "weight", "keyword", "dtype", "row"])
def test_what_else_changes_the_digest(change: str) -> None:
    step = stages()["insert-cache"][1]
    before = digest(graph_text(step))
    match change:
        case "slot":
            node = step.inputs[2]
            node.meta[SLOT] = replace(node.meta[SLOT], age=3)
        case "weight":
            step.graph.find_nodes(op="get_attr")[0].target = "head.bias"
        case "keyword":
            step.graph.find_nodes(op="call_function", target=aten.gelu.default)[0].kwargs = {
                "approximate": "tanh"
            }
        case "dtype":
            node = step.inputs[0]
            node.meta["val"] = node.meta["val"].half()
        case "row":
            step.variant = replace(step.variant, steps=(2, 4))
    assert digest(graph_text(step)) != before


# --- the form


def test_lines_of_every_kind() -> None:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Node:
        x, a, b = inputs
        a.meta[SLOT] = Slot("blocks.0.attn", 1, 2, TensorSpec((2,), torch.float16))
        kept = graph.call_function(ops.write, (a,), {"slot": 'blocks "0"#1'})
        kept.meta[ORIGIN] = Origin("insert-cache", "blocks.0.attn")
        cut = graph.call_function(aten.slice.Tensor, (x, 0, -1, 2**63 - 1))
        cast = graph.call_function(
            aten._to_copy.default, (cut,), {"dtype": torch.bfloat16, "pin_memory": False}
        )
        pair = graph.call_function(aten.split.Tensor, (cast, 2))
        joined = graph.call_function(aten.cat.default, ([pair, b, None, True, 1.5],))
        return graph.call_function(operator.getitem, (joined, 0))

    shown = re.sub(" +", " ", graph_text(hand_built(build)))
    assert shown.splitlines() == [
        "variant0 steps 0",
        "%x = input",
        '%a = slot "blocks.0.attn#1@2"',
        "%b = input",
        '%write = cache.write(%a, slot="blocks "0"#1") # insert-cache, blocks.0.attn',
        "%slice_tensor = aten.slice.Tensor(%x, 0, -1, end)",
        "%_to_copy_default = aten._to_copy(%slice_tensor, dtype=bf16)",
        "%split_tensor = aten.split.Tensor(%_to_copy_default, 2)",
        "%cat_default = aten.cat([%split_tensor, %b, None, True, 1.5])",
        "%getitem = operator.getitem(%cat_default, 0)",
        "return %getitem",
    ]


def test_first_line_says_what_the_row_does() -> None:
    assert graph_text(stages()["lower"][1]).splitlines()[0] == (
        "variant1  steps 2  blocks.0.attn: reuse  blocks.0.mlp: compute write  "
        "blocks.1.attn: forecast(2)  blocks.1.mlp: compute"
    )


def test_every_value_but_a_weight_has_a_line_of_its_own() -> None:
    step = stages()["lower"][1]
    defined = re.findall(r"^%(\w+) = ", graph_text(step), flags=re.MULTILINE)
    assert defined == [n.name for n in step.graph.nodes if n.op not in ("get_attr", "output")]


# --- differences and drawings


def test_difference_of_two_variants() -> None:
    full, mixed, _ = stages()["lower"]
    shown = difference(graph_text(full), graph_text(mixed), ("variant0", "variant1"))
    lines = shown.splitlines()
    assert lines[:2] == ["--- variant0", "+++ variant1"]
    assert any(line.startswith("-%linear_3 = aten.linear(") for line in lines)
    assert any(line.startswith('+%slot_blocks_0_attn_0 = slot "blocks.0.attn#0"') for line in lines)
    unchanged = "%linear_10 = aten.linear("
    assert not any(line.startswith(("-" + unchanged, "+" + unchanged)) for line in lines)
    assert difference("a\nb\n", "a\nb\n", ("x", "y")).strip() == ""


def parsed(text: str) -> tuple[dict[str, dict[str, str]], set[tuple[str, str]]]:
    """Nodes with their attributes and edges of DOT text; refuses what does not look like it."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    attribute = rf"\w+=(?:{quoted}|\w+)"
    head, *body, last = text.splitlines()
    assert re.fullmatch(rf"digraph {quoted} {{", head)
    assert last == "}"
    nodes: dict[str, dict[str, str]] = {}
    edges: set[tuple[str, str]] = set()
    for line in body:
        if edge := re.fullmatch(rf"  ({quoted}) -> ({quoted});", line):
            edges.add((edge[1], edge[2]))
            continue
        node = re.fullmatch(rf"  ({quoted}|node) \[({attribute}(?:, {attribute})*)\];", line)
        assert node, line
        assert node[1] not in nodes
        nodes[node[1]] = dict(a.split("=", 1) for a in re.findall(attribute, node[2]))
    del nodes["node"]  # defaults for all
    return nodes, edges


def test_dot_is_a_drawing_of_the_graph() -> None:
    step = stages()["insert-cache"][1]
    nodes, edges = parsed(dot(step))
    drawn = [node for node in step.graph.nodes if node.op != "get_attr"]
    assert list(nodes) == [f'"{node.name}"' for node in drawn]
    assert edges == {
        (f'"{source.name}"', f'"{node.name}"')
        for node in drawn
        for source in node.all_input_nodes
        if source.op != "get_attr"
    }
    assert nodes['"slot_blocks_0_attn_0"']["fillcolor"] == "lightblue"
    assert nodes['"forecast_blocks_1_attn_0"']["fillcolor"] == "lightyellow"
    assert "fillcolor" not in nodes['"linear_5"']
    assert nodes['"slot_blocks_0_attn_0"']["label"] == (
        r'"%slot_blocks_0_attn_0 = slot \"blocks.0.attn#0\""'
    )
