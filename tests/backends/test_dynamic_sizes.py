"""Sizes that vary, by every backend that runs here."""
# ruff: noqa: TID251 - what torch.compile did is told by its private counters only

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import cachegraph as cg
from tests.model.test_dynamic import SIZES, artifact, worst


def check(run: cg.Runner) -> None:
    for sizes in SIZES:
        assert worst(run, **sizes) < 1e-5


@pytest.mark.onnx
def test_onnx_takes_every_size_and_names_it(tmp_path: Path) -> None:
    import onnx

    path = replace(artifact(), backend="onnx", compiled={}).save(tmp_path / "painter.cgraph")
    check(cg.load(path))
    model = onnx.load(path / "compiled/onnx/variant0.onnx", load_external_data=False)
    shapes = {
        v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    }
    assert shapes["x"] == ["batch", "", "height", "width"]
    assert shapes["text"] == ["batch", "text", ""]


@pytest.mark.slow
def test_inductor_compiles_once_for_all_sizes() -> None:
    torch.compiler.reset()
    run = cg.load(artifact(), backend="inductor")
    assert worst(run, **SIZES[0]) < 1e-5
    counters.clear()
    for sizes in SIZES[1:3]:
        assert worst(run, **sizes) < 1e-5
    assert not counters["stats"]["unique_graphs"]
    assert worst(run, **SIZES[3]) < 1e-5  # a batch of one is compiled apart
    apart = counters["stats"]["unique_graphs"]
    assert worst(run, **SIZES[3] | {"height": 8, "text": 6}) < 1e-5
    assert counters["stats"]["unique_graphs"] == apart > 0


@pytest.mark.slow
def test_aoti_takes_every_size() -> None:
    check(cg.load(artifact(), backend="aoti"))
