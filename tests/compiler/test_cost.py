"""Predicted cost: DiT-XL/2 blocks against their closed form, totals, memory."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cachegraph.compiler.cost import PlanCost, count_flops, plan_cost
from cachegraph.compiler.pipeline import module_weights, rewrite
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Compute, Reuse
from cachegraph.plan.plan import make_plan
from cachegraph.zoo import DiT
from tests.tiny import BASIC, BATCH, TOKENS, WIDTH, call, plan, reuse_everything, tiny, traced

# DiT-XL/2 with two of its 28 blocks, one image and one half of the guidance; one multiply-add is
# two FLOPs. The whole model is in test_big_model.
N, WIDE, DEPTH, HEADS, HEAD = 256, 1152, 2, 16, 72
ATTN = 2 * N * WIDE * 3 * WIDE + 2 * 2 * HEADS * N * N * HEAD + 2 * N * WIDE * WIDE
MLP = 2 * 2 * N * WIDE * 4 * WIDE
ADALN = 2 * WIDE * 6 * WIDE
OUTSIDE = (
    2 * N * WIDE * 2 * 2 * 4  # patches
    + 2 * (256 * WIDE + WIDE * WIDE)  # timestep
    + 2 * WIDE * 2 * WIDE  # last adaLN
    + 2 * N * WIDE * 2 * 2 * 8  # last linear
)
FULL = DEPTH * (ATTN + MLP + ADALN) + OUTSIDE


@cache
def wide() -> TracedModel:
    with torch.device("meta"):
        model = DiT(depth=DEPTH).eval()
    return trace(model, *model.example_inputs())


def test_dit_has_the_flops_of_its_closed_form() -> None:
    found = wide()
    for batch in (1, 6):
        assert count_flops(found.module, {str(found.batch): batch}).fixed == batch * FULL


def test_each_reused_site_saves_its_own_flops() -> None:
    found = wide()
    c, r = Compute(), Reuse(0)
    made = make_plan(found.sites, [(c,) * 4, (r, c, c, c), (c, c, c, r), (r,) * 4, (r,) * 4])
    graphs = rewrite(found, made, passes=BASIC)
    weights = module_weights(found)
    cost = plan_cost(made, graphs, found.module, weights, {str(found.batch): 1})
    none = FULL - DEPTH * (ATTN + MLP)
    assert cost.flops == (FULL, FULL - ATTN, FULL - MLP, none, none)
    assert cost.full_flops == FULL
    assert cost.total_flops == 3 * FULL - ATTN - MLP + 2 * none
    assert cost.limit == 5 * FULL / cost.total_flops
    one = N * WIDE * 4  # bytes
    assert cost.cache_bytes == (4 * one, 4 * one, 4 * one, 4 * one, 0)
    assert cost.weight_bytes == sum(weight.nbytes for weight in weights.values())


def test_counting_agrees_with_a_real_call() -> None:
    found = traced()
    # torch does not count its fused attention on a CPU.
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        tiny()(*call(0))
    assert count_flops(found.module, {str(found.batch): BATCH}).fixed == counter.get_total_flops()


def test_tied_weights_count_once() -> None:
    found = traced()
    graphs = rewrite(found, plan(), passes=BASIC)
    weights = module_weights(found)
    twice = weights | {"head.again": weights["head.weight"].detach()}
    symbols = {str(found.batch): 3}
    costs = [plan_cost(plan(), graphs, found.module, w, symbols) for w in (weights, twice)]
    assert costs[0].weight_bytes == costs[1].weight_bytes == sum(w.nbytes for w in weights.values())


def test_cost_follows_the_batch() -> None:
    found = traced()
    made = plan(reuse_everything(3))
    graphs = rewrite(found, made, passes=BASIC)
    costs = [
        plan_cost(made, graphs, found.module, module_weights(found), {str(found.batch): b})
        for b in (1, 4)
    ]
    assert costs[1].flops == tuple(4 * f for f in costs[0].flops)
    kept = 4 * TOKENS * WIDTH * 4
    assert costs[0].cache_bytes == (kept, kept, 0)
    assert costs[1].cache_bytes == (4 * kept, 4 * kept, 0)
    assert costs[0].flops[0] == costs[0].full_flops > costs[0].flops[1] == costs[0].flops[2]


def test_a_trajectory_without_flops_has_a_limit() -> None:
    assert PlanCost({}, (0, 0), 0, (0, 0), (0, 0), 0).limit == 0.0
