"""The verifier: every rule is broken on purpose by a pass and says who did it, and where."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import fx

from cachegraph.compiler.pipeline import module_weights, rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import SLOT, StepGraph
from cachegraph.graph.verify.rules import RULES
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.lower import Lower
from cachegraph.spec import TensorSpec
from tests.tiny import BASIC, Edit, broken, plan, reuse_everything, traced

aten = torch.ops.aten
TRACED, CACHED, DROPPED, LOWERED = range(4)  # passes that ran before the broken one


def node(step: StepGraph, name: str) -> fx.Node:
    return next(n for n in step.graph.nodes if n.name == name)


def insert(step: StepGraph, before: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call before a node, whose first argument it takes the place of."""
    user = node(step, before)
    with step.graph.inserting_before(user):
        new = step.graph.create_node("call_function", target, args, kwargs, name="new")
    user.update_arg(0, new)
    return new


def returned(step: StepGraph, *names: str) -> None:
    step.output.args = (tuple(node(step, name) for name in names),)


def specced(step: StepGraph, name: str, value: str) -> None:
    """Give a node the recorded shape of another one."""
    node(step, name).meta["val"] = node(step, value).meta["val"]


# --- the broken passes; each does one thing wrong


def uses_later_node(step: StepGraph) -> None:
    step.output.prepend(node(step, "linear_1"))


def leaves_dead_node(step: StepGraph) -> None:
    insert(step, "add_0", aten.neg.default, node(step, "x"))
    node(step, "add_0").update_arg(0, node(step, "x"))


def leaves_dead_slot(step: StepGraph) -> None:
    node(step, "mul_0").update_arg(1, node(step, "x"))


def has_two_outputs(step: StepGraph) -> None:
    step.graph.output((node(step, "x"),))


def uses_unknown_weight(step: StepGraph) -> None:
    step.graph.find_nodes(op="get_attr")[0].target = "nowhere.weight"


def puts_slot_first(step: StepGraph) -> None:
    node(step, "x").prepend(node(step, "slot_blocks_0_attn_0"))


def swaps_slots(step: StepGraph) -> None:
    node(step, "slot_blocks_1_attn_0_1").append(node(step, "slot_blocks_0_attn_0"))


def reads_other_slot(step: StepGraph) -> None:
    slot = node(step, "slot_blocks_0_attn_0")
    slot.meta[SLOT] = replace(slot.meta[SLOT], site="blocks.1.mlp")


def changes_slot_spec(step: StepGraph) -> None:
    slot = node(step, "slot_blocks_0_attn_0")
    slot.meta[SLOT] = replace(slot.meta[SLOT], spec=TensorSpec((3,), torch.float16))


def renames_input(step: StepGraph) -> None:
    node(step, "t").target = "time"


def changes_input(step: StepGraph) -> None:
    specced(step, "t", "x")


def removes_input(step: StepGraph) -> None:
    node(step, "t").replace_all_uses_with(node(step, "x"))
    step.graph.erase_node(node(step, "t"))


def forgets_write(step: StepGraph) -> None:
    returned(step, "linear_11")


def returns_no_write(step: StepGraph) -> None:
    returned(step, "linear_11", "linear_5")


def writes_other_slot(step: StepGraph) -> None:
    write = node(step, "write_blocks_0_mlp_0")
    write.meta[SLOT] = replace(write.meta[SLOT], site="blocks.0.attn")


def writes_other_shape(step: StepGraph) -> None:
    returned(step, "linear_11", "linear_1")


def returns_other_shape(step: StepGraph) -> None:
    returned(step, "linear_1", "write_blocks_0_mlp_0")


def returns_slot(step: StepGraph) -> None:
    returned(step, "linear_11", "slot_blocks_0_attn_0")


def inlines_weight(step: StepGraph) -> None:
    insert(step, "add_0", aten.add.Tensor, node(step, "x"), torch.zeros(64 * 1024 // 4 + 1))


def records_wrong_shape(step: StepGraph) -> None:
    specced(step, "linear_1", "x")


def records_wrong_device(step: StepGraph) -> None:
    value = node(step, "linear_1").meta["val"]
    with value.fake_mode:
        node(step, "linear_1").meta["val"] = torch.empty_like(value, device="meta")


def forgets_shape(step: StepGraph) -> None:
    del step.graph.find_nodes(op="get_attr")[0].meta["val"]


def calls_with_wrong_shapes(step: StepGraph) -> None:
    insert(step, "add_0", aten.mm.default, node(step, "x"), node(step, "x"))


def calls_method(step: StepGraph) -> None:
    with step.graph.inserting_before(node(step, "add_0")):
        new = step.graph.create_node("call_method", "neg", (node(step, "x"),), name="new")
    node(step, "add_0").update_arg(0, new)
    specced(step, "new", "x")


def writes_in_place(step: StepGraph) -> None:
    insert(step, "add_1", aten.relu_.default, node(step, "add_0"))


def adds_in_place(step: StepGraph) -> None:
    insert(step, "add_1", operator.iadd, node(step, "add_0"), 1)


def calls_python(step: StepGraph) -> None:
    insert(step, "add_1", torch.relu, node(step, "add_0"))


def caches_too_early(step: StepGraph) -> None:
    insert(step, "add_0", ops.read, node(step, "x"))


def reads_no_slot(step: StepGraph) -> None:
    node(step, "read_blocks_0_attn_0").update_arg(0, node(step, "x"))


def names_other_slot(step: StepGraph) -> None:
    node(step, "write_blocks_0_mlp_0").kwargs = {"slot": "blocks.1.mlp#0"}


def forecasts_by_input(step: StepGraph) -> None:
    node(step, "forecast_blocks_1_attn_0").update_arg(1, node(step, "t"))


def forecasts_too_little(step: StepGraph) -> None:
    values = [node(step, "read_blocks_1_attn_0")]
    node(step, "forecast_blocks_1_attn_0").update_arg(0, values)


def loses_computed_site(step: StepGraph) -> None:
    node(step, "linear_10").replace_all_uses_with(node(step, "x"))
    DropDead().apply(step)


def computes_reused_site(step: StepGraph) -> None:
    node(step, "read_blocks_0_attn_0").replace_all_uses_with(node(step, "linear_3"))
    DropDead().apply(step)
    Lower().apply(step)


def loses_slot(step: StepGraph) -> None:
    node(step, "slot_blocks_0_attn_0").replace_all_uses_with(node(step, "x"))
    step.graph.erase_node(node(step, "slot_blocks_0_attn_0"))


def names_node_badly(step: StepGraph) -> None:
    node(step, "linear_1")._rename("linear_1")
    node(step, "linear_1").name = "linear-1"


class First:
    def __index__(self) -> int:
        return 0


def passes_object(step: StepGraph) -> None:
    node(step, "getitem_0").args = (node(step, "split_0"), First())


def uses_weight_of_its_own(step: StepGraph) -> None:
    weight = step.graph.find_nodes(op="get_attr")[0]
    step.module.register_buffer("own", torch.zeros(8, 1))
    weight.target = "own"


def uses_other_weight(step: StepGraph) -> None:
    next(n for n in step.graph.nodes if n.target == "time.weight").target = "head.weight"


def copies_weight(step: StepGraph) -> None:
    head = step.module.get_submodule("head")
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@dataclass(frozen=True)
class Case:
    after: int
    edit: Callable[[StepGraph], None]
    node: str
    says: str
    site: str = "-"


A0, M0, M1 = "blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"
SLOT_A0, WRITE_M0 = "slot_blocks_0_attn_0", "write_blocks_0_mlp_0"
FORECAST_A1 = "forecast_blocks_1_attn_0"

CASES = {
    "well formed": [
        Case(DROPPED, uses_later_node, "split_0", "before it has been defined"),
        Case(LOWERED, leaves_dead_node, "new", "nothing uses the node"),
        Case(LOWERED, leaves_dead_slot, SLOT_A0, "nothing uses the node"),
        Case(LOWERED, has_two_outputs, "output_1", "one output, at the end"),
        Case(TRACED, uses_unknown_weight, "time_weight", "nowhere"),
    ],
    "inputs in order": [
        Case(DROPPED, puts_slot_first, "forecast0", "out of order: model, slots, step"),
        Case(DROPPED, swaps_slots, SLOT_A0, "slots are out of order or read twice", A0),
        Case(DROPPED, reads_other_slot, SLOT_A0, "the row does not read this slot", M1),
        Case(CACHED, changes_slot_spec, SLOT_A0, "4, 8], the slot f16[3]", A0),
        Case(LOWERED, renames_input, "t", "expected the model's input t: f32["),
        Case(CACHED, changes_input, "t", "expected the model's input t: f32["),
        Case(LOWERED, removes_input, "forecast0", "out of order: model, slots"),
    ],
    "outputs in order": [
        Case(CACHED, forgets_write, "output", "0 writes instead of 1"),
        Case(CACHED, returns_no_write, "linear_5", "a write is not a cache.write", M0),
        Case(CACHED, writes_other_slot, WRITE_M0, "expected the write of blocks.0.mlp#0", M0),
        Case(LOWERED, writes_other_shape, "linear_1", "1, 16], the slot f32[", M0),
        Case(CACHED, returns_other_shape, "linear_1", "the model returns f32["),
    ],
    "no input is output": [
        Case(LOWERED, returns_slot, SLOT_A0, "an input is returned as an output"),
    ],
    "no large inline constants": [
        Case(DROPPED, inlines_weight, "new", "an inline constant of 65540 bytes"),
    ],
    "shapes recompute": [
        Case(LOWERED, records_wrong_shape, "linear_1", "4, 8] recomputes to f32["),
        Case(LOWERED, records_wrong_device, "linear_1", "meta recomputes to cpu"),
        Case(LOWERED, forgets_shape, "time_weight", "no recorded shape"),
        Case(DROPPED, calls_with_wrong_shapes, "new", "it cannot be computed: RuntimeError: "),
    ],
    "functional": [
        Case(LOWERED, calls_method, "new", "call_method neg is not a function"),
        Case(LOWERED, writes_in_place, "new", "aten.relu_.default changes its inputs"),
        Case(LOWERED, adds_in_place, "new", "iadd> changes its inputs"),
        Case(LOWERED, calls_python, "new", "relu of type object"),
    ],
    "cache ops in stage": [
        Case(TRACED, caches_too_early, "new", "cache operation in a graph that is traced"),
        Case(LOWERED, caches_too_early, "new", "cache operation in a graph that is lowered"),
        Case(CACHED, reads_no_slot, "read_blocks_0_attn_0", "cache.read of something that is no"),
        Case(CACHED, names_other_slot, WRITE_M0, "blocks.0.mlp#0 says blocks.1.mlp#0", M0),
        Case(CACHED, forecasts_by_input, FORECAST_A1, "the coefficients are no step constant"),
        Case(CACHED, forecasts_too_little, FORECAST_A1, "forecast0 is not one number a value"),
    ],
    "row and graph agree": [
        Case(LOWERED, loses_computed_site, "linear_10", "computes the site, the graph does", M1),
        Case(CACHED, computes_reused_site, "linear_2", "reuses the site, its work is left", A0),
        Case(LOWERED, loses_slot, "-", "reuses the site, the graph reads no slot 0@0", A0),
    ],
    "text is reproducible": [
        Case(LOWERED, names_node_badly, "-", "the text of a copy differs"),
        Case(TRACED, passes_object, "getitem_0", "the text holds the address of an object"),
    ],
    "weights are stored": [
        Case(LOWERED, uses_weight_of_its_own, "time_weight", "weight 'own' is not in the store"),
        Case(LOWERED, uses_other_weight, "time_weight", "is f32[8, 8] in the store"),
        Case(LOWERED, copies_weight, "head_weight", "is another tensor than the store's"),
    ],
}


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        pytest.param(rule, case, id=f"{case.edit.__name__}-{case.after}")
        for rule, cases in CASES.items()
        for case in cases
    ],
)
def test_broken_pass_is_caught(rule: str, case: Case) -> None:
    message = broken(case.edit, after=case.after)
    place = f"pass edit, variant1, site {case.site}, node {case.node}: {rule}: "
    assert message.startswith(place), message
    assert case.says in message
    assert message.endswith("this is a bug in the pass, not in the schedule")


def test_every_rule_has_a_broken_pass() -> None:
    names = {rule.__name__.removeprefix("_").replace("_", " ") for rule in RULES}
    # Prologues are made by hoist-known, whose tests break them.
    assert {*CASES, "prologues agree"} == names


@pytest.mark.parametrize("edit", [lambda step: None, lambda step: DropDead().apply(step)])
def test_pass_that_miscounts_is_caught(edit: Callable[[StepGraph], Any]) -> None:
    changes = edit.__code__.co_names != ()
    claims = 0 if changes else 3
    message = broken(edit, after=CACHED, claims=claims)
    found = "differs" if changes else "is unchanged"
    assert message == (
        f"pass edit, variant1: the pass says that it made {claims} rewrites, but the graph {found}"
    )


def test_the_first_variant_that_breaks_is_named() -> None:
    passes = (*BASIC, Edit(records_wrong_shape, "variant0", 1))
    with pytest.raises(VerifyError, match="pass edit, variant0, site -, node linear_1"):
        rewrite(traced(), plan(reuse_everything(2)), passes=passes)


def test_a_weight_that_was_never_stored_is_found_before_the_first_pass() -> None:
    stored = module_weights(traced())
    del stored["head.weight"]
    with pytest.raises(VerifyError, match=r"pass trace, variant0, .*'head.weight' is not in"):
        rewrite(traced(), plan(), weights=stored)


def test_dead_code_is_allowed_until_it_is_dropped() -> None:
    graphs = rewrite(traced(), plan(), passes=BASIC)
    assert [step.variant.name for step in graphs] == ["variant0", "variant1", "variant2"]
