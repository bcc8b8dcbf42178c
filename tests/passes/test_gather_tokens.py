"""gather-tokens: golden text, the plan by hand, regions that mix tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.compiler.pipeline import PassReport, rewrite
from cachegraph.errors import SiteError
from cachegraph.graph import ops
from cachegraph.graph.step_graph import StepGraph, copy_module
from cachegraph.graph.text import graph_text
from cachegraph.model.trace import TracedModel, trace
from cachegraph.passes.drop_dead import DropDead
from cachegraph.passes.gather_tokens import GatherTokens
from cachegraph.passes.insert_cache import InsertCache
from cachegraph.passes.lower import Lower
from cachegraph.plan.action import Compute, Refresh, Reuse
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Score, Selection
from tests.models import fill_random
from tests.tiny import call as tiny_call
from tests.tiny import check_golden, tiny, traced

C = Compute()
ROWS = ((C, C, C, C), (Reuse(0), Refresh(0, 2, 0, 0), C, C))
SELECTION = Selection(Score.NORM, 0.1, 0.0, 1, (2, 2))
PASSES = (InsertCache(), GatherTokens(), DropDead(), Lower())
WIDTH, TOKENS = 8, 6


def partial(made: TracedModel, plan: Plan) -> dict[str, StepGraph]:
    """The graph of the partial step after each pass."""
    found: dict[str, StepGraph] = {}

    def look(step: StepGraph, report: PassReport) -> None:
        module = copy_module(step.module)
        found[report.pass_name] = StepGraph(**{**vars(step), "module": module})

    rewrite(made, plan, passes=PASSES, on_pass=look)
    return found


def test_golden(update_golden: bool) -> None:
    found = partial(traced(), make_plan(traced().sites, ROWS, selection=SELECTION))
    parts = {name: graph_text(found[name]) for name in ("insert-cache", "gather-tokens", "lower")}
    check_golden("gather_tokens", parts, update_golden)


@torch.no_grad()
def test_graph_in_eager_equals_the_plan_by_hand() -> None:
    plan = make_plan(traced().sites, ROWS, selection=SELECTION)
    found = partial(traced(), plan)
    model = tiny()
    x, t = tiny_call(1)
    kept_attn, kept_mlp = torch.randn(2, *x.shape)
    age = torch.tensor([[0.0, 3, 0, 0], [0, 0, 0, 3]])
    constants = {"tokens0": torch.arange(2), "age0": torch.zeros(1, dtype=torch.int64)}
    by_name = {"x": x, "t": t, "slot_blocks_0_attn_0": kept_attn, "slot_blocks_0_mlp_0": kept_mlp}
    by_name |= {"slot_blocks_0_mlp_age": age, **constants}
    # by hand: the oldest token of each sample and, of the others, that of the largest norm
    gate1, gate2 = model.blocks[0].gates(model.time(t.view(-1, 1, 1))).chunk(2, dim=-1)
    stream = x + gate1 * kept_attn
    score = F.normalize(stream.norm(dim=-1), dim=-1) + 0.1 * age
    mlp = kept_mlp.clone()
    fresh = model.blocks[0].mlp(F.layer_norm(stream, (8,)))
    for sample in range(2):
        best = score[sample].topk(2).indices
        mlp[sample, best] = fresh[sample, best]
    wanted = model.head(model.blocks[1](stream + gate2 * mlp, model.time(t.view(-1, 1, 1))))
    for name in ("insert-cache", "gather-tokens", "drop-dead", "lower"):
        graph = found[name]
        result, *_ = graph.module(*(by_name[node.name] for node in graph.inputs))
        assert torch.allclose(result, wanted, atol=1e-6), name


def test_a_graph_without_partial_sites_is_left_alone() -> None:
    plan = make_plan(traced().sites, (ROWS[0], (Reuse(0), C, C, C)))
    step = partial(traced(), plan)["insert-cache"]
    before = graph_text(step)
    assert GatherTokens().apply(step) == 0
    assert graph_text(step) == before


# --- regions that cannot be recomputed for some tokens


class Mlp(nn.Module):
    """Two linears, and in between what a test wants."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tokens = nn.Linear(TOKENS, TOKENS)
        self.places = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.pairs = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        batch = x.shape[0]
        match self.kind:
            case "mean":
                h = h - h.mean(1, keepdim=True)
            case "softmax":
                h = h * h.softmax(1)
            case "linear":
                h = self.tokens(h.transpose(1, 2)).transpose(1, 2)
            case "places":
                h = h + self.places
            case "fold":
                h = self.pairs(h.reshape(batch, TOKENS // 2, 2 * WIDTH))
                h = h.reshape(batch, TOKENS, WIDTH)
            case "flip":
                h = h + F.pad(h, (0, 0, 1, 0))[:, :TOKENS]
            case "square":
                small = h[..., :TOKENS]
                h = F.pad(small + small.transpose(1, 2), (0, WIDTH - TOKENS))
        return self.down(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class OneBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp(kind)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t.view(-1, 1, 1) * self.attn(F.layer_norm(x, (WIDTH,)))
        return x + self.mlp(F.layer_norm(x, (WIDTH,)))


def refreshed(kind: str, site: int) -> dict[str, StepGraph]:
    """The partial step that refreshes the attn (0) or mlp (1) of a block."""
    model = fill_random(OneBlock(kind))
    made = trace(model, (torch.randn(2, TOKENS, WIDTH), torch.ones(2)))
    assert [one.name for one in made.sites] == ["attn", "mlp"]
    row = tuple(Refresh(0, 2, 0, 0) if i == site else Reuse(0) for i in range(2))
    selection = Selection(Score.NORM, 0.1, 0.0, 1, (1, TOKENS))
    return partial(made, make_plan(made.sites, ((C, C), row), selection=selection))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mean", "aten.mean.dim works along the token axis"),
        ("softmax", "aten.softmax.int is not known to treat tokens one by one"),
        ("linear", "aten.linear.default works along the token axis"),
        ("places", "aten.add.Tensor takes mlp_places, which has a token axis of its own"),
        ("fold", "folds the token axis into another"),
        ("flip", "is not known to treat tokens one by one"),
        ("square", "aten.add.Tensor joins tokens on different axes"),
    ],
)
def test_a_region_that_mixes_tokens_is_refused(kind: str, why: str) -> None:
    with pytest.raises(SiteError) as caught:
        refreshed(kind, 1)
    assert why in str(caught.value)
    assert caught.value.what.startswith("site mlp cannot be recomputed for some tokens: aten.")
    assert caught.value.place.startswith("node ")
    assert caught.value.expected == "operations that treat tokens one by one"
    assert caught.value.remedy.startswith("leave the site out with sites.exclude")


def test_self_attention_is_refused() -> None:
    with pytest.raises(SiteError, match=r"scaled_dot_product_attention.*attends to the tokens"):
        refreshed("plain", 0)


def test_a_plain_mlp_is_not_refused() -> None:
    graph = refreshed("plain", 1)["gather-tokens"]
    gathers = graph.graph.find_nodes(op="call_function", target=ops.gather_tokens)
    assert [node.args[0].name for node in gathers] == ["add_0"]
