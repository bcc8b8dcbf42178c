"""The tensorrt backend as far as it goes without TensorRT: operators, bindings, refusals."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.backends import get_backend
from cachegraph.backends.named import NamedGraph, named_graphs
from cachegraph.backends.onnx import backend as onnx_backend
from cachegraph.backends.tensorrt import backend as tensorrt
from cachegraph.backends.tensorrt.backend import Machine, refuse_other_machine, refuse_unsupported
from cachegraph.backends.tensorrt.bindings import Binding, binding_plan
from cachegraph.errors import BackendError
from cachegraph.methods import METHODS
from cachegraph.methods.method import Method
from cachegraph.spec import TensorSpec
from tests.models import (
    compile_traced,
    dit_steps,
    example,
    fora,
    full,
    one_thread,  # noqa: F401
    shared_dit,
    tiny_dit,
)

pytestmark = pytest.mark.onnx
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


@pytest.fixture(scope="module")
def graphs(toca_onnx: Path) -> dict[str, NamedGraph]:
    artifact = load_artifact(toca_onnx)
    return named_graphs(artifact.program, artifact.graphs)


def model(toca_onnx: Path, name: str) -> Any:
    return onnx.load(toca_onnx / f"compiled/onnx/{name}.onnx", load_external_data=False)


# --- operators


def refused(body: str, inputs: str, outputs: str, opset: int = 20) -> list[str]:
    from cachegraph.backends.tensorrt.operators import refusals

    head = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs})'
    return [str(one) for one in refusals(onnx.parser.parse_model(f"{head} {{ {body} }}"))]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "reason"),
    [
        ("y = NonZero(x)", "float[2] x", "int64[1,n] y", "not in TensorRT's list of operators"),
        ("y = Add(x, x)", "double[2] x", "double[2] y", "works on double"),
        ("y = Sin(x)", "float[2] x", "float[2] y", ""),
        ("y = Where(c, x, x)", "bool[2] c, float[2] x", "float[2] y", ""),
        ("y = Where(c, x, x)", "bool[2] c, uint8[2] x", "uint8[2] y", "works on uint8"),
        ("y = Cast <to = 11> (x)", "float[2] x", "double[2] y", "casts to double"),
        (
            "k = Constant <value_ints = [4096]> () y, i = TopK(x, k)",
            "float[2,5000] x",
            "float[2,4096] y, int64[2,4096] i",
            "K is 4096, at most 3839",
        ),
        (
            "y, i = TopK(x, k)",
            "float[2,9] x, int64[1] k",
            "float[2,n] y, int64[2,n] i",
            "K is not known when the engine is built",
        ),
        (
            "k = Constant <value_ints = [3]> () y, i = TopK <sorted = 0> (x, k)",
            "float[2,9] x",
            "float[2,3] y, int64[2,3] i",
            "sorted must be 1",
        ),
        (
            "y = ReduceSum(x, a)",
            "float[2,9] x, int64[1] a",
            "float[n,m] y",
            "input 1 (a) must be a constant",
        ),
        (
            'y = ScatterND <reduction = "add"> (x, i, u)',
            "float[4] x, int64[1,1] i, float[1] u",
            "float[4] y",
            "a reduction other than none",
        ),
        (
            "y, m = LayerNormalization(x, s)",
            "float[2,4] x, float[4] s",
            "float[2,4] y, float[2,1] m",
            "only the first output is supported",
        ),
        (
            "y = Neg(x)",
            "float[1,1,1,1,1,1,1,1,1] x",
            "float[1,1,1,1,1,1,1,1,1] y",
            "x has 9 dimensions, at most 8",
        ),
    ],
)
def test_restrictions(body: str, inputs: str, outputs: str, reason: str) -> None:
    # The parser of onnx's text form wants constants as attributes of tensors.
    body = re.sub(r"<value_ints = \[(\d+)\]>", r"<value = int64[1] {\1}>", body)
    found = refused(body, inputs, outputs)
    assert [one.rpartition("): ")[2] for one in found[:1]] == ([reason] if reason else [])


def test_another_opset_is_refused() -> None:
    assert refused("y = Sin(x)", "float[2] x", "float[2] y", opset=25) == [
        "import (node ): opset 25"
    ]


def test_token_selection_passes(toca_onnx: Path, graphs: dict[str, NamedGraph]) -> None:
    models = {name: model(toca_onnx, name) for name in graphs}
    refuse_unsupported(models)
    used = {node.op_type for one in models.values() for node in one.graph.node}
    assert {"TopK", "GatherElements", "ScatterElements"} <= used


def test_a_refusal_names_graph_node_and_module(toca_onnx: Path) -> None:
    edited = model(toca_onnx, "variant0")
    [gelu] = [node for node in edited.graph.node if node.op_type == "Gelu"]
    gelu.op_type = "Shrink"
    with pytest.raises(
        BackendError,
        match=r"found variant0: Shrink \(node node_gelu\w*, blocks\.0\.mlp\w*.*\): not",
    ):
        refuse_unsupported({"variant0": edited})


GOC = full(4) | {
    "policy": {"method": "table", "reuse_steps": [1, 3]},
    "correction": {"method": "goc", "weight": 1.2, "steps": [3]},
}


def operators_of(schedule: Any) -> dict[str, Any]:
    """The ONNX models of a schedule on a DiT of one block."""
    artifact = compile_traced(*shared_dit(depth=1), schedule)
    artifact.compile_ahead("onnx")
    folder = artifact.compiled["onnx"]
    return {p.stem: onnx.load(p, load_external_data=False) for p in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, None], ids=lambda m: m.name() if m else "goc")
def test_every_method_passes_as_the_page_says(method: type[Method] | None, tmp_path: Path) -> None:
    refuse_unsupported(operators_of(GOC if method is None else example(method, tmp_path, 1)))
    assert "Every method passes that check." in PAGE.read_text()


# --- bindings


def test_the_plan_is_what_the_files_say(toca_onnx: Path, graphs: dict[str, NamedGraph]) -> None:
    for name, graph in graphs.items():
        plan = binding_plan(graph)
        said = model(toca_onnx, name).graph
        for output, values in ((False, said.input), (True, said.output)):
            bindings = [binding for binding in plan if binding.output is output]
            assert [b.name for b in bindings] == [value.name for value in values]
            for binding, value in zip(bindings, values, strict=True):
                spec = TensorSpec.parse(binding.spec)
                tensor = value.type.tensor_type
                assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == (
                    torch.empty(0, dtype=spec.dtype).numpy().dtype
                )
                dims = [-1 if d.dim_param else d.dim_value for d in tensor.shape.dim]
                assert list(spec.shape) == dims
                for size, *profile in zip(
                    dims, binding.smallest, binding.usual, binding.largest, strict=True
                ):
                    assert sorted(profile) == profile
                    assert size == -1 or set(profile) == {size}


def test_profiles_cover_the_steps(graphs: dict[str, NamedGraph]) -> None:
    graph = next(g for g in graphs.values() if len(g.sizes.get("k_tokens0", ())) >= 3)
    plan = {binding.name: binding for binding in binding_plan(graph)}
    assert plan["x"] == Binding(
        "x", "f32[-1, 4, 8, 8]", False, (1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8)
    )
    tokens = plan["tokens0"]
    assert (tokens.smallest[0], tokens.largest[0]) == (
        min(graph.sizes["k_tokens0"]),
        max(graph.sizes["k_tokens0"]),
    )
    assert tokens.smallest[0] < tokens.largest[0]


# --- what is missing


def test_tensorrt_is_imported_only_when_asked_for() -> None:
    assert get_backend("tensorrt").name == "tensorrt"
    assert "tensorrt" not in sys.modules


def find(monkeypatch: pytest.MonkeyPatch, *, missing: str = "") -> None:
    def spec(name: str) -> object:
        return None if name == missing else object()

    monkeypatch.setattr(onnx_backend.importlib.util, "find_spec", spec)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, missing="tensorrt")
    with pytest.raises(BackendError, match=r"no tensorrt; pip install 'cachegraph\[tensorrt\]'"):
        tensorrt.this_machine()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"needs a GPU .* found torch .* without a CUDA device"):
        tensorrt.this_machine()


HERE = Machine("10.15.1", "NVIDIA H200 sm_90")


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (
            Machine("10.3.0", HERE.gpu),
            "another version of TensorRT; expected 10.15.1; found 10.3.0",
        ),
        (
            Machine(HERE.tensorrt, "NVIDIA L4 sm_89"),
            "another GPU; expected NVIDIA H200 sm_90; found",
        ),
    ],
)
def test_an_engine_from_elsewhere(built: Machine, message: str) -> None:
    refuse_other_machine(HERE, HERE)
    with pytest.raises(BackendError, match=message):
        refuse_other_machine(built, HERE)


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "this_machine", lambda: HERE)
    backend = tensorrt.TensorRT()
    with pytest.raises(
        BackendError, match=r"TensorRT runs on a GPU only; found cpu; load it there"
    ):
        backend.open({}, {}, tmp_path, torch.device("cpu"))


# --- the command for a machine that has TensorRT


def load_tool() -> Any:
    """The command as a module, for tools is no package."""
    place = Path(__file__).parents[2] / "tools/check_tensorrt.py"
    spec = importlib.util.spec_from_file_location("check_tensorrt", place)
    assert spec is not None
    assert spec.loader is not None
    tool: Any = importlib.util.module_from_spec(spec)
    sys.modules["check_tensorrt"] = tool  # dataclasses look there for their module
    spec.loader.exec_module(tool)
    return tool


def test_the_check_tells_agreement_from_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, calls = tiny_dit(depth=1, num_heads=4), dit_steps(4)
    run = cg.load(cg.compile(small, fora(4, 3), calls[0], backend="eager"))
    recording = {
        "x": torch.stack([x for x, _, _ in calls]),
        "t": torch.stack([t for _, t, _ in calls]),
        "y": calls[0][2],
        "out": torch.stack([run(*call) for call in calls]),
    }
    save_file(small.state_dict(), tmp_path / "dit_tiny.safetensors")
    save_file(recording, tmp_path / "right.safetensors")
    save_file(recording | {"out": recording["out"] * 1.01}, tmp_path / "wrong.safetensors")
    tool = load_tool()
    schedule = tool.Case("DiT", fora(4, 3))
    monkeypatch.setattr(tool, "cases", lambda _: {"right": schedule, "wrong": schedule})
    options = ["--recordings", str(tmp_path), "--backend", "eager", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["check_tensorrt.py", *options])
    assert tool.main() == 1
    *_, right, wrong = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| right \| 2 \| .* \| 0.0e\+00 \| ok \|", right)
    assert re.fullmatch(r"\| wrong \| 2 \| .* \| 9.9e-03 \| above 0.0001 \|", wrong)


RECORDINGS = list(load_tool().cases(Path("golden")))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_through_onnxruntime(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = ["--recordings", str(shared / "golden"), "--backend", "onnx", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["check_tensorrt.py", *options, "--only", name])
    assert load_tool().main() == 0


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_through_tensorrt(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = ["--recordings", str(shared / "golden"), "--only", name]
    monkeypatch.setattr(sys, "argv", ["check_tensorrt.py", *options])
    assert load_tool().main() == 0
