"""What is recognised as made before from the same, and what never is."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import cachegraph as cg
from cachegraph import cli
from cachegraph.artifact import origin
from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.origin import Origin, content_digest, find_origin
from cachegraph.compiler import sources
from cachegraph.compiler.sources import model_files
from cachegraph.errors import ModelError
from cachegraph.schedule.schedule import load_schedule
from cachegraph.zoo import build_model
from tests.models import signed

TINY = "DiT(hidden_size=32, depth=1, num_heads=4)"
LISTS = {"attn": [1, 0, 1, 0], "mlp": [1, 0, 1, 0]}
FILES = {"policy": {"method": "smoothcache", "file": "lists.json"}}
FORA = {"policy": {"method": "fora", "interval": 2}}
FORA_FILE = "cachegraph: 1\nsteps: 4\npolicy: {method: fora, interval: 2}"
OPTIONS: dict[str, object] = {"backend": "eager", "inputs": [], "static_batch": False}
FACTORY = (
    f"from cachegraph.zoo import build_model\ndef make():\n    return build_model({TINY!r}, 8)"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and the files that a schedule names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare()
    torch.save(build_model(TINY, 8).state_dict(), "w.pt")
    Path("lists.json").write_text(json.dumps(LISTS))
    Path(f"factory_{tmp_path.name}.py").write_text(FACTORY)
    return tmp_path


def prepare() -> None:
    """Weights and a schedule in this folder, always the same."""
    save_file(build_model(TINY, 8).state_dict(), "w.safetensors", {"num_heads": "4"})
    Path("fora.yaml").write_text(FORA_FILE)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of one file in the place of cachegraph's code."""
    folder = tmp_path / "package"
    (folder / "deep" / "__pycache__").mkdir(parents=True)
    (folder / "deep" / "code.py").write_text("1")
    monkeypatch.setattr(origin, "_PACKAGE", folder)
    monkeypatch.setattr(origin, "BEGAN", origin.BEGAN + 1e6)
    origin.surroundings.cache_clear()
    yield folder
    origin.surroundings.cache_clear()


def found(
    model: str = "w.safetensors",
    schedule: dict[str, object] | None = None,
    options: dict[str, object] | None = None,
) -> Origin:
    """What a new process would find, now."""
    origin.surroundings.cache_clear()
    whole = {"cachegraph": 1, "steps": 4, **(schedule or FILES)}
    result = find_origin(model, model_files(model), load_schedule(whole), options or OPTIONS)
    assert result is not None
    return result


def flip(path: Path, place: int = -1) -> None:
    """Change a byte, and leave size and time as they were."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_same_has_the_same_digest(package: Path) -> None:
    before = found()
    (package / "deep" / "__pycache__" / "code.pyc").write_text("2")
    shutil.copy("w.safetensors", "moved.safetensors")
    assert found("moved.safetensors").digest == before.digest
    assert found("w.pt").digest == found("w.pt").digest != before.digest
    assert found("digits").digest == found("digits").digest != before.digest


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "weights": lambda _, __: flip(Path("w.safetensors")),
    "file of the schedule": lambda _, __: flip(Path("lists.json")),
    "code": lambda package, _: flip(package / "deep" / "code.py"),
    "name of code": lambda package, _: (package / "deep").rename(package / "steep"),
    "more code": lambda package, _: (package / "more.py").write_text(""),
    "a package": lambda _, patch: patch.setattr(origin, "distributions", list),
    "torch": lambda _, patch: patch.setattr(torch.version, "git_version", "0"),
    "python": lambda _, patch: patch.setattr(sys, "version", "4"),
    "compiler": lambda _, patch: patch.setenv("CXX", "clang++"),
    "its settings": lambda _, patch: patch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
    "processor": lambda _, patch: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "none"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_changes_the_digest(
    change: Callable[[Path, pytest.MonkeyPatch], object],
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = found()
    change(package, monkeypatch)
    assert found().digest != before.digest


def test_every_part_of_the_request_is_in_the_digest(package: Path) -> None:
    digests = {found(options=OPTIONS | {name: "other"}).digest for name in OPTIONS}
    digests |= {found(schedule=FILES | {"order": "ascending"}).digest, found().digest}
    digests |= {found(schedule=FORA).digest, found(schedule=FORA | {"steps": 5}).digest}
    assert len(digests) == len(OPTIONS) + 4


def test_all_that_is_asked_on_the_command_line_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(origin, "find_origin", lambda *args: asked.append(args[3]))
    lines = ["--arch=DiT(num_heads=4)", "--input=x=2,4,8,8:f32", "--static-batch"]
    lines += ["--varying=y", "--disable-pass=hoist-known", "--backend=inductor", "--dynamic=batch"]
    lines += ["--also=x=2,4,16,16:f32"]
    assert all(is_anew(*line) for line in [(), *zip(lines)])
    changed = [{k for k in one if one[k] != asked[0][k]} for one in asked[1:]]
    assert [len(names) for names in changed] == [1] * len(lines)
    assert set().union(*changed) == set(asked[0])


def test_what_runs_code_of_its_own_has_none(here: Path) -> None:
    """Nor has what is not there, nor a folder that is called like weights."""
    (here / "folder.pt").mkdir()
    (here / "diffusers").mkdir()
    (here / "diffusers" / "config.json").write_text("{}")
    factory = f"factory_{here.name}"
    names = ["none.pt", "folder.pt", "diffusers", f"{factory}:make", f"{factory}.py", "DiT-XL/2"]
    assert [model_files(name) for name in names] == [None] * 6
    schedule = load_schedule({"cachegraph": 1, "steps": 4, **FORA})
    assert find_origin("none.pt", None, schedule, OPTIONS) is None


def test_code_that_may_have_been_imported_before_it_changed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = load_schedule({"cachegraph": 1, "steps": 4, **FORA})
    written = (package / "deep" / "code.py").stat().st_ctime
    monkeypatch.setattr(origin, "BEGAN", written + 0.2)
    assert find_origin("w.pt", [Path("w.pt")], schedule, OPTIONS) is not None
    monkeypatch.setattr(origin, "BEGAN", written)
    assert find_origin("w.pt", [Path("w.pt")], schedule, OPTIONS) is None


@pytest.mark.parametrize("name", ["w.safetensors", "lists.json", "package/deep/code.py"])
def test_files_that_change_meanwhile(name: str, package: Path) -> None:
    before = found()
    assert before.unchanged()
    flip(Path(name))
    assert not before.unchanged()
    again = found()
    Path(name).unlink()
    assert not again.unchanged()


def test_content_is_read_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "_PIECE", 4)
    contents = [b"", b"\0", b"\0" * 4, b"\0" * 8, b"abcdefghi", b"abcdefghj", b"efghabcdi"]
    digests = set()
    for content in contents:
        Path("file").write_bytes(content)
        assert content_digest(Path("file")) == content_digest(Path("file"))
        digests.add(content_digest(Path("file")))
    assert len(digests) == len(contents)


# --- on the command line ----------------------------------------------------------------------

UP_TO_DATE = "up to date: made before from the same model, schedule and options\n"
OUT = Path("out.cgraph")


def command(*more: str, model: str = "w.safetensors") -> Result:
    line = ["compile", model, "-s", "fora.yaml", "-o", str(OUT), "--backend", "eager", *more]
    return CliRunner().invoke(cli.app, line, prog_name="cachegraph")


def compiled(*more: str, model: str = "w.safetensors") -> str:
    result = command(*more, model=model)
    assert result.exit_code == 0, result.output
    return result.stdout


def is_anew(*more: str, model: str = "w.safetensors") -> bool:
    """Whether a command would open the model; what it says otherwise."""

    def open_model(*_: object, **__: object) -> object:
        raise ModelError("opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_model", open_model)
        result = command(*more, model=model)
    assert result.stderr == "error: opened\n" or result.stdout.startswith(UP_TO_DATE)
    return result.exit_code != 0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with chdir(folder):
        prepare()
        compiled()
    return folder / OUT


@pytest.fixture
def made(here: Path, original: Path) -> None:
    """The artifact is there."""
    shutil.copytree(original, OUT)


@pytest.mark.usefixtures("made")
def test_unchanged_is_not_compiled_again() -> None:
    written = {path: path.stat().st_mtime_ns for path in OUT.rglob("*")}
    assert not is_anew()
    assert {path: path.stat().st_mtime_ns for path in OUT.rglob("*")} == written
    assert is_anew("--force")
    first = compiled("--force")
    assert UP_TO_DATE not in first
    assert compiled() == UP_TO_DATE + first
    flip(Path("w.safetensors"))
    assert is_anew()
    flip(Path("w.safetensors"))
    assert not is_anew()
    Path("fora.yaml").write_text(FORA_FILE.replace("interval: 2", "interval: 3"))
    assert is_anew()


def unsigned(name: str) -> None:
    flip(OUT / name)
    signed(OUT)


DAMAGE: dict[str, Callable[[], object]] = {
    "weights, as loading would not see": lambda: flip(OUT / "weights.safetensors"),
    "weights, of new fingerprints": lambda: unsigned("weights.safetensors"),
    "graph": lambda: flip(OUT / "graphs" / "variant0.json"),
    "missing": lambda: (OUT / "graphs" / "variant0.txt").unlink(),
    "more": lambda: (OUT / "graphs" / "more.json").write_text("[]"),
    "manifest": lambda: flip(OUT / "manifest.json", 5),
    "no word of it": lambda: load_artifact(OUT).save(OUT),
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_artifact_is_not_up_to_date(damage: Callable[[], object]) -> None:
    assert not is_anew()
    damage()
    assert is_anew()


def test_a_factory_is_always_asked(here: Path) -> None:
    factory = f"factory_{here.name}:make"
    compiled(model=factory)
    assert is_anew(model=factory)


def test_weights_that_change_while_compiling_are_no_origin() -> None:
    plain = sources.open_model

    def open_model(text: str, **rest: Any) -> sources.Source:
        shutil.copy("w.safetensors", "other")
        Path("other").replace("w.safetensors")
        return plain(text, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_model", open_model)
        compiled()
    assert is_anew()


def test_a_module_of_ones_own_has_no_origin() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(TINY, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.inner(x, t, y) * 2

    args, _ = build_model(TINY, 8).example_inputs()
    schedule = {"cachegraph": 1, "steps": 4, **FORA}
    cg.compile(Doubled().eval(), schedule, args, backend="eager", out=OUT)
    assert json.loads((OUT / "manifest.json").read_text())["made_from"] is None
