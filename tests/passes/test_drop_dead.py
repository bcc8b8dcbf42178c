"""drop-dead: golden text, the plan by hand, refusals, what must stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.compiler.pipeline import rewrite
from cachegraph.errors import VerifyError
from cachegraph.graph.text import graph_text
from cachegraph.model.trace import trace
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower
from cachegraph.plan.action import Compute, Reuse
from cachegraph.plan.plan import make_plan
from tests.tiny import (
    BASIC,
    MIXED,
    check_golden,
    plain_loop,
    plan,
    reuse_everything,
    run_graphs,
    stages,
    traced,
)


def test_golden(update_golden: bool) -> None:
    rows = reuse_everything(2)
    found = stages(rows)
    parts = {
        "before": graph_text(found["insert-cache"][1]),
        "after": graph_text(found["drop-dead"][1]),
    }
    check_golden("drop_dead", parts, update_golden)


@pytest.mark.parametrize("rows", [MIXED, reuse_everything(3)], ids=["mixed", "reuse"])
def test_graph_in_eager_equals_the_plan_by_hand(rows: tuple) -> None:
    found = run_graphs(plan(rows), stages(rows)["drop-dead"])
    for here, wanted in zip(found, plain_loop(rows), strict=True):
        assert torch.equal(here, wanted)


def test_a_second_run_finds_nothing_and_the_count_is_right() -> None:
    found = stages()
    step, after = found["insert-cache"][1], found["drop-dead"][1]
    before = len(step.graph.nodes)
    assert DropDead().apply(step) == before - len(after.graph.nodes) > 0
    assert graph_text(step) == graph_text(after)
    assert DropDead().apply(step) == 0


def test_every_input_of_the_model_stays() -> None:
    step = stages()["edit"][0]
    step.output.args = ((step.inputs[0],),)
    assert DropDead().apply(step) > 0
    assert [node.name for node in step.inputs] == ["x", "t"]


def test_leaving_it_out_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"pass lower, variant1, .*nothing uses the node"):
        rewrite(traced(), plan(), passes=(InsertCache(), Lower()))


# --- two streams: what only a reused site would have used is dead, its slots too


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.text_qkv, self.text_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.qkv(x), self.text_qkv(y)], dim=1).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(*joined.chunk(3, dim=-1)).squeeze(1)
        return self.out(mixed[:, : x.shape[1]]), self.text_out(mixed[:, x.shape[1] :])


class TwoStreams(nn.Module):
    """Two blocks of joint attention; the text leaves the model in the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.time = Joint(), Joint(), nn.Linear(1, 8)
        self.text_mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(t.view(-1, 1, 1))
        image, text = self.first(x, y)
        x, y = x + image, y + text
        y = y + self.text_mlp(y)
        return x + self.second(x, y)[0]


@pytest.mark.parametrize("reused", [{"second"}, {"first", "second", "text_mlp"}], ids=len)
def test_sites_that_only_reused_sites_use_are_dropped(reused: set[str]) -> None:
    torch.manual_seed(0)
    model = TwoStreams().eval()
    example = (torch.randn(2, 4, 8), torch.randn(2, 3, 8), torch.rand(2))
    found = trace(model, example)
    assert [site.name for site in found.sites] == ["first", "text_mlp", "second"]
    row = tuple(Reuse(0) if site.name in reused else Compute() for site in found.sites)
    made = make_plan(found.sites, [(Compute(),) * 3, row])
    _, step = rewrite(found, made, passes=BASIC)
    names = {node.target for node in step.graph.find_nodes(op="get_attr")}
    assert not [name for name in names if name.startswith(("text_mlp", "first.text_out"))]
    slots = {slot.name for slot in step.read_slots()}
    assert slots == {"second#0"} | ({"first#0"} if "first" in reused else set())
