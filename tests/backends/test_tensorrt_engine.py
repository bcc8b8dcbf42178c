"""The calls of TensorRT, made to a stand-in that is as strict as its documentation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.backends.named import NamedGraph, named_graphs
from cachegraph.backends.tensorrt.backend import TensorRT
from cachegraph.errors import BackendError
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.runner import Runner
from tests.models import (
    dit_steps,
    one_thread,  # noqa: F401
    relative_error,
)

pytestmark = pytest.mark.onnx
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def artifact(toca_onnx: Path) -> cg.Artifact:
    return load_artifact(toca_onnx)


@pytest.fixture(scope="module")
def graphs(artifact: cg.Artifact) -> dict[str, NamedGraph]:
    return named_graphs(artifact.program, artifact.graphs)


@pytest.fixture(scope="module")
def fake(toca_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The stand-in in place of tensorrt, on a machine that seems to have a GPU."""
    from cachegraph.backends.onnx import convert as onnx_graph
    from tests import fake_tensorrt

    def converted(name: str, *_: Any) -> Any:  # converting takes long, and was done before
        return onnx.load(toca_onnx / f"compiled/onnx/{name}.onnx", load_external_data=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt)
        patch.setitem(sys.modules, "cachegraph.backends.tensorrt.engine", None)
        patch.delitem(sys.modules, "cachegraph.backends.tensorrt.engine")
        patch.setattr("cachegraph.backends.tensorrt.backend.require", lambda *_: None)
        patch.setattr(onnx_graph, "to_onnx", converted)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        patch.setenv("CACHEGRAPH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield fake_tensorrt
        sys.modules.pop("cachegraph.backends.tensorrt.engine", None)


@pytest.fixture(scope="module")
def folder(
    fake: Any,
    artifact: cg.Artifact,
    graphs: dict[str, NamedGraph],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What the backend emits."""
    target = tmp_path_factory.mktemp("engines")
    told: list[str] = []
    TensorRT().emit(graphs, artifact.weights, target, told.append)
    assert "building variant0: Tactics, 1 of 1" in told
    return target


def opened(folder: Path, artifact: cg.Artifact, graph: NamedGraph, name: str) -> Any:
    from cachegraph.backends.tensorrt.engine import open_engine

    files = folder / f"{name}.engine", folder / f"{name}.onnx"
    return open_engine(*files, graph, artifact.weights, torch.device("cpu"))


def test_engines_compute_what_eager_does(
    folder: Path, artifact: cg.Artifact, graphs: dict[str, NamedGraph]
) -> None:
    functions = [opened(folder, artifact, graph, name) for name, graph in graphs.items()]
    before = Prologues.of(artifact.program, artifact.prologues, batched=False)
    run = Runner(artifact.program, functions, artifact.weights, prologues=before)
    eager = artifact.runner(backend="eager")
    for batch in (1, 2, 8):
        for call in dit_steps(7, batch=batch):
            assert relative_error(run(*call), eager(*call)) < 1e-5
    with pytest.raises(BackendError, match=r"variant0.engine: the engine cannot run .*'batch': 9"):
        run(*dit_steps(1, batch=9)[0])


def test_engines_hold_no_weights(folder: Path, artifact: cg.Artifact) -> None:
    weights = sum(tensor.nbytes for tensor in artifact.weights.values())
    assert all(path.stat().st_size < weights / 2 for path in folder.iterdir())
    assert {path.suffix for path in folder.iterdir()} == {".onnx", ".engine", ".json"}


def test_the_same_engine_is_built_once(
    fake: Any,
    folder: Path,
    artifact: cg.Artifact,
    graphs: dict[str, NamedGraph],
    tmp_path: Path,
) -> None:
    fake.parsed.clear()
    TensorRT().emit(graphs, artifact.weights, tmp_path, lambda _: None)
    assert not fake.parsed
    changed = {name: tensor + 1 for name, tensor in artifact.weights.items()}
    (tmp_path / "other").mkdir()
    TensorRT().emit(graphs, changed, tmp_path / "other", lambda _: None)
    assert len(fake.parsed) == len(graphs)


def test_the_record_says_which_machine(folder: Path, artifact: cg.Artifact) -> None:
    record = (folder / "engines.json").read_text()
    assert '"tensorrt": "10.15.1"' in record
    assert '"gpu": "NVIDIA H200 sm_90"' in record


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (
            "refused",
            r"variant0, node refused\w+, blocks.0.attn: .* found Softmax refused\w+: unsup",
        ),
        (
            "bad",
            r"variant0, node bad\w+, blocks.0.attn: TensorRT cannot build .* no implementation",
        ),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_refusal_names_node_and_module(
    folder: Path, artifact: cg.Artifact, tmp_path: Path, prefix: str, message: str
) -> None:
    from cachegraph.backends.tensorrt.engine import build_engine
    from cachegraph.graph.weights import WEIGHTS_FILE, save_weights

    graph = named_graphs(artifact.program, artifact.graphs)["variant0"]
    model = onnx.load(folder / "variant0.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.name = prefix + node.name
    (tmp_path / "variant0.onnx").write_bytes(model.SerializeToString())
    save_weights(artifact.weights, tmp_path / WEIGHTS_FILE)
    from cachegraph.backends.tensorrt.bindings import binding_plan

    with pytest.raises(BackendError, match=message):
        build_engine(
            tmp_path / "variant0.onnx", model, binding_plan(graph), tmp_path, lambda _: None
        )


@pytest.mark.usefixtures("fake")
def test_unusable_engines(
    folder: Path, artifact: cg.Artifact, graphs: dict[str, NamedGraph], tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second, *_ = graphs
    (tmp_path / f"{first}.engine").write_bytes((folder / f"{second}.engine").read_bytes())
    with pytest.raises(BackendError, match="other inputs and outputs than the graph"):
        opened(tmp_path, artifact, graphs[first], first)
    (tmp_path / f"{first}.engine").write_bytes(b"")
    with pytest.raises(BackendError, match="cannot read the engine; found no magic tag"):
        opened(tmp_path, artifact, graphs[first], first)
    lacking = {k: v for k, v in artifact.weights.items() if k != "pos_embed"}
    with pytest.raises(BackendError, match="asks for an unknown weight 'pos_embed'"):
        opened(folder, SimpleNamespace(weights=lacking), graphs[first], first)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["10.15.1", "11.4.0"])
def test_flags_are_called_by_name(
    version: str,
    fake: Any,
    artifact: cg.Artifact,
    graphs: dict[str, NamedGraph],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their numbers are others in 11; the stand-in refuses all but the right ones."""
    flags, creation = fake.FLAGS[version]
    monkeypatch.setattr(fake, "BuilderFlag", flags)
    monkeypatch.setattr(fake, "NetworkDefinitionCreationFlag", creation)
    monkeypatch.setattr(fake, "__version__", version)
    one = {"variant0": graphs["variant0"]}
    TensorRT().emit(one, artifact.weights, tmp_path, lambda _: None)
    assert (tmp_path / "variant0.engine").is_file()


def test_weights_that_the_parser_renamed(
    fake: Any,
    folder: Path,
    artifact: cg.Artifact,
    graphs: dict[str, NamedGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parser knows what it made of them, where TensorRT has a refitter of the parser's."""
    file = onnx.load(folder / "variant0.onnx", load_external_data=False)
    big = next(one.name for one in file.graph.initializer if one.external_data)
    monkeypatch.setattr(fake, "renamed", {big})
    functions = [opened(folder, artifact, graph, name) for name, graph in graphs.items()]
    before = Prologues.of(artifact.program, artifact.prologues, batched=False)
    run = Runner(artifact.program, functions, artifact.weights, prologues=before)
    call = dit_steps(1)[0]
    assert relative_error(run(*call), artifact.runner(backend="eager")(*call)) < 1e-5
    monkeypatch.delattr(fake, "OnnxParserRefitter")
    with pytest.raises(BackendError, match=f"asks for an unknown weight '{big} transposed'"):
        opened(folder, artifact, graphs["variant0"], "variant0")
