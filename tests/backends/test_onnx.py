"""The onnx backend: files, names, weights, sizes that vary, and what is refused."""

from __future__ import annotations

import gc
import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.backends.named import NamedGraph, named_graphs
from cachegraph.errors import BackendError
from cachegraph.graph.interface import Interface, Port, Role
from cachegraph.graph.weights import stored_weight
from cachegraph.oracle.trial import warm_up
from cachegraph.spec import TensorSpec
from tests.artifact.test_artifact import Custom
from tests.models import (
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    relative_error,
    shared_dit,
    tiny_dit,
)

pytestmark = pytest.mark.onnx
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

STEPS = 7  # of the schedule


@pytest.fixture
def folder(toca_onnx: Path) -> Path:
    return toca_onnx


@pytest.fixture(scope="module")
def artifact(toca_onnx: Path) -> cg.Artifact:
    return load_artifact(toca_onnx)


@pytest.fixture(scope="module")
def runner(artifact: cg.Artifact) -> cg.Runner:
    return artifact.runner()


def models(folder: Path) -> dict[str, Any]:
    return {p.stem: onnx.load(p, load_external_data=False) for p in folder.rglob("*.onnx")}


# --- what it computes


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_it_computes_what_eager_does(artifact: cg.Artifact, runner: cg.Runner, batch: int) -> None:
    eager = artifact.runner(backend="eager")
    for call in dit_steps(STEPS, batch=batch):
        assert relative_error(runner(*call), eager(*call)) < 1e-5


def test_one_file_serves_three_counts_of_tokens(artifact: cg.Artifact) -> None:
    graphs = named_graphs(artifact.program, artifact.graphs)
    counts = [k for graph in graphs.values() for k in graph.sizes.values()]
    assert max(map(len, counts)) >= 3


def test_what_is_kept_is_not_written_over(artifact: cg.Artifact) -> None:
    """Two trajectories over the same sessions do not see each other."""
    run = artifact.runner()
    first, second = run.session(), run.session()
    calls = dit_steps(STEPS), dit_steps(STEPS, seed=1)
    mixed = [(first(*a), second(*b)) for a, b in zip(*calls, strict=True)]
    alone = [[one(*call) for call in each] for each in calls for one in (run.session(),)]
    for found, *wanted in zip(mixed, *alone, strict=True):
        assert all(map(torch.equal, found, wanted))


def halved(dtype: torch.dtype, folder: Path) -> tuple[cg.Artifact, list[Any]]:
    """An artifact of eager, read from a folder: its graphs share a module with all weights."""
    calls = [(x.to(dtype), t, y) for x, t, y in dit_steps(4)]
    model = tiny_dit(depth=1).to(dtype)
    cg.compile(model, fora(4, 3), calls[0], backend="eager", out=folder / "half.cgraph")
    return load_artifact(folder / "half.cgraph"), calls


def test_float16(tmp_path: Path) -> None:
    artifact, calls = halved(torch.float16, tmp_path)
    run, eager = artifact.runner(backend="onnx"), artifact.runner()
    for call in calls:
        found = run(*call)
        assert found.dtype == torch.float16
        assert relative_error(found, eager(*call)) < 5e-3


def test_bfloat16_is_converted_but_not_run_on_the_cpu(tmp_path: Path) -> None:
    """onnxruntime has no such convolution there."""
    artifact, _ = halved(torch.bfloat16, tmp_path)
    with pytest.raises(
        BackendError, match=r"cannot run the graph.*Conv.*cast the model to float32"
    ):
        artifact.runner(backend="onnx")
    for model in models(artifact.compiled["onnx"]).values():
        assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


class Halves(nn.Module):
    """Translations of our own: an attention with a mask, a roll by half of the batch, a sort."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        attended = F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.3)
        rolled = torch.roll(attended, (attended.shape[0] // 2, -1), (0, -2))
        return rolled, torch.sort(x.round(), dim=-1, descending=True, stable=True)[1]


def ports(specs: Mapping[str, TensorSpec]) -> tuple[Port, ...]:
    return tuple(Port(name, spec, Role.MODEL) for name, spec in specs.items())


@pytest.mark.parametrize("floating", [False, True])
def test_translations_of_our_own(floating: bool) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    from cachegraph.backends.onnx.convert import to_onnx

    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, 8)
    mask = torch.randn(5, 5) if floating else torch.ones(5, 5, dtype=torch.bool).tril()
    shapes = ({0: torch.export.Dim.DYNAMIC}, {})
    program = torch.export.export(Halves(), (x, mask), dynamic_shapes=shapes)
    module = program.module(check_guards=False)
    specs = TensorSpec(("batch", 2, 5, 8), torch.float32), TensorSpec.of(mask)
    order = TensorSpec(("batch", 2, 5, 8), torch.int64)
    inputs = dict(zip(("x", "m"), specs, strict=True))
    interface = Interface(ports(inputs), ports({"a": specs[0], "i": order}))
    named = NamedGraph(module, interface, {"batch": (4,)})
    module.register_buffer("spare", torch.zeros(3))
    model = to_onnx("halves", named, {"spare": torch.zeros(3)})
    assert "spare" not in {tensor.name for tensor in model.graph.initializer}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (2, 4, 6):
        x = torch.randn(batch, 2, 5, 8)
        found = session.run(None, {"x": x.numpy(), "m": mask.numpy()})
        for one, wanted in zip(found, Halves()(x, mask), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), wanted, rtol=1e-5, atol=1e-6)


def test_every_graph_can_be_tried_once(artifact: cg.Artifact) -> None:
    """As compile does for inductor; counts of tokens are sizes too."""
    told: list[str] = []
    warm_up(artifact, lambda what, done, of: told.append(what))
    assert told == [f"compiling {layout.name}" for layout in artifact.program.variants]


# --- the files


def test_files_say_names_and_sizes(folder: Path, artifact: cg.Artifact) -> None:
    graphs, found = named_graphs(artifact.program, artifact.graphs), models(folder)
    assert list(graphs) == sorted(found)
    for name, graph in graphs.items():
        for values, specs in (
            (found[name].graph.input, graph.inputs),
            (found[name].graph.output, graph.outputs),
        ):
            assert [v.name for v in values] == list(specs)
            for value, spec in zip(values, specs.values(), strict=True):
                dims = value.type.tensor_type.shape.dim
                assert tuple(d.dim_param or d.dim_value for d in dims) == spec.shape
    inputs = {key: spec for graph in graphs.values() for key, spec in graph.inputs.items()}
    assert str(inputs["x"]) == "f32[batch, 4, 8, 8]"
    assert str(inputs["tokens0"]) == "i64[k_tokens0]"
    assert {k for k in inputs if k.startswith("slot_")} >= {"slot_blocks_0_attn_0"}


def test_weights_are_stored_once(folder: Path) -> None:
    weights = (folder / "weights.safetensors").stat().st_size
    for path, model in zip(sorted(folder.rglob("*.onnx")), models(folder).values(), strict=True):
        assert path.stat().st_size < 100_000
        held = [t for t in model.graph.initializer if not t.external_data]
        assert sum(len(t.SerializeToString()) for t in held) < weights / 20
    everything = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert everything <= weights + len(models(folder)) * 10_000_000


def test_weights_lie_where_the_files_say(folder: Path, artifact: cg.Artifact) -> None:
    content = (folder / "weights.safetensors").read_bytes()
    seen = set()
    for model in models(folder).values():
        for tensor in model.graph.initializer:
            place = {e.key: e.value for e in tensor.external_data}
            if not place:
                continue
            start, length = int(place["offset"]), int(place["length"])
            stored = torch.frombuffer(bytearray(content[start : start + length]), dtype=torch.float)
            assert place["location"] == "weights.safetensors"
            assert torch.equal(stored, stored_weight(artifact.weights, tensor.name).flatten())
            seen.add(tensor.name)
    nodes = [n for g in artifact.graphs for n in g.graph.find_nodes(op="get_attr")]
    assert seen == {str(node.target) for node in nodes}


def test_sessions_read_the_weights_where_they_lie(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that copied them would take the memory of a model for each graph."""
    monkeypatch.setattr("cachegraph.graph.weights._SAMPLED", 0)  # else changed weights are refused
    artifact = load_artifact(folder)
    run, calls = artifact.runner(), dit_steps(2)
    before = [run(*call) for call in calls]
    for weight in artifact.weights.values():
        weight.data.mul_(1.5)  # behind torch's back
    run.reset()
    eager = artifact.runner(backend="eager")
    for call, old in zip(calls, before, strict=True):
        found = run(*call)
        assert relative_error(found, eager(*call)) < 1e-5 < relative_error(found, old)


class Timed(nn.Module):
    def forward(self, t: Tensor, noise: Tensor) -> Tensor:
        return torch.sin(t[:, None] * torch.exp(-torch.arange(64) / 7) + noise)


def test_torch_computes_constants() -> None:
    """The last digit of a frequency counts a thousandfold."""
    from cachegraph.backends.onnx.convert import to_onnx

    t, noise = torch.tensor([999.0, 1.0]), torch.zeros(64)
    program = torch.export.export(Timed(), (t, noise))
    inputs = {"t": TensorSpec.of(t), "noise": TensorSpec.of(noise)}
    out = {"out": TensorSpec((2, 64), torch.float32)}
    interface = Interface(ports(inputs), ports(out))
    model = to_onnx("t", NamedGraph(program.module(check_guards=False), interface, {}), {})
    assert not {"Exp", "Range", "Div", "Neg"} & {node.op_type for node in model.graph.node}
    held = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer]
    wanted = torch.exp(-torch.arange(64) / 7).numpy()
    assert [one.shape == (64,) and (one == wanted).all() for one in held].count(True) == 1


def test_a_saved_artifact_is_not_converted_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachegraph.backends.onnx.convert.to_onnx", None)
    assert len([cg.load(folder)(*call) for call in dit_steps(STEPS)]) == STEPS


def test_without_a_folder_the_files_live_as_long_as_the_artifact() -> None:
    made = compile_traced(*shared_dit(depth=1), fora(4, 3), backend="onnx")
    place = made.compiled["onnx"]
    assert sorted(models(place)) == ["variant0", "variant1"]
    run = made.runner()
    del made
    gc.collect()
    assert not place.exists()
    assert [run(*call).shape for call in dit_steps(4)] == [(2, 8, 8, 8)] * 4


def test_a_copy_keeps_the_files(folder: Path, artifact: cg.Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "copy")
    for path in (folder / "compiled/onnx").iterdir():
        assert (tmp_path / "copy/compiled/onnx" / path.name).read_bytes() == path.read_bytes()


# --- what is refused


@pytest.fixture
def graph(artifact: cg.Artifact) -> NamedGraph:
    return list(named_graphs(artifact.program, artifact.graphs).values())[-1]


def converted(graph: NamedGraph, weights: Mapping[str, Tensor], edit: Any) -> None:
    from cachegraph.backends.onnx import convert as onnx_graph

    def edited(*args: Any) -> Any:
        model = translate(*args)
        edit(model.graph)
        return model

    translate = onnx_graph._translate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "_translate", edited)
        onnx_graph.to_onnx("variant9", graph, weights)


def test_a_lost_write_is_an_error(artifact: cg.Artifact) -> None:
    graphs = named_graphs(artifact.program, artifact.graphs)
    graph = next(g for g in graphs.values() if len(g.outputs) > 1)
    with pytest.raises(BackendError, match=r"variant9: the outputs of the graph did not survive"):
        converted(graph, artifact.weights, lambda made: made.outputs.pop())
    with pytest.raises(BackendError, match=r"expected this order"):
        converted(graph, artifact.weights, lambda made: made.outputs.reverse())


def test_a_fixed_size_is_an_error(graph: NamedGraph, artifact: cg.Artifact) -> None:
    def fix(made: Any) -> None:
        made.inputs[0].shape = type(made.inputs[0].shape)((2, 4, 8, 8))

    with pytest.raises(BackendError, match=r"expected x: f32\[\?, 4, 8, 8\]; found x: f32\[2, 4"):
        converted(graph, artifact.weights, fix)


def test_an_operation_without_translation_is_named() -> None:
    with pytest.raises(BackendError, match=r"no ONNX translation of elsewhere.thrice"):
        cg.compile(Custom().eval(), fora(2, 2), backend="onnx")


def test_a_failed_translation_names_the_graph(graph: NamedGraph, artifact: cg.Artifact) -> None:
    def fail(made: Any) -> None:
        raise ValueError("no such luck\nand more")

    with pytest.raises(BackendError, match=r"^variant9: .*; found ValueError: no such luck$"):
        converted(graph, artifact.weights, fail)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name)
    )
    return None


@pytest.mark.usefixtures("nothing_installed")
def test_missing_packages_are_named(folder: Path) -> None:
    message = r"found no onnx, onnxscript, onnxruntime; pip install 'cachegraph\[onnx\]'"
    with pytest.raises(BackendError, match=message):
        cg.load(folder)
    from cachegraph.backends.onnx.backend import Onnx

    with pytest.raises(BackendError, match=message):
        Onnx().check(fx.Graph())


def test_a_device_that_this_onnxruntime_does_not_know() -> None:
    from cachegraph.backends.onnx.backend import _provider

    available = ["CPUExecutionProvider"]
    assert _provider(available, torch.device("cpu")) == "CPUExecutionProvider"
    with pytest.raises(BackendError, match=r"cannot run on cuda:1; .* pip install onnxruntime-gpu"):
        _provider(available, torch.device("cuda:1"))


def test_a_file_that_is_gone_or_of_another_graph(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    artifact, place = load_artifact(copied), copied / "compiled/onnx"
    (place / "variant0.onnx").replace(place / "variant1.onnx")
    with pytest.raises(BackendError, match=r"variant0.onnx: the ONNX file is missing; compile"):
        artifact.runner()
    shutil.copy(place / "variant1.onnx", place / "variant0.onnx")
    with pytest.raises(BackendError, match=r"variant1.onnx: .* other inputs and outputs"):
        artifact.runner()


def test_bools_are_shared_as_they_are() -> None:
    """A mask that is known beforehand is an input; onnxruntime takes no bools of torch."""
    from cachegraph.backends.onnx.backend import _place_of

    mask = torch.tensor([[True, False, True]])
    assert _place_of(mask) == ("cpu", 0, np.bool_, [1, 3], mask.data_ptr())  # nothing is copied
    numbers = torch.zeros(2)
    assert _place_of(numbers) == ("cpu", 0, np.float32, [2], numbers.data_ptr())
