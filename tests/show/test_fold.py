"""Graphs folded: blocks that are alike once, differences by block, and what they sum up to."""

from __future__ import annotations

import io
import re
from functools import cache

import pytest
from rich.console import Console
from torch import fx, nn

from cachegraph.compiler.compile import build
from cachegraph.graph.interface import Port, Role
from cachegraph.graph.provenance import NOTHING, module_of
from cachegraph.show.difference import module_shares, show_difference, show_variant
from cachegraph.show.fold import Folding, Section, fold_ports, port_label
from cachegraph.show.view import View, view_build
from cachegraph.spec import TensorSpec
from tests.models import shared_dit

TOCA = {
    "cachegraph": 1,
    "steps": 8,
    "policy": {
        "method": "toca",
        "interval": 4,
        "fresh_ratio": 0.3,
        "ratio_schedule": "linear",
        "score": "attention",
    },
}


@cache
def view() -> View:
    """Four blocks under ToCa; full steps choose the tokens of all blocks in the first one."""
    model, traced = shared_dit(4)
    return view_build(build(model, TOCA, traced=traced))


def shown(first: str, second: str) -> str:
    out = io.StringIO()
    Console(file=out, width=1000, highlight=False, markup=False).print(
        show_difference(view(), first, second)
    )
    return out.getvalue()


def test_blocks_that_do_the_same_are_one_section() -> None:
    labels = [section.label for section in view().folding.sections("variant0")]
    assert labels == ["model", "x_embedder", "blocks.0", "blocks.1-3", "final_layer"]
    reused = [s for s in view().folding.sections("variant2") if s.label.startswith("blocks")]
    assert [s.blocks for s in reused] == [tuple(f"blocks.{i}" for i in range(4))]


def test_sections_hold_every_operation_once() -> None:
    for variant, step in zip(view().plan.variants, view().graphs, strict=True):
        sections = view().folding.sections(variant.name)
        count = sum(len(section.lines) * len(section.blocks) for section in sections)
        assert count == sum(node.op == "call_function" for node in step.graph.nodes)


def test_what_a_pass_made_belongs_to_the_site_it_was_made_for() -> None:
    lines = view().folding.lines("variant2")
    for block, found in lines.items():
        sites = {line.made_by.partition(", ")[2] for line in found if ", " in line.made_by}
        assert all(site.startswith(f"{block}.") for site in sites)
    made = [line.made_by for line in lines["blocks.2"] if line.made_by]
    assert any(one == "gather-tokens, blocks.2.mlp" for one in made)


def test_blocks_that_differ_in_a_number_are_not_alike() -> None:
    graph = fx.Graph()
    x = graph.call_function(mul, (graph.placeholder("x"), 1), name="first")
    for index, factor in enumerate((2, 2, 3)):
        x = graph.call_function(mul, (x, factor), name=f"mul_{index}")
        x.meta["nn_module_stack"] = {"": (f"blocks.{index}.mlp", nn.Linear)}
    graph.output((x,))
    modules = {n.name: module_of(n) or "" for n in graph.nodes if n.op == "call_function"}
    folding = Folding({"g": graph}, NOTHING.__class__(modules, {}, {}, {}, ()))
    found = [section.blocks for section in folding.sections("g")]
    assert found == [("",), ("blocks.0", "blocks.1"), ("blocks.2",)]


def mul(a: object, b: object) -> object:
    return (a, b)


def test_layers_of_a_sequence_are_no_blocks() -> None:
    labels = {block for block in view().folding.lines("variant0-prologue") if "embedder" in block}
    assert labels == {"t_embedder", "y_embedder"}


def test_modules_of_nodes() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert module_of(node) is None
    stacks = {"blocks.0.attn@1": "blocks.0.attn", "_empty_nn_module_stack": "", "": ""}
    for path, wanted in stacks.items():
        node.meta["nn_module_stack"] = {"k": ("", nn.Linear), "l": (path, nn.Linear)}
        assert module_of(node) == wanted


def port(name: str, role: Role = Role.SLOT, shape: str = "f32[s0, 4]", age: int = 0) -> Port:
    return Port(name, TensorSpec.parse(shape), role, name, age)


def test_ports_that_differ_in_numbers_stand_together() -> None:
    ports = [port("slot_b_0"), port("slot_b_1"), port("slot_b_2", age=1), port("slot_c_0")]
    assert [len(group) for group in fold_ports(ports)] == [2, 1, 1]
    wide = [port("slot_b_0"), port("slot_b_1", shape="f32[s0, 8]")]
    assert [len(group) for group in fold_ports(wide)] == [1, 1]
    known = [port("known_add_1", Role.STEP), port("known_mul_2", Role.STEP)]
    assert [len(group) for group in fold_ports(known)] == [2]
    assert port_label(["slot_b_0", "slot_b_1"]) == "slot_b_0-1"
    assert port_label(["known_add_1", "known_mul_2"]) == "known_add_1 and 1 more"


def test_difference_is_folded_and_short() -> None:
    text = shown("variant0", "variant2")
    lines = text.splitlines()
    assert lines[:2] == ["--- variant0", "+++ variant2"]
    assert lines[2:5] == ["@@ steps", "-0 3 7", "+4-6"]
    assert "-blocks.0-3.attn: compute write" in lines
    assert "+blocks.0-3.attn: reuse" in lines
    assert "@@ blocks.1-3 (3 alike)" in lines
    assert "+slot slot_blocks_0-3_attn_0  f32[s0, 16, 32]" in [
        re.sub(r"s\d+", "s0", s) for s in lines
    ]
    # Of the blocks that are alike the first alone is shown.
    assert "%linear_" in text
    assert not re.search(r"@blocks\.[23]\.", text)


def test_difference_sums_up_by_kind_of_module() -> None:
    rows = {
        line.split()[0]: line.split()[1:]
        for line in shown("variant0", "variant2").splitlines()
        if line
    }
    assert rows["blocks.*.attn.qkv"][:2] == ["4", "0"]
    assert rows["blocks.*.mlp.fc1"][:2] == ["4", "4"]  # for some tokens
    total = sum(one.flops for one in module_shares(view(), view().plan.variants[2]).values())
    before = sum(f.count for f in view().source.provenance.flops["variant2-prologue"].values())
    assert total + before == pytest.approx(view().cost.mean_flops(view().plan.variants[2].steps))


def test_a_variant_is_folded_too() -> None:
    out = io.StringIO()
    Console(file=out, width=70, highlight=False, markup=False).print(
        show_variant(view(), "variant2")
    )
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[:3] == [
        "@@ variant2: steps 4-6",
        " blocks.0-3.attn: reuse",
        " blocks.0-3.mlp: refresh write",
    ]
    assert "@@ blocks.0-3 (4 alike)" in lines
    assert "@@ prologue: blocks.0-3 (4 alike)" in lines
    assert lines.index("@@ inputs") < lines.index("@@ outputs") < lines.index("@@ x_embedder")


def test_equal_variants_do_not_differ() -> None:
    assert shown("variant2", "variant2") == "variant2 and variant2 do not differ\n"


def test_label_of_what_belongs_to_no_module() -> None:
    assert Section(("",), ()).label == "model"


def test_what_each_pass_removed() -> None:
    removed = {
        (one.variant, one.pass_name): one.removed
        for one in view().source.provenance.passes
        if one.removed
    }
    assert "blocks.3.attn.qkv" in removed["variant2", "drop-dead"]
    assert "blocks.3.mlp.fc1" not in removed["variant2", "drop-dead"]
    assert "blocks.3.adaLN_modulation.1" in removed["variant2", "hoist-known"]
    assert ("variant0", "drop-dead") not in removed
