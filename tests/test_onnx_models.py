"""Models and presets through onnxruntime, and what TensorRT's parser would say to them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph import ops, pipeline
from cachegraph.backends import tensorrt
from cachegraph.schedule import presets
from cachegraph.trace import TracedModel, trace
from cachegraph.zoo import DiT, load_digits_model, sample_digits
from tests.models import (
    DATA,
    build,
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
    tiny_pixart,
    trajectory,
)

pytestmark = pytest.mark.onnx
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

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
    from cachegraph.backends.tensorrt_operators import in_single_precision, refusals

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
