"""What `cachegraph export` writes: the loop as data, and a sampler that knows nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from typer.testing import CliRunner

import cachegraph as cg
from cachegraph.artifact.bundle import LOOP, export_onnx, loop_steps
from cachegraph.backends.named import named_graphs, named_prologues
from cachegraph.cli import app
from cachegraph.errors import ArtifactError
from cachegraph.zoo import sample_digits
from cachegraph.zoo.digits import IMAGE_SHAPE, load_digits_model
from tests.models import (
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    shared_dit,
)

SAMPLER = Path(__file__).parents[2] / "tools" / "onnx_sampler.py"
STEPS, LABELS = 6, [3, 8]


@pytest.fixture(scope="module")
def made() -> cg.Artifact:
    schedule = {
        "cachegraph": 1,
        "steps": 7,
        "policy": {"method": "taylorseer", "interval": 3, "order": 1, "warmup": 1},
    }
    return compile_traced(*shared_dit(depth=1), schedule)


def test_a_loop_by_its_names_alone_is_the_runner(made: cg.Artifact) -> None:
    """Steps, slots and constants as the exported loop says them, over the graphs themselves."""
    graphs = named_graphs(made.program, made.graphs)
    prologues = named_prologues(made.program, made.prologues)
    steps = loop_steps(made.program)
    run, kept, known = cg.load(made), {}, {}
    for number, (step, call) in enumerate(zip(steps, dit_steps(7), strict=True)):
        graph = graphs[step.graph]
        for name in step.prologues:
            values = prologues[name].module(*call)
            known |= dict(zip(prologues[name].outputs, values, strict=True))
        feed: dict[str, Any] = dict(zip("xty", call, strict=True))
        feed |= {name: kept[source.step, source.output] for name, source in step.slots.items()}
        feed |= {
            name: torch.tensor(numbers, dtype=graph.inputs[name].dtype)
            for name, numbers in step.constants.items()
        }
        feed |= {name: known[name] for name in step.known}
        assert list(feed) == list(graph.inputs)
        results = dict(zip(graph.outputs, graph.module(*feed.values()), strict=True))
        kept |= {(number, name): results[name] for name in step.keep}
        for source in step.free:
            del kept[source.step, source.output]
        assert torch.equal(results["out"], run(*call))
        assert len(kept) == len(run._session._branches[""].values)
    assert not kept


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("bundle")
    cg.compile(load_digits_model(), fora(STEPS, 3), backend="eager", out=folder / "d.cgraph")
    arguments = ["export", str(folder / "d.cgraph"), "--to", "onnx", "-o", str(folder / "onnx")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "onnx: 4 graphs, " in result.output
    assert "OpenVINO computes in bf16 by default" in result.output
    assert "INFERENCE_PRECISION_HINT to f32" in (folder / "onnx" / "README.md").read_text()
    return folder


@pytest.mark.onnx
def test_a_sampler_without_torch_draws_the_same_digits(digits: Path, tmp_path: Path) -> None:
    noise = torch.randn((2, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(0))
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported')\n")
    numpy.save(tmp_path / "noise.npy", noise.numpy())
    command = [sys.executable, str(SAMPLER), str(digits / "onnx"), str(tmp_path / "out.npy")]
    command += ["--labels", ",".join(map(str, LABELS)), "--noise", str(tmp_path / "noise.npy")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", "import torch"], env=env, check=False).returncode
    subprocess.run(command, env=env, check=True)
    found = torch.from_numpy(numpy.load(tmp_path / "out.npy"))
    wanted = sample_digits(cg.load(digits / "d.cgraph"), LABELS, steps=STEPS, seed=0)
    assert (found - wanted).abs().max() < 1e-4
    assert len(SAMPLER.read_text().splitlines()) <= 60


@pytest.mark.onnx
def test_the_folder_is_complete_and_valid(digits: Path) -> None:
    onnx: Any = pytest.importorskip("onnx")
    folder = digits / "onnx"
    loop = json.loads((folder / LOOP).read_text())
    files = {graph["file"] for graph in loop["graphs"].values()}
    assert {p.name for p in folder.iterdir()} == {*files, LOOP, "README.md", loop["weights"]}
    for file in files:
        onnx.checker.check_model(folder / file, full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(folder / file), strict_mode=True)
    weights = (folder / loop["weights"]).stat().st_size
    assert sum(p.stat().st_size for p in folder.iterdir()) <= weights + 10_000_000 * len(files)
    readme = (folder / "README.md").read_text()
    assert "| 0 | variant0.onnx | none | none | 24 outputs |" in readme
    assert "| write_blocks_11_mlp_0 | f32[batch, 64, 128] |" in readme
    assert all(f"## {file}" in readme for file in files)


def inspected(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.onnx
def test_inspect_shows_files(digits: Path, tmp_path: Path) -> None:
    folder = digits / "onnx"
    said = inspected(folder)
    assert "file inputs outputs nodes size weights elsewhere variant0-prologue.onnx 3 " in said
    assert all(path.name in said for path in folder.glob("*.onnx"))
    said = inspected(folder / "variant0.onnx")
    onnx: Any = pytest.importorskip("onnx")
    nodes = onnx.load(folder / "variant0.onnx", load_external_data=False).graph.node
    gelus = [node for node in nodes if node.op_type == "Gelu"]
    assert "input x float [batch, " in said
    assert "output write_blocks_11_mlp_0 float [batch, 64, 128]" in said
    assert f"Gelu {len(gelus)}" in said
    (tmp_path / "no.onnx").write_text("text")
    for place, options, message in (
        (tmp_path / "no.onnx", (), "no.onnx: the ONNX file cannot be read"),
        (tmp_path / "gone.onnx", (), "gone.onnx: the ONNX file cannot be read; found [Errno 2]"),
        (folder, ("--sites",), "ONNX files take no options"),
        (folder, ("--schedule", "fora-n3"), "ONNX files take no options"),
    ):
        result = CliRunner().invoke(app, ["inspect", str(place), *options])
        assert result.exit_code == 2
        assert message in result.output


@pytest.mark.onnx
def test_files_need_the_weights_beside_them(digits: Path, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    (tmp_path / "v.onnx").write_bytes((digits / "onnx/variant0.onnx").read_bytes())
    with pytest.raises(Exception, match=r"weights\.safetensors"):
        onnxruntime.InferenceSession(tmp_path / "v.onnx")


def test_another_folder_is_not_replaced(made: cg.Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ArtifactError, match="the output exists and is no exported loop"):
        export_onnx(made, tmp_path / "mine", lambda _: None)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "x.cgraph", "--to", "onxx", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "--to: unknown format 'onxx'; expected onnx; did you mean 'onnx'?" in result.output
