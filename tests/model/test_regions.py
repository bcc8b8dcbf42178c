"""Sites found from structure alone, in small models of every shape that a block can have."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.errors import SiteError
from cachegraph.model.trace import TracedModel, trace
from tests.models import (
    build,
    compile_traced,
    fill_random,
    make_inputs,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
)

WIDTH = 8


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        return self.out(self.core(self.q(x), k, v))


class WrittenOut(Attention):
    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


class Linearised(Attention):
    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.relu() @ (k.relu().transpose(1, 2) @ v)


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), activation or nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    )


class CubicGelu(nn.Module):
    """Holds an add of ``h`` and something made from ``h`` that is no residual add."""

    def forward(self, h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3))))


class Block(nn.Module):
    """Attention, then mlp."""

    def __init__(self, attn: type[Attention] = Attention) -> None:
        super().__init__()
        self.attn, self.mlp, self.gate = attn(), mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean(1, keepdim=True))
        x = x + gate.sigmoid() * self.attn(norm(x))
        return x + self.mlp(norm(x)) * gate


class Parallel(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = norm(x)
        return x + (self.attn(h) + self.mlp(h))


class AddedInTurn(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.attn(norm(x))) + self.mlp(norm(x))


class Cross(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = Attention()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(norm(x))
        x = x + self.attn2(norm(x), context)
        return x + self.mlp(norm(x))


class Cubic(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(CubicGelu())


class TwoStreams(nn.Module):
    """Joint attention of ``x`` and ``context``; one mlp serves both."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = JointAttention()
        self.ff = mlp()

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        from_x, from_context = self.attn(norm(x), norm(context))
        x, context = x + from_x, context + from_context
        return x + self.ff(norm(x)), context + self.ff(norm(context))


class JointAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_context = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.to_x, self.to_context = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([self.of_context(context), self.of_x(x)], dim=1)
        both = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        text, image = both.split([context.shape[1], x.shape[1]], dim=1)
        return self.to_x(image), self.to_context(text)


class Fused(nn.Module):
    """One projection takes attention and mlp together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x)
        attention = F.scaled_dot_product_attention(*self.qkv(h).chunk(3, dim=-1))
        return x + self.out(torch.cat([attention, F.gelu(self.up(h))], dim=-1))


class MlpsWithoutModules(nn.Module):
    """Two mlps whose layers belong to the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc[1](self.fc[0](norm(x)).relu())
        return x + self.fc[3](self.fc[2](norm(x)).relu())


class ConvMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv1d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 4, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(norm(x))


class OuterSkip(nn.Module):
    """A skip over whole blocks, and the layer before them, is no site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.blocks(self.into(x)))


class SameBlockTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class NoSite(nn.Module):
    """A residual add whose branch is a single linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(norm(x))


def in_block(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block=model))


PLAIN = ["attn attn attn.out", "mlp mlp mlp.2"]
# model -> per site its name, its kind, and the modules that return its values
FOUND: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "pre-norm": (Block, PLAIN),
    "attention written out": (lambda: Block(WrittenOut), PLAIN),
    "linear attention": (lambda: Block(Linearised), PLAIN),
    "gated": (Gated, PLAIN),  # what is kept stands before the gate
    "x + (f + g)": (Parallel, PLAIN),
    "(x + f) + g": (AddedInTurn, PLAIN),
    "cubic gelu": (Cubic, PLAIN),
    "cross": (Cross, [PLAIN[0], "attn2 cross_attn attn2.out", PLAIN[1]]),
    "joint": (TwoStreams, ["attn attn attn.to_x attn.to_context", "ff mlp ff.2", "ff@1 mlp ff.2"]),
    "fused": (lambda: in_block(Fused()), ["block:attn attn fused block.out"]),
    "no modules": (
        lambda: in_block(MlpsWithoutModules()),
        ["block:mlp mlp block.fc.1", "block:mlp@1 mlp block.fc.3"],
    ),
    "convolutions": (ConvMlp, ["mix mlp mix.2"]),
    "outer skip": (
        OuterSkip,
        [
            *("blocks.0.attn attn blocks.0.attn.out", "blocks.0.mlp mlp blocks.0.mlp.2"),
            *("blocks.1.attn attn blocks.1.attn.out", "blocks.1.mlp mlp blocks.1.mlp.2"),
            *("last.attn attn last.attn.out", "last.mlp mlp last.mlp.2"),
        ],
    ),
    "same block twice": (
        SameBlockTwice,
        [
            *("block.attn attn block.attn.out", "block.mlp mlp block.mlp.2"),
            *("block.attn@1 attn block.attn.out", "block.mlp@1 mlp block.mlp.2"),
        ],
    ),
}


def inputs(model: nn.Module, step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn((2, 4, WIDTH), generator=generator)
    context = torch.randn((2, 3, WIDTH), generator=generator)
    return (x, context) if isinstance(model, Cross | TwoStreams) else (x,)


@pytest.mark.parametrize("name", FOUND)
def test_sites(name: str) -> None:
    make, wanted = FOUND[name]
    model = fill_random(make())
    traced = trace(model, inputs(model, 0), dynamic_batch=False)
    found = [
        " ".join([s.name, s.kind, *["fused"] * s.fused, *(str(v.module) for v in s.values)])
        for s in traced.sites
    ]
    assert found == wanted
    for index in range(len(found)):
        check_reuse(model, traced, index)


def check_reuse(model: nn.Module, traced: TracedModel, index: int) -> None:
    """Reusing one site, then all, does what replacing the outputs of modules does."""
    row = [int(site != index) for site in range(len(traced.sites))]
    policy = {"method": "table", "rows": ["compute", row, "reuse"]}
    artifact = compile_traced(model, traced, {"cachegraph": 1, "steps": 3, "policy": policy})
    run, plan = cg.load(artifact), artifact.program.plan
    reference = cg.ReferenceRunner.of_plan(model, traced, plan, artifact.schedule)
    for step in range(3):
        call = inputs(model, step)
        found = run(*call, step=step)
        assert relative_error(found, reference(*call, step=step)) <= 1e-6
        with torch.no_grad():
            distance = relative_error(found, model(*call))
        assert distance > 1e-3 if step else distance == 0


def test_no_site_lists_what_was_found() -> None:
    model = NoSite()
    with pytest.raises(SiteError) as caught:
        trace(model.eval(), inputs(model, 0))
    assert str(caught.value) == (
        "no attention or mlp site was found in NoSite; "
        "expected residual adds whose branch holds attention or two linears in series; "
        "found 3 operations: 1 layer_norm, 1 linear, 1 add"
    )


def test_a_glob_that_matches_nothing_lists_the_sites() -> None:
    model = Block().eval()
    sites = {"include": ["attn", "mpl"]}
    schedule = {"cachegraph": 1, "steps": 2, "policy": {"method": "full"}, "sites": sites}
    with pytest.raises(SiteError) as caught:
        cg.compile(model, schedule, inputs(model, 0), backend="eager")
    for part in ("glob 'mpl' matches no site", "2 sites: attn (attn), mlp (mlp)", "'mlp'?"):
        assert part in str(caught.value)


# --- every transformer of diffusers, as measured

SHARED = Path(__file__).parents[3] / "shared"  # the folder of the fixture of that name
CONFIGS = SHARED / "models" / "tiny_configs.json"
NOT_EXPORTED = {
    "CosmosTransformer": "resizes a mask with torchvision",
    "CosmosTransformerVideoToWorld": "resizes a mask with torchvision",
    "HiDreamTransformer": "its mixture of experts indexes by data",
    "HunyuanImageGlyph": "its control flow depends on the conditioning mask",
    "HunyuanVideoFramepackTransformer": "its control flow depends on the conditioning mask",
    "OmniGenTransformer": "its control flow depends on positions",
    "QwenImage21": "its control flow depends on the conditioning mask",
}


def measured(shared: Path) -> dict[str, tuple[int, int]]:
    """Attention values, fused ones left out, and mlp values by configuration."""
    text = (shared / "SITES.md").read_text(encoding="utf-8").partition("## Sites per")[2]
    counts = re.findall(r"(\w+)\s+(\d+)/(\d+)", text)
    return {name: (int(attention), int(mlps)) for name, attention, mlps in counts}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed:FutureWarning"
)  # diffusers
@pytest.mark.parametrize("name", sorted(read_configs(CONFIGS)) if CONFIGS.is_file() else ["any"])
def test_sites_of_diffusers(name: str, shared: Path) -> None:
    pytest.importorskip("diffusers")
    if name in NOT_EXPORTED:
        pytest.skip(f"torch.export cannot follow it: {NOT_EXPORTED[name]}")
    config = read_configs(CONFIGS)[name]
    sites = trace(build(config), (), make_inputs(config)).sites
    attention = sum(len(s.values) for s in sites if s.kind != "mlp" and not s.fused)
    mlps = sum(len(s.values) for s in sites if s.kind == "mlp")
    assert (attention, mlps) == measured(shared).get(name, (attention, mlps))
