"""ToCa where sites hold sites and streams differ: FLUX and STDiT3, by reference and recordings.

Graphs of one block each are compared with the reference; the published implementations' outputs
on all blocks take minutes to trace, so most of them are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.compiler import pipeline
from cachegraph.compiler.compile import Build, assemble, build
from cachegraph.errors import PlanError, SiteError
from cachegraph.graph.step_graph import StepGraph
from cachegraph.graph.text import graph_text
from cachegraph.model.site import Folding, Inner, Site
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Refresh
from cachegraph.zoo.flux import SingleBlock
from tests.models import one_thread, relative_error, tiny_flux, tiny_stdit  # noqa: F401

LIMIT = 1e-4
FLUX = {"method": "toca", "rules": "flux", "interval": 4, "fresh_ratio": 0.1}
OPENSORA = {"method": "toca", "rules": "opensora", "fresh_ratio": 0.1}
Call = dict[str, Tensor]
Case = tuple[nn.Module, TracedModel, list[Call]]


def calls_of(inputs: Call, latent: str, time: str, steps: int, last: float) -> list[Call]:
    """A trajectory: fresh noise, falling time, all else stays."""
    generator = torch.Generator().manual_seed(1)
    return [
        inputs
        | {
            latent: torch.randn(inputs[latent].shape, generator=generator),
            time: torch.full_like(inputs[time], last * (1 - step / (steps + 1))),
        }
        for step in range(steps)
    ]


@pytest.fixture(scope="module")
def flux() -> Case:
    model = tiny_flux()
    vars(model)["latent_size"] = 8  # 16 image tokens
    _, inputs = model.example_inputs(2)
    inputs["txt"], inputs["txt_ids"] = inputs["txt"][:, :7], inputs["txt_ids"][:, :7]
    calls = calls_of(inputs, "img", "timesteps", 9, 1.0)
    return model, trace(model, (), calls[0]), calls


@pytest.fixture(scope="module")
def stdit() -> Case:
    model = tiny_stdit()
    _, inputs = model.example_inputs(4)
    inputs["mask"][1::2, 3:] = 0  # texts of unequal lengths in either half
    rows = {name: inputs[name][:2] for name in ("mask", "fps", "height", "width")}
    calls = calls_of({**inputs, **rows}, "x", "timestep", 13, 1000.0)
    return model, trace(model, (), calls[0]), calls


def schedule(policy: dict[str, Any], steps: int) -> dict[str, Any]:
    return {"cachegraph": 1, "steps": steps, "policy": policy}


def built(case: Case, policy: dict[str, Any]) -> Build:
    model, traced, calls = case
    return build(model, schedule(policy, len(calls)), traced=traced)


def sites_of(traced: TracedModel) -> dict[str, Site]:
    return {site.name: site for site in traced.sites}


# Structure.


def test_streams_of_a_joint_attention_are_found(flux: Case) -> None:
    sites = sites_of(flux[1])
    image, text = sites["double_blocks.0:attn"].values
    assert (image.tokens, text.tokens) == ((7, 23), (0, 7))
    assert sites["double_blocks.0.img_mlp"].source == image.residual != text.residual
    assert sites["double_blocks.0.txt_mlp"].source == text.residual


def test_attention_inside_a_fused_block_is_found(flux: Case) -> None:
    site = sites_of(flux[1])["single_blocks.0:attn"]
    assert site.fused
    assert isinstance(site.inner, Inner)
    assert site.inner.columns == (0, 32)
    assert site.inner.spec.shape[1:] == (23, 32)
    assert sites_of(flux[1])["double_blocks.0:attn"].inner is None


def test_attention_within_frames_and_along_time_is_found(stdit: Case) -> None:
    sites = sites_of(stdit[1])
    assert sites["spatial_blocks.0.attn"].values[0].folding == Folding(3, outer=True)
    assert sites["temporal_blocks.0.attn"].values[0].folding == Folding(4, outer=False)
    assert sites["spatial_blocks.0.cross_attn"].values[0].folding is None


# Graphs against the reference.


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"fresh_ratio": 1.0},
        {"score": "kv-norm"},
        {"score": "norm"},
        {"score": "random"},
        {"rules": {"like": "flux", "first": 1, "refresh": ("mlp",)}, "ratio_schedule": "constant"},
    ],
    ids=["published", "all tokens", "kv-norm", "norm", "random", "own rules"],
)
def test_flux_agrees_with_the_reference(flux: Case, more: dict[str, Any]) -> None:
    agree(flux, {**FLUX, "fresh_ratio": 0.3, **more})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "duca"},
        {"score": "attention"},
        {"ratio_schedule": "constant"},  # cross-attention recomputes tokens too
    ],
    ids=["published", "duca", "attention", "constant"],
)
def test_opensora_agrees_with_the_reference(stdit: Case, more: dict[str, Any]) -> None:
    agree(stdit, {**OPENSORA, "fresh_ratio": 0.3, **more})


def agree(case: Case, policy: dict[str, Any], backend: str = "eager") -> None:
    model, traced, calls = case
    made = built(case, policy)
    assert any(isinstance(action, Refresh) for row in made.plan.rows for action in row)
    run = assemble(made, backend).runner()
    reference = cg.ReferenceRunner.of_plan(model, traced, made.plan, made.schedule)
    differs = 0
    for call in calls:
        found = run(**call)
        assert relative_error(found, reference(**call)) <= LIMIT
        with torch.no_grad():
            differs += relative_error(found, model(**call)) > 100 * LIMIT
    assert differs >= 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", pytest.param("onnx", marks=pytest.mark.onnx)])
def test_backends_agree_with_the_reference(flux: Case, stdit: Case, backend: str) -> None:
    agree(flux, {**FLUX, "fresh_ratio": 0.3}, backend)
    agree(stdit, {**OPENSORA, "fresh_ratio": 0.3}, backend)


def test_a_partial_step_runs_neither_attention_nor_its_columns(flux: Case) -> None:
    """Of the projection that serves both, the columns of the mlp are left."""
    made = built(flux, FLUX)
    [partial] = [g for g in made.graphs if any(isinstance(a, Refresh) for a in g.variant.row)]
    assert isinstance(partial, StepGraph)
    text = graph_text(partial)
    assert "scaled_dot_product_attention" not in text
    assert "@single_blocks.0.linear1.weight[96:224]" in text
    assert "@single_blocks.0.linear1.weight," not in text
    assert 'slot "single_blocks.0:attn:inner"' in text


def test_orders_are_made_for_each_number_of_tokens(flux: Case) -> None:
    made = built(flux, {**FLUX, "fresh_ratio": 0.3})
    counts = [c for v in made.plan.variants for c in v.constants if c.name.startswith("counts")]
    assert [len(one.sites) for one in counts] == [1, 1, 1]  # 16, 7 and 23 tokens


def test_attention_over_other_tokens_cannot_score(stdit: Case) -> None:
    """Cross-attention's keys are text, so no column of it is a token of the stream."""
    model, traced, _ = stdit
    name = "spatial_blocks.0.attn"
    sites = tuple(site if site.name != name else _unfolded(site) for site in traced.sites)
    broken = TracedModel(**{**vars(traced), "sites": sites})
    with pytest.raises(SiteError, match=f"attention of {name} cannot score .*blocks.0.mlp"):
        build(model, schedule({**OPENSORA, "score": "attention"}, 13), traced=broken)


def _unfolded(site: Site) -> Site:
    value = type(site.values[0])(**{**vars(site.values[0]), "folding": None})
    return Site(**{**vars(site), "values": (value,)})


class Woven(SingleBlock):
    """Attention and mlp go into the last projection channel by channel in turn."""

    def forward(self, x: Tensor, vec: Tensor, turn: Any) -> Tensor:
        def weave(_: nn.Module, given: tuple[Tensor]) -> Tensor:
            return given[0].unflatten(-1, (5, -1)).transpose(-1, -2).flatten(-2)

        with self.linear2.register_forward_pre_hook(weave):
            return super().forward(x, vec, turn)


def test_a_projection_that_cannot_be_split_is_refused() -> None:
    model = tiny_flux()
    model.single_blocks[0].__class__ = Woven
    traced = trace(model, *model.example_inputs(2))
    site = sites_of(traced)["single_blocks.0:attn"]
    assert (site.fused, site.inner) == (True, None)
    what = r"last projection of single_blocks\.0:attn cannot be split into attention and mlp"
    with pytest.raises(PlanError, match=what) as caught:
        build(model, schedule(FLUX, 9), traced=traced)
    assert caught.value.place == "schedule: policy.rules"
    assert "let it be reused whole: rules: {like: ..., refresh: [mlp]}" in caught.value.remedy
    whole = {**FLUX, "rules": {"like": "flux", "refresh": ["mlp"]}}
    assert build(model, schedule(whole, 9), traced=traced).plan.steps == 9


# Recordings.


class Recording:
    """What a published implementation computed, and graphs for its schedule."""

    def __init__(self, folder: Path, name: str) -> None:
        flux = name.startswith("flux")
        recorded = load_file(folder / f"{name}.safetensors")
        self.out = recorded["out"]
        weights = folder / f"{'flux' if flux else 'opensora'}_tiny.safetensors"
        if flux:
            self.model = cg.load_model(weights, arch="FLUX", num_heads=2, axes_dim=[4, 6, 6])
            names = ("img_ids", "txt", "txt_ids", "guidance")
            lasting = {n: recorded[n] for n in names} | {"y": recorded["vec"]}
        else:
            self.model = cg.load_model(weights, arch="STDiT3(num_heads=4)")
            lasting = {n: recorded[n] for n in ("y", "mask", "fps", "height", "width")}
        latent, time = ("img", "timesteps") if flux else ("x", "timestep")
        pairs = zip(recorded["x"], recorded["t"], strict=True)
        self.calls = [lasting | {latent: x, time: t} for x, t in pairs]
        policy, steps = (FLUX, 50) if flux else (OPENSORA, 30)
        self.traced = trace(self.model, (), self.calls[0])
        # Verifying all blocks takes most of the time; the tests above do it on one.
        with mock.patch.object(pipeline, "verify"):
            self.built = build(self.model, schedule(policy, steps), traced=self.traced)

    @torch.no_grad()
    def errors(self, run: Callable[..., Tensor]) -> list[float]:
        pairs = zip(self.calls, self.out, strict=True)
        return [relative_error(run(**call), out) for call, out in pairs]


NAMES = ["opensora_toca_first14", pytest.param("flux_toca_n4_r10", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=NAMES)
def recording(request: pytest.FixtureRequest, shared: Path) -> Recording:
    return Recording(shared / "golden", request.param)


@pytest.mark.filterwarnings("ignore:a trajectory ends")
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("inductor", marks=pytest.mark.slow),
        pytest.param("onnx", marks=[pytest.mark.slow, pytest.mark.onnx]),
    ],
)
def test_recording(recording: Recording, backend: str) -> None:
    assert max(recording.errors(assemble(recording.built, backend).runner())) <= LIMIT


@pytest.mark.filterwarnings("ignore:a trajectory ends")
def test_recording_by_the_reference(recording: Recording) -> None:
    made = recording.built
    run = cg.ReferenceRunner.of_plan(recording.model, made.traced, made.plan, made.schedule)
    assert max(recording.errors(run)) <= LIMIT


def test_a_wrong_rule_cannot_hide(recording: Recording) -> None:
    errors = recording.errors(recording.model)
    rows = recording.built.plan.rows
    partial = [any(isinstance(a, Refresh) for a in row) for row in rows]
    found = list(zip(errors, partial[: len(errors)], strict=True))
    assert all(error > 100 * LIMIT for error, one in found if one)
    assert max(errors[:3]) <= LIMIT
