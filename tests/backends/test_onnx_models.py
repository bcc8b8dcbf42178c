"""Models and presets through onnxruntime, and what TensorRT's parser would say to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.backends.named import named_graphs
from cachegraph.backends.tensorrt import backend as tensorrt
from cachegraph.compiler import pipeline
from cachegraph.graph import ops
from cachegraph.methods.router import Router
from cachegraph.methods.smoothcache import SmoothCache
from cachegraph.model.trace import TracedModel, trace
from cachegraph.schedule.schedule import Schedule, load_schedule, presets
from cachegraph.zoo import DiT, PixArt, load_digits_model, sample_digits
from tests.models import (
    DATA,
    build,
    compile_traced,
    dit_steps,
    fora,
    make_inputs,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
    tiny_dit,
    tiny_pixart,
    trajectory,
)

pytestmark = pytest.mark.onnx
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
operators: Any = pytest.importorskip("cachegraph.backends.tensorrt.operators")
in_single_precision, refusals = operators.in_single_precision, operators.refusals

STEPS, LABELS = 4, (3, 8)
DIFFUSERS = read_configs(DATA / "diffusers_tiny.json")


@pytest.mark.parametrize("name", DIFFUSERS)
def test_models_of_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    model, calls = build(DIFFUSERS[name]), list(trajectory(DIFFUSERS[name], STEPS))
    artifact = compile_traced(model, trace(model, (), calls[0]), fora(STEPS, 3))
    run, eager = artifact.runner(backend="onnx"), artifact.runner()
    for call in calls:
        found = run(**call)
        assert relative_error(found, eager(**call)) < 1e-5
    with torch.no_grad():
        assert relative_error(found, model(**calls[-1])) < 1e-5  # the last step is computed
    files = {p.stem: onnx.load(p, load_external_data=False) for p in folder_of(artifact).iterdir()}
    tensorrt.refuse_unsupported(files)


def folder_of(artifact: cg.Artifact) -> Any:
    return artifact.compiled["onnx"]


@pytest.fixture(scope="module")
def digits() -> tuple[DiT, TracedModel]:
    model = load_digits_model()
    return model, trace(model, *model.example_inputs(2 * len(LABELS)))


DIGITS = [name for name in presets() if name.startswith("digits-")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DIGITS, "fora-n3", "toca-n3"])
def test_the_same_digits(name: str, digits: tuple[DiT, TracedModel]) -> None:
    with mock.patch.object(pipeline, "verify"):  # other tests do
        artifact = compile_traced(*digits, name)
    found, wanted = (
        sample_digits(artifact.runner(backend=backend), LABELS, seed=7)
        for backend in ("onnx", "eager")
    )
    assert isinstance(found, Tensor)
    assert (found - wanted).abs().max() < 1e-4


# --- the choice of tokens by entropy, which is float64 where it decides


def test_entropies_that_differ_in_the_last_digit_are_told_apart() -> None:
    less = torch.full((), 1.55)
    more = torch.nextafter(less, torch.tensor(2.0))
    entropy = torch.stack([less, more, less]).repeat(2, 1)
    entropy[1, 1] = less
    assert 1 + (less + more) == 1 + (less + less)  # in float32 they are not
    score = ops.entropy_score(entropy)
    assert score.dtype == torch.float64
    assert (score[:, 1] > score[:, 0]).all()
    assert torch.equal(score[:, 2], score[:, 0])


def test_tensorrt_gets_the_choice_in_single_precision() -> None:
    text = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(0))
    policy = {"method": "toca", "interval": 4, "fresh_ratio": 0.3, "rules": "pixart"}
    schedule = {"cachegraph": 1, "steps": 8, "policy": policy | {"quirks": False}}
    calls = [(x, t, text) for x, t, _ in dit_steps(8)]
    artifact = cg.compile(tiny_pixart(), schedule, calls[0], backend="eager")
    run, eager = artifact.runner(backend="onnx"), artifact.runner()
    for call in calls:
        assert relative_error(run(*call), eager(*call)) < 1e-5
    for path in folder_of(artifact).iterdir():
        model = onnx.load(path, load_external_data=False)
        changed = in_single_precision(model)
        onnx.shape_inference.infer_shapes(changed, strict_mode=True, check_type=True)
        assert not refusals(changed)
        if any(node.op_type == "TopK" for node in model.graph.node):
            assert {str(one).rpartition("): ")[2] for one in refusals(model)} == {
                "works on double",
                "casts to double",
            }


# --- every preset


@pytest.fixture(scope="module")
def seen() -> dict[str, list[str]]:
    """Text of a graph -> why it is refused; presets share most of their graphs."""
    return {}


def write_list_of(schedule: Schedule, folder: Path) -> None:
    """In place of the published file of a preset: one for a model of two blocks."""
    policy, steps = schedule.policy, schedule.steps
    if isinstance(policy, Router):
        scores = {f"{i}.prob": torch.tensor([-3.0, -3, 3, -3]) for i in range(steps)}
        torch.save({"routers": scores}, folder / str(policy.file))
    if isinstance(policy, SmoothCache) and policy.file:
        lists = {kind: ([1, 0] * steps)[:steps] for kind in ("attn", "mlp")}
        (folder / policy.file).write_text(json.dumps(lists))


def small_model(preset: str) -> tuple[nn.Module, Any, Any]:
    """A model of the family that a preset is for and inputs of a call."""
    if preset.endswith(("-flux", "-hunyuan")):  # both have joint attention and fused blocks
        pytest.importorskip("diffusers")
        config = DIFFUSERS["FluxTransformer"]
        return build(config), (), make_inputs(config)
    small: Any = tiny_dit()
    if preset.endswith("pixart"):
        small = PixArt(input_size=8, hidden_size=32, depth=2, num_heads=2).eval()
    return small, *small.example_inputs(batch=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
def test_presets_pass(
    name: str, seen: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachegraph.backends.onnx.convert import to_onnx

    monkeypatch.chdir(tmp_path)
    write_list_of(load_schedule(name), tmp_path)
    model, args, kwargs = small_model(name)
    with mock.patch.object(pipeline, "verify"):
        artifact = cg.compile(model, name, args, kwargs, backend="eager")
    for graph, text in zip(
        named_graphs(artifact.program, artifact.graphs).items(), artifact.texts, strict=True
    ):
        key = text.partition("\n")[2]
        if key not in seen:
            made = in_single_precision(to_onnx(*graph, artifact.weights))
            seen[key] = [str(one) for one in refusals(made)]
        assert not seen[key]
