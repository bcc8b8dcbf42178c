"""Artifacts: they come back as they were, and what is damaged or half-written is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cachegraph as cg
from cachegraph import folders
from cachegraph.artifact import artifact
from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import load_artifact
from cachegraph.errors import ArtifactError, InputError
from cachegraph.runtime.runner import Runner
from tests.models import compile_traced, own_operator, signed
from tests.tiny import Tiny, call, tiny, traced

ROOT = Path(__file__).parents[2]
STEPS = 4
FULL = {"cachegraph": 1, "steps": STEPS, "policy": {"method": "full"}}


def trajectory(run: Runner, batch: int = 2) -> list[Tensor]:
    return [run(*call(step, batch)) for step in range(STEPS)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def refusal(path: Path, **kwargs: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        cg.load(path, **kwargs)
    return str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- there and back


def test_loaded_artifact_runs_bit_for_bit_as_the_compiled_one(
    compiled: Artifact, original: Path
) -> None:
    loaded = load_artifact(original)
    assert loaded.program == compiled.program
    assert loaded.schedule == compiled.schedule
    assert loaded.texts == compiled.texts
    for batch in (1, 2, 3):
        assert same(trajectory(cg.load(original), batch), trajectory(cg.load(compiled), batch))


def test_full_schedule_is_the_model_itself(tmp_path: Path) -> None:
    compile_traced(tiny(), traced(), FULL, out=tmp_path / "full")
    with torch.no_grad():
        wanted = [tiny()(*call(step)) for step in range(STEPS)]
    assert same(trajectory(cg.load(tmp_path / "full")), wanted)


def test_loaded_artifact_saves_the_same_again(original: Path, tmp_path: Path) -> None:
    again = load_artifact(original).save(tmp_path / "again")
    assert contents(again) == contents(original)


def test_files_may_be_read_by_whom_the_folder_allows(original: Path) -> None:
    modes = {path.stat().st_mode for path in original.iterdir() if path.is_file()}
    assert len(modes) == 1


IN_A_NEW_PROCESS = """
import sys
sys.modules["cachegraph.zoo"] = None  # importing it is an error now
import torch, cachegraph
from safetensors.torch import load_file, save_file
run = cachegraph.load(sys.argv[1])
calls = load_file(sys.argv[2])
steps = range(len(calls) // 2)
save_file({f"{s}": run(calls[f"x{s}"], calls[f"t{s}"]) for s in steps}, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("tests")]
"""


def test_it_runs_in_a_new_process_without_the_code_of_any_model(
    compiled: Artifact, original: Path, tmp_path: Path
) -> None:
    calls = {f"{n}{s}": v for s in range(STEPS) for n, v in zip("xt", call(s), strict=True)}
    save_file(calls, tmp_path / "calls")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [original, tmp_path / "calls", tmp_path / "results"]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, arguments)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    found = load_file(tmp_path / "results")
    assert same([found[f"{s}"] for s in range(STEPS)], trajectory(cg.load(compiled)))


# --- weights


def test_weights_are_stored_once_for_all_variants(compiled: Artifact, original: Path) -> None:
    assert len(compiled.graphs) == 4
    size = sum(p.nbytes for p in tiny().parameters())
    assert size < (original / "weights.safetensors").stat().st_size < size + 4000
    stored = load_file(original / "weights.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {
        name: p.shape for name, p in tiny().named_parameters()
    }


class Tied(Tiny):
    """The head is the output projection of a block, and its bias a part of another bias."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.blocks[0].attn.proj.weight
        del self.head.bias
        self.head.register_buffer("bias", self.blocks[0].gates.bias.detach()[:8])


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = Tied().eval()
    cg.compile(model, FULL, backend="eager", out=tmp_path / "tied")
    stored = load_file(tmp_path / "tied/weights.safetensors")
    tied = {"head.weight", "blocks.0.attn.proj.weight"}
    assert len(tied & set(stored)) == 1
    assert torch.equal(stored["head.bias"], model.head.bias)
    loaded = load_artifact(tmp_path / "tied")
    assert len({loaded.weights[name].data_ptr() for name in tied}) == 1
    with torch.no_grad():
        wanted = [model(*call(step)) for step in range(STEPS)]
    assert same(trajectory(loaded.runner()), wanted)


def test_weights_without_numbers_are_not_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Tiny().eval()
    args = [t.to("meta") for t in call(0)]
    with pytest.raises(ArtifactError, match="a weight cannot be written; expected a model whose"):
        cg.compile(model, FULL, args, backend="eager", out=tmp_path / "meta")
    assert not list(tmp_path.iterdir())


# --- damage


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


GRAPH = "graphs/variant1.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n"
DAMAGED = "a file of the artifact is damaged; expected "
REMOVE = Path.unlink
MANIFEST = "manifest.json"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weights.safetensors", truncated, DAMAGED),
        ("weights.safetensors", REMOVE, "as written; found no such file; compile the artifact"),
        (GRAPH, REMOVE, "as written; found no such file"),
        (GRAPH, truncated, DAMAGED),
        (GRAPH, lambda p: replaced(p, "aten.gelu", "aten.silu"), "other content of the same size"),
        ("graphs/variant0.txt", lambda p: replaced(p, "gelu", "silu"), "other content of the same"),
        ("schedule.yaml", lambda p: replaced(p, "steps: 4", "steps: 5"), "other content of the"),
        (MANIFEST, REMOVE, "not an artifact, or one whose writing was interrupted; expected"),
        (MANIFEST, truncated, "the manifest is damaged; found JSONDecodeError"),
        (MANIFEST, lambda p: p.write_text("[]"), "the manifest is damaged; found TypeError"),
        (MANIFEST, lambda p: p.write_text(POINTER), "found a git-lfs pointer, which stands for"),
        ("weights.safetensors", lambda p: p.write_text(POINTER), "fetch the file itself: git lfs"),
        (MANIFEST, lambda p: p.write_bytes(b"\xff\0"), "the manifest is damaged; found Uni"),
        (MANIFEST, lambda p: replaced(p, '"eager"', '"aeger"'), "the manifest was changed"),
        (MANIFEST, lambda p: replaced(p, '"sha256"', '"sha265"'), "the manifest was changed"),
    ],
)  # fmt: skip
def test_damage_is_refused(
    folder: Path, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder / name)
    found = refusal(folder)
    assert message in found
    assert str(folder) in found


def test_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "gone") == f"{tmp_path}/gone: no such artifact"
    assert refusal(tmp_path / "file") == f"{tmp_path}/file: not an artifact; expected a folder"
    assert "not an artifact, or one whose writing was interr" in refusal(tmp_path / "empty")


def test_truncated_weights_are_found_without_their_size_too(folder: Path) -> None:
    path = folder / "weights.safetensors"
    truncated(path)
    signed(folder)
    assert "weights.safetensors: the weight 'time.weight' is damaged; expected" in refusal(folder)


def test_a_graph_that_calls_something_forbidden(folder: Path) -> None:
    replaced(folder / GRAPH, '"aten.gelu.default"', '"os.system"')
    signed(folder)
    assert refusal(folder) == "a graph may not call 'os.system'"


def test_a_program_that_is_none(folder: Path) -> None:
    signed(folder, lambda manifest: manifest["forms"][0]["program"].pop("rows"))
    wanted = "the manifest is wrong: forms[0].program.rows; expected this key; found None"
    assert wanted in refusal(folder)


def test_a_newer_format_is_told_from_damage(folder: Path) -> None:
    signed(folder, lambda manifest: manifest.update(cachegraph=7))
    assert "expected format 6; found format 7; update cachegraph" in refusal(folder)


def test_an_older_format_is_to_be_compiled_again(folder: Path) -> None:
    signed(folder, lambda manifest: manifest.update(cachegraph=2))
    assert "expected format 6; found format 2; compile it again" in refusal(folder)


# --- saving


def test_an_output_that_is_no_artifact_is_kept(compiled: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ArtifactError, match="the output exists and is no artifact; choose"):
            compiled.save(tmp_path / name)
    assert contents(tmp_path) == {"file": b"mine", "folder/precious": b"mine"}


def test_an_older_artifact_is_replaced(folder: Path, original: Path) -> None:
    (folder / "stray").touch()
    load_artifact(original).save(folder)
    assert contents(folder) == contents(original)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def fails(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("part", ["save_weights", "graph_to_json", "record"])
def test_a_failed_save_leaves_all_as_it_was(
    folder: Path, original: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_artifact(original)
    monkeypatch.setattr(artifact, part, fails)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ArtifactError, match="cannot be written; found no space"):
            loaded.save(target)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert contents(folder) == contents(original)


def test_a_failed_swap_puts_the_older_artifact_back(
    folder: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        return fails() if path.suffix == ".partial" else rename(path, target)

    loaded = load_artifact(original)
    monkeypatch.setattr(Path, "rename", refusing)
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    with pytest.raises(ArtifactError, match="no space"):
        loaded.save(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert contents(folder) == contents(original)


@own_operator
def thrice(x: Tensor) -> Tensor:
    return x * 3


@thrice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(Tiny):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return thrice(super().forward(x, t))


def test_an_operation_of_ones_own_runs_but_is_not_written(tmp_path: Path) -> None:
    made = cg.compile(Custom().eval(), FULL, backend="eager")
    assert made.runner()(*call(0)).shape == call(0)[0].shape
    with pytest.raises(ArtifactError, match=r"elsewhere.thrice.default cannot be written"):
        made.save(tmp_path / "custom")
    assert not list(tmp_path.iterdir())


# --- killed while saving

KILLED = """
import os, signal, sys
from cachegraph.artifact import artifact, load
loaded = load.load_artifact(sys.argv[1])
before = getattr(artifact, sys.argv[3])
def killed(*args):
    if sys.argv[3] == "save_weights":
        before(*args)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(artifact, sys.argv[3], killed)
loaded.save(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("moment", "old"), [("save_weights", False), ("record", True)], ids=["early", "late"]
)
def test_a_killed_process_leaves_nothing_that_loads(
    original: Path, tmp_path: Path, moment: str, old: bool
) -> None:
    target = tmp_path / "out"
    if old:
        shutil.copytree(original, target)
    command = [sys.executable, "-c", KILLED, str(original), str(target), moment]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, cwd=tmp_path, env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == old
    if old:
        assert contents(target) == contents(original)
        assert len(trajectory(cg.load(target))) == STEPS
    [partial] = set(tmp_path.iterdir()) - {target}
    assert (partial / "weights.safetensors").exists()
    assert "one whose writing was interrupted" in refusal(partial)
    load_artifact(original).save(target)  # and a new attempt succeeds
    assert contents(target) == contents(original)


# --- devices


def test_a_device_may_be_named(original: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        assert cg.load(original, device=device).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:77", "quantum"])
def test_a_device_that_is_not_there(original: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"the device cannot be used; expected .* found {device}:"):
        cg.load(original, device=device)


@pytest.mark.gpu
def test_it_runs_on_a_gpu(original: Path) -> None:
    run = cg.load(original, device="cuda")
    found = [run(*(t.cuda() for t in call(step))).cpu() for step in range(STEPS)]
    for here, wanted in zip(found, trajectory(cg.load(original)), strict=True):
        torch.testing.assert_close(here, wanted, rtol=1e-3, atol=1e-4)
