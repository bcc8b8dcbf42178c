"""Whole models, known and from diffusers: bit for bit without caching, as the reference with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import cachegraph as cg
from cachegraph.graph.interface import Role
from cachegraph.model.trace import TracedModel, trace
from cachegraph.runtime.known import Prologues
from tests.models import (
    DATA,
    Inputs,
    compile_traced,
    dit_steps,
    fora,
    full,
    one_thread,  # noqa: F401
    own_operator,
    read_configs,
    relative_error,
    shared_dit,
    tensors,
    tiny_dit,
    trajectory,
)
from tests.models import build as build_model

STEPS = 6
DIFFUSERS = read_configs(DATA / "diffusers_tiny.json")

# name and kind of every site, in the order of execution; fused ones are marked
SITES = {
    "zoo": [f"blocks.{i}.{site}" for i in (0, 1) for site in ("attn attn", "mlp mlp")],
    "DiTTransformer2D": [
        f"transformer_blocks.{i}.{site}" for i in (0, 1) for site in ("attn1 attn", "ff mlp")
    ],
    "PixArtTransformer2D": [
        f"transformer_blocks.{i}.{site}"
        for i in (0, 1)
        for site in ("attn1 attn", "attn2 cross_attn", "ff mlp")
    ],
    "SD3Transformer": [
        "transformer_blocks.0.attn attn",
        "transformer_blocks.0.ff mlp",
        "transformer_blocks.0.ff_context mlp",
        "transformer_blocks.1.attn attn",  # its text stream ends here
        "transformer_blocks.1.ff mlp",
    ],
    "FluxTransformer": [
        "transformer_blocks.0.attn attn",
        "transformer_blocks.0.ff mlp",
        "transformer_blocks.0.ff_context mlp",
        "single_transformer_blocks.0:attn attn fused",
    ],
    "WanTransformer3D": ["blocks.0.attn1 attn", "blocks.0.attn2 cross_attn", "blocks.0.ffn mlp"],
}


class Case(NamedTuple):
    name: str
    model: nn.Module
    traced: TracedModel
    calls: list[Inputs]  # of one trajectory


@pytest.fixture(scope="module", params=SITES)
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "zoo":
        model: nn.Module = tiny_dit()
        calls = [dict(zip("xty", call, strict=True)) for call in dit_steps(STEPS)]
    else:
        pytest.importorskip("diffusers")
        config = DIFFUSERS[request.param]
        model, calls = build_model(config), list(trajectory(config, STEPS))
    return Case(request.param, model, trace(model, (), calls[0]), calls)


@torch.no_grad()
def eager(case: Case, call: Inputs) -> Any:
    return case.model(**call)


def test_sites(case: Case) -> None:
    found = [f"{s.name} {s.kind}{' fused' * s.fused}" for s in case.traced.sites]
    assert found == SITES[case.name]


def test_joint_attention_has_a_value_for_each_stream(case: Case) -> None:
    joint = {
        "SD3Transformer": [2, 1, 1, 1, 1],
        "FluxTransformer": [2, 1, 1, 1],
    }
    values = [len(site.values) for site in case.traced.sites]
    assert values == joint.get(case.name, [1] * len(values))


def test_the_batch_may_vary(case: Case) -> None:
    assert case.traced.batch is not None, case.traced.fixed_batch_reason


def test_without_caching_equal_bit_for_bit(case: Case) -> None:
    artifact = compile_traced(case.model, case.traced, full(STEPS))
    assert len(artifact.graphs) == 1
    run = cg.load(artifact)
    for call in case.calls:
        found, wanted = tensors(run(**call)), tensors(eager(case, call))
        assert [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * len(
            wanted
        )


@pytest.mark.parametrize("interval", [2, 3])
def test_fora_equals_the_reference(case: Case, interval: int) -> None:
    artifact = compile_traced(case.model, case.traced, fora(STEPS, interval))
    plan = artifact.program.plan
    run = cg.load(artifact)
    reference = cg.ReferenceRunner.of_plan(case.model, case.traced, plan, artifact.schedule)
    distances = []
    for call in case.calls:
        found = run(**call)
        assert relative_error(found, reference(**call)) <= 1e-5
        distances.append(relative_error(found, eager(case, call)))
    # The test can fail: a reused value is far from a computed one.
    computed = {step for step in range(STEPS) if step == 0 or (STEPS - 1 - step) % interval == 0}
    assert {step for step, distance in enumerate(distances) if distance == 0} == computed
    assert {step for step, distance in enumerate(distances) if distance > 0.02} == (
        set(range(STEPS)) - computed
    )


# --- what is known before a step runs

# weights that only prologues have left: per request, and per step
REQUEST = {
    "zoo": "",
    "DiTTransformer2D": "",
    "PixArtTransformer2D": "attn2.to_k attn2.to_v",
    "SD3Transformer": "context_embedder",
    "FluxTransformer": "context_embedder",
    "WanTransformer3D": "text_embedder attn2.to_k attn2.norm_k attn2.to_v rope",
}
STEP = {
    "zoo": "t_embedder y_embedder adaLN_modulation",
    "DiTTransformer2D": "timestep_embedder class_embedder norm1.linear proj_out_1",
    "PixArtTransformer2D": "timestep_embedder adaln_single.linear scale_shift_table",
    "SD3Transformer": "timestep_embedder text_embedder norm1.linear norm1_context norm_out.linear "
    "0.attn.add_k_proj",
    "FluxTransformer": "timestep_embedder text_embedder norm1.linear norm1_context norm.linear "
    "norm_out.linear 0.attn.add_k_proj",
    "WanTransformer3D": "time_embedder time_proj scale_shift_table",
}
ROTARY = {"FluxTransformer": 2, "WanTransformer3D": 4}  # tables: sine and cosine, for q and k


def weights_of(module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.find_nodes(op="get_attr")}


def test_what_is_known_leaves_the_steps(case: Case) -> None:
    artifact = compile_traced(case.model, case.traced, fora(STEPS, 3))
    left = set().union(*map(weights_of, artifact.graphs))
    for prologue, parts in (("request", REQUEST), ("variant0-prologue", STEP)):
        assert (prologue in artifact.prologues) == bool(parts[case.name])
        made = weights_of(artifact.prologues[prologue]) if parts[case.name] else set()
        for part in parts[case.name].split():
            assert [name for name in made if part in name], part
            assert not [name for name in left if part in name], part
    known = artifact.program.variants[0].interface.known
    by_request = [port.spec for port in known if port.role is Role.REQUEST]
    tables = [spec for spec in by_request if all(isinstance(size, int) for size in spec.shape)]
    assert len(tables) == ROTARY.get(case.name, 0)


def test_what_is_known_may_be_computed_for_many_steps_at_once(case: Case) -> None:
    schedule, off = fora(STEPS, 3), ["hoist-known", "slice-columns"]
    plain = cg.load(compile_traced(case.model, case.traced, schedule, disable=off))
    wanted = [plain(**call) for call in case.calls]
    artifact = compile_traced(case.model, case.traced, schedule)
    assert [variant.step_by_step for variant in artifact.program.variants] == ["", ""]
    before = Prologues.of(artifact.program, artifact.prologues, batched=True)
    run = cg.Runner(artifact.program, artifact.graphs, artifact.weights, prologues=before)
    for _ in range(2):  # the second time all timesteps are known
        for call, result in zip(case.calls, wanted, strict=True):
            assert relative_error(run(**call), result) <= 1e-6


@own_operator
def halves(x: Tensor) -> list[Tensor]:
    """An operator that torch cannot batch: it returns a list."""
    return [x[:, :16].clone(), x[:, 16:].clone()]


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[0], 16), x.new_empty(x.shape[0], x.shape[1] - 16)]


class Halved(nn.Module):
    """Modulation goes through an operator of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.mlp = nn.Linear(1, 32), nn.Linear(32, 32)
        self.back = nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = halves(self.time(t[:, None]).exp())
        modulation = torch.cat([shift, scale], dim=1)[:, None]
        return x + self.back(torch.relu(self.mlp(x * modulation)))


def test_what_cannot_be_batched_is_computed_step_by_step() -> None:
    model = Halved().eval()
    calls = [(torch.randn(2, 4, 32), torch.full((2,), 1 - step / 10)) for step in range(STEPS)]
    with pytest.warns(UserWarning, match=r"variant0: values known .* step by step: .*halves"):
        artifact = cg.compile(model, full(STEPS), calls[0], backend="eager")
    before = Prologues.of(artifact.program, artifact.prologues, batched=True)
    assert before.ahead == (None,)
    run = cg.Runner(artifact.program, artifact.graphs, artifact.weights, prologues=before)
    with torch.no_grad():
        for _ in range(2):
            assert all(torch.equal(run(*call), model(*call)) for call in calls)


def test_reference_runner_traces_by_itself() -> None:
    (model, traced), calls = shared_dit(), dit_steps(STEPS)
    run = cg.load(compile_traced(model, traced, fora(STEPS, 3)))
    reference = cg.ReferenceRunner(model, fora(STEPS, 3))
    for call in calls:
        assert relative_error(run(*call), reference(*call)) <= 1e-5


class FixesItsBatch(nn.Module):
    """A model that does arithmetic on the batch which no symbol can stand."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = tiny_dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if type(x.shape[0]) is not int:
            raise TypeError("no symbols please")
        return self.dit(x, t, y)


def test_a_batch_that_cannot_vary_says_why() -> None:
    model, calls = FixesItsBatch().eval(), dit_steps(STEPS)
    apart = trace(model, calls[0])
    assert apart.fixed_batch_reason == "item by item: torch.export: TypeError: no symbols please"
    traced = trace(model, calls[0], by_item=False)
    assert traced.batch is None
    assert traced.symbols == {}
    assert traced.fixed_batch_reason == "torch.export: TypeError: no symbols please"
    assert [vars(tensor) for tensor in calls[0]] == [{}, {}, {}]  # the first attempt left nothing
    run = cg.load(compile_traced(model, traced, full(STEPS)))
    with torch.no_grad():
        assert torch.equal(run(*calls[0]), model(*calls[0]))


# --- nothing about the model is changed


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that hangs on a model: which object, and of containers what is in them."""
    state: dict[str, object] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            state[f"{path}.{key}"] = (id(value), contents(value))
    return state


def contents(value: object) -> object:
    match value:
        case Tensor():
            return value.detach().clone().tolist(), value.requires_grad, value.grad is None
        case dict():
            return [(key, id(item), contents(item)) for key, item in value.items()]
        case list() | tuple() | set():
            return [id(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None


class KeepsState(nn.Module):
    """A model that remembers positions, once in an attribute and once in a dict, and has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = tiny_dit()
        self.positions: Tensor | None = None
        self.by_length: dict[int, Tensor] = {}
        self.lengths: list[int] = []
        self.register_buffer("offset", torch.ones(1), persistent=False)
        self.dit.blocks[0].register_forward_hook(lambda _module, _args, output: output + 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.arange(x.shape[-1], device=x.device) / 10
        if x.shape[-1] not in self.by_length:
            self.by_length[x.shape[-1]] = torch.arange(x.shape[-1], device=x.device) / 5
            self.lengths.append(x.shape[-1])
        return self.dit(x + self.positions + self.by_length[x.shape[-1]] + self.offset, t, y)


def models_with_inputs() -> Iterator[tuple[str, nn.Module, Inputs]]:
    call = dict(zip("xty", dit_steps(1)[0], strict=True))
    yield "zoo", tiny_dit(), call
    yield "keeps-state", KeepsState().eval(), call


def check_unchanged(model: nn.Module, call: Inputs) -> None:
    names = list(model.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        before, random_before = state_of(model), torch.random.get_rng_state()
        artifact = cg.compile(model, fora(STEPS, 3), kwargs=call, backend="eager")
        cg.load(artifact)(**call)
        assert torch.equal(torch.random.get_rng_state(), random_before)
    assert state_of(model) == before
    assert list(model.state_dict()) == names
    with torch.no_grad():
        wanted = model(**call)
    found = cg.load(artifact)(**call)
    for a, b in zip(tensors(found), tensors(wanted), strict=True):
        assert type(b) is Tensor  # no fake tensor that tracing left behind
        assert torch.equal(a, b)


def test_compiling_leaves_a_diffusers_model_as_it_was() -> None:
    pytest.importorskip("diffusers")
    config = DIFFUSERS["WanTransformer3D"]
    check_unchanged(build_model(config), next(trajectory(config, STEPS)))


@pytest.mark.parametrize("name", ["zoo", "keeps-state"])
def test_compiling_leaves_the_model_as_it_was(name: str) -> None:
    _, model, call = next(entry for entry in models_with_inputs() if entry[0] == name)
    check_unchanged(model, call)
