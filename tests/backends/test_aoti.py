"""The ahead-of-time backend: one small model, compiled once for all tests of this file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cachegraph as cg
from cachegraph.artifact import artifact
from cachegraph.artifact import load as loading
from cachegraph.artifact.load import load_artifact
from cachegraph.backends.aoti import backend as aoti
from cachegraph.backends.aoti import worker as aoti_worker
from cachegraph.backends.export import export_graph
from cachegraph.errors import ArtifactError, BackendError
from cachegraph.graph.serialise import graph_from_json
from cachegraph.model.trace import TracedModel, trace
from cachegraph.spec import TensorSpec
from cachegraph.zoo import DiT
from tests.models import (
    compile_traced,
    dit_steps,
    fora,
    one_thread,  # noqa: F401
    play,
    relative_error,
    signed,
    tiny_dit,
)

ROOT = Path(__file__).parents[2]
STEPS = 6
SCHEDULE = fora(STEPS, 3)
TIMES = [90 - 10 * step for step in range(9)]


def narrow_dit() -> DiT:
    """Its last layer has 4 columns: inductor writes so small a bias into the code."""
    return tiny_dit(depth=1, patch_size=1, learn_sigma=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The compile cache, empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEGRAPH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return trace(narrow_dit(), dit_steps(1)[0])


@pytest.fixture(scope="module")
def original(traced: TracedModel, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that takes its time."""
    out = tmp_path_factory.mktemp("saved") / "dit.cgraph"
    compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti", out=out)
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "dit.cgraph"))


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("batch", [2, 5, 1])
def test_equal_to_eager(original: Path, batch: int) -> None:
    run, eager = cg.load(original), cg.load(original, backend="eager")
    for seed in (1, 2):  # the second time all timesteps are known
        calls = dit_steps(STEPS, batch=batch, seed=seed)
        assert worst(play(run, calls), play(eager, calls)) <= 1e-5


def test_inputs_may_lie_in_memory_as_they_like(original: Path) -> None:
    run, eager = cg.load(original), cg.load(original, backend="eager")
    calls = dit_steps(STEPS)
    strided = [(x.to(memory_format=torch.channels_last), t[:1].expand(2), y) for x, t, y in calls]
    assert not strided[0][0].is_contiguous()
    assert worst(play(run, strided), play(eager, calls)) <= 1e-5


IN_A_NEW_PROCESS = """
import os, subprocess, sys
sys.modules["cachegraph.zoo"] = None  # importing it is an error now
import cachegraph
subprocess.Popen = lambda *_, **__: os._exit(3)
from safetensors.torch import load_file, save_file
run = cachegraph.load(sys.argv[1])
calls = load_file(sys.argv[2])
steps = range(len(calls) // 3)
found = [run(*(calls[f"{n}{s}"] for n in "xty")).contiguous() for s in steps]
save_file({f"{s}": tensor for s, tensor in enumerate(found)}, sys.argv[3])
"""


def test_it_runs_where_nothing_can_be_compiled(original: Path, tmp_path: Path) -> None:
    calls = dit_steps(STEPS)
    given = {f"{n}{s}": v for s, c in enumerate(calls) for n, v in zip("xty", c, strict=True)}
    save_file({name: tensor.clone() for name, tensor in given.items()}, tmp_path / "calls")
    (tmp_path / "empty").mkdir()
    nowhere = dict.fromkeys(["CACHEGRAPH_CACHE", "TORCHINDUCTOR_CACHE_DIR", "PATH"], "empty")
    env = os.environ | nowhere | {"CXX": "/bin/false", "PYTHONPATH": str(ROOT)}
    arguments = [original, tmp_path / "calls", tmp_path / "results"]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, arguments)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    assert not list((tmp_path / "empty").iterdir())
    found = load_file(tmp_path / "results")
    wanted = play(cg.load(original, backend="eager"), calls)
    assert worst([found[f"{s}"] for s in range(STEPS)], wanted) <= 1e-5


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULE, fora(STEPS, 2), fora(9, 4, timesteps=TIMES)],
    ids=["nothing", "interval", "steps"],
)
def test_what_differs_in_numbers_only_is_not_compiled_again(
    original: Path, traced: TracedModel, cache: Path, schedule: dict[str, object]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    said: list[str] = []
    artifact = compile_traced(narrow_dit(), traced, schedule, backend="aoti", progress=said.append)
    assert "compiling ahead of time: all is in the cache" in said
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    # a folder with a file for each variant, and what each holds
    assert sorted(path.suffix for path in before) == ["", ".pt2", ".pt2", ".sha256", ".sha256"]
    steps = len(artifact.program.steps)
    calls = [
        (x, torch.full_like(t, 90 - 10 * i), y) for i, (x, t, y) in enumerate(dit_steps(steps))
    ]
    wanted = play(artifact.runner(backend="eager"), calls)
    assert worst(play(artifact.runner(), calls), wanted) <= 1e-5


def test_settings_of_the_compiler_are_part_of_what_is_compiled(
    traced: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[set[str]] = []
    monkeypatch.setattr(aoti, "_compile", lambda todo, *_: jobs.append(set(todo.values())))
    monkeypatch.setattr(aoti, "_cached", Path)
    monkeypatch.setattr(aoti, "is_as_recorded", lambda _: False)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: None)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_MAX_AUTOTUNE", "CXX"):
        monkeypatch.setenv(name, "1")
        compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti")
    where, tuned, compiler = jobs
    assert not where & tuned
    assert not tuned & compiler
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti")
    assert jobs[-1] == compiler


def test_weights_are_not_copied(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the artifact's weights is seen by every runner."""
    monkeypatch.setattr("cachegraph.graph.weights._SAMPLED", 0)  # else changed weights are refused
    artifact, calls = load_artifact(original), dit_steps(STEPS)
    runners = [artifact.runner(), artifact.runner()]
    before = [play(run, calls) for run in runners]
    with torch.no_grad():
        for name, weight in artifact.weights.items():
            if name.startswith("blocks"):
                weight.data.mul_(1.5)  # behind torch's back
    wanted = play(artifact.runner(backend="eager"), calls)
    for run, old in zip(runners, before, strict=True):
        assert worst(play(run, calls), wanted) <= 1e-5
        assert worst(old, wanted) > 0.01
    assert worst(play(cg.load(original), calls), before[0]) == 0  # the file is as it was


def test_loading_reads_no_graph_that_it_does_not_run(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(nodes: list[dict[str, Any]], device: torch.device) -> torch.fx.Graph:
        read.append(len(nodes))
        return graph_from_json(nodes, device)

    monkeypatch.setattr(loading, "graph_from_json", counted)
    loaded = load_artifact(original)
    run = loaded.runner()
    assert len(read) == len(loaded.prologues) == 2
    assert len(run.functions) == len(loaded.graphs) == 2
    assert loaded.graphs[0] is loaded.graphs[0]
    assert list(loaded.graphs[:]) == list(loaded.graphs)
    assert len(read) == 4


def test_an_artifact_of_another_machine_is_refused(folder: Path) -> None:
    path = folder / "compiled/aoti/built_for.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "sm_90"}))
    signed(folder)
    with pytest.raises(BackendError) as caught:
        cg.load(folder)
    assert "the artifact was compiled for another machine; expected cpu sm_90, torch" in str(
        caught.value
    )
    assert "load it with backend='inductor'" in str(caught.value)
    assert cg.load(folder, backend="eager")(*dit_steps(1)[0]).shape == (2, 4, 8, 8)


def test_an_artifact_that_lacks_instructions_here_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "_instructions", lambda: ["avx", "amx_tile"])
    path = folder / "compiled/aoti/built_for.json"
    built = json.loads(path.read_text())
    path.write_text(json.dumps(built | {"instructions": ["avx"]}))
    signed(folder)
    cg.load(folder)  # more than was there is fine
    path.write_text(json.dumps(built | {"instructions": ["avx", "avx_next"]}))
    signed(folder)
    with pytest.raises(BackendError, match="without avx_next"):
        cg.load(folder)


def test_an_artifact_that_was_replaced_meanwhile_is_refused(original: Path, folder: Path) -> None:
    loaded = load_artifact(folder)
    loaded.runner()
    manifest = folder / "manifest.json"
    kept = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(kept) | {"digest": "another"}))
    for use in (loaded.runner, lambda: loaded.save(folder.with_name("copy"))):
        with pytest.raises(ArtifactError, match="another one was written to it since"):
            use()
    shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match="is gone"):
        cg.load(loaded)
    assert repr(load_artifact(original)) == "Artifact(fora, 6 steps, 2 variants, aoti, cpu)"


def test_a_damaged_file_of_the_cache_is_compiled_again(
    original: Path, traced: TracedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first, *_] = files = sorted((cache / "aoti").glob("*.pt2"))
    whole = first.read_bytes()
    try:
        for damaged in (whole[: len(whole) // 2], whole[:500] + b"?" + whole[501:], b""):
            first.write_bytes(damaged)
            todo: list[Path] = []

            def compile_again(jobs: dict[Path, str], *_: object, todo: list[Path] = todo) -> None:
                todo += jobs
                first.write_bytes(whole)

            monkeypatch.setattr(aoti, "_compile", compile_again)
            compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti")
            assert todo == [first]
    finally:
        first.write_bytes(whole)
    assert len(files) == 2
    with pytest.raises(BackendError, match=r"cannot be opened; .*compile it again"):
        aoti._function(original / "manifest.json", {})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_numbers_of_small_weights_reach_the_compiler(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape).to(dtype)
    text = json.dumps(aoti._numbers(weight))
    read = aoti_worker._tensor(json.loads(text), TensorSpec.of(weight))
    assert read.dtype == dtype
    assert torch.equal(read, weight)


def test_an_example_of_one_does_not_fix_the_batch(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(
        aoti, "_compile", lambda todo, *_: jobs.extend(map(json.loads, todo.values()))
    )
    monkeypatch.setattr(aoti, "_cached", Path)
    monkeypatch.setattr(aoti, "is_as_recorded", lambda _: False)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: None)
    cg.compile(narrow_dit(), SCHEDULE, dit_steps(1, batch=1)[0], backend="aoti")
    assert [job["sizes"] for job in jobs] == [{"batch": 2}] * 2


def test_a_size_that_torch_takes_for_a_constant_is_refused() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, torch.ones(2, 3))

    with pytest.raises(BackendError) as caught:
        export_graph(
            torch.fx.symbolic_trace(Fixed()), [TensorSpec(("batch",), torch.float32)], {"batch": 3}
        )
    assert (caught.value.expected, caught.value.found) == ("f32[batch]", "f32[3]")


def test_the_compiler_copies_no_weights(
    traced: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies buffers, so only weights whose numbers it may want are such."""
    jobs: list[str] = []
    compiled: list[torch.export.ExportedProgram] = []
    monkeypatch.setattr(aoti, "_compile", lambda todo, *_: jobs.extend(todo.values()))
    monkeypatch.setattr(aoti, "_cached", lambda job: tmp_path / "none.pt2")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: None)
    compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti")
    (tmp_path / "job.json").write_text(jobs[0])
    arguments = [str(tmp_path / "job.json"), "out", str(os.getppid())]
    monkeypatch.setattr(sys, "argv", ["worker", *arguments])
    compile_now = "torch._inductor.aoti_compile_and_package"
    monkeypatch.setattr(compile_now, lambda program, **_: compiled.append(program))
    aoti_worker.main()
    buffers = [compiled[0].state_dict[name] for name in compiled[0].graph_signature.buffers]
    assert 0 < len(buffers) < len(compiled[0].state_dict)
    assert max(tensor.numel() for tensor in buffers) <= 64


def fails_and_leaves_nothing(
    traced: TracedModel, tmp_path: Path, patch: pytest.MonkeyPatch
) -> BackendError:
    aoti._torch_cache()  # stays until this process ends
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    patch.setattr(artifact, "save_weights", None)  # weights that are mapped are not read before
    patch.setenv("CACHEGRAPH_CACHE", str(tmp_path / "cache"))
    patch.setattr(tempfile, "tempdir", str(temporary))
    patch.setenv("TMPDIR", str(temporary))
    with pytest.raises(BackendError) as caught:
        compile_traced(narrow_dit(), traced, SCHEDULE, backend="aoti", out=tmp_path / "out/dit")
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == ["aoti", "cache", "out", "tmp"]
    return caught.value


def test_a_failure_names_the_graph(
    traced: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "_WORKER", "no_such_worker")
    error = fails_and_leaves_nothing(traced, tmp_path, monkeypatch)
    assert error.place in ("variant0", "variant1")
    assert error.what == "a graph could not be compiled ahead of time"
    assert error.found.endswith("No module named no_such_worker")


@pytest.mark.slow
def test_a_compiler_that_fails_is_named(
    traced: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    error = fails_and_leaves_nothing(traced, tmp_path, monkeypatch)
    assert error.place in ("variant0", "variant1")
    assert "/bin/false" in error.found
