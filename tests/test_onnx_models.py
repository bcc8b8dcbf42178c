"""Models and presets through onnxruntime, and what TensorRT's parser would say to them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph import pipeline
from cachegraph.backends import tensorrt
from cachegraph.schedule import presets
from cachegraph.trace import TracedModel, trace
from cachegraph.zoo import DiT, load_digits_model, sample_digits
from tests.models import (
    DATA,
    build,
    compile_traced,
    fora,
    one_thread,  # noqa: F401
    read_configs,
    relative_error,
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
