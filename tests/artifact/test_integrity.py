"""Artifacts beside other writers, damaged in their data, and edited so that parts do not fit."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cachegraph as cg
from cachegraph import folders
from cachegraph.artifact import load
from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.manifest import FileRecord, read_manifest
from cachegraph.errors import InputError
from cachegraph.graph.weights import load_weights
from tests.artifact.test_artifact import (
    MANIFEST,
    ROOT,
    refusal,
)
from tests.models import signed

# --- readers and writers at one place ---------------------------------------------------------

RACE = """
import sys
from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.manifest import FileRecord, read_manifest
both = [load_artifact(path) for path in sys.argv[1:3]]
for number in range(int(sys.argv[4])):
    both[number % 2].save(sys.argv[3])
"""


def test_a_reader_beside_a_writer_gets_one_artifact_whole(
    original: Path, compiled: Artifact, tmp_path: Path
) -> None:
    """Two artifacts that differ in weights and graphs take turns at one place."""
    with torch.no_grad():
        weights = {name: tensor + 1 for name, tensor in compiled.weights.items()}
    other = replace(compiled, weights=weights).save(tmp_path / "other")
    place = load_artifact(original).save(tmp_path / "place")
    known = {json.loads((one / MANIFEST).read_text())["digest"] for one in (original, other)}
    name = min(weights)
    wanted = [compiled.weights[name].tolist(), weights[name].tolist()]
    command = [sys.executable, "-c", RACE, original, other, place, "60"]
    writer = subprocess.Popen(
        [str(part) for part in command], env=os.environ | {"PYTHONPATH": ROOT}
    )
    reads = 0
    try:
        while writer.poll() is None:
            found = load_artifact(place)
            assert set(found.saved.values()) <= known
            assert found.weights[name].tolist() in wanted
            reads += 1
    finally:
        writer.kill()
        writer.wait()
    assert writer.returncode == 0
    assert reads > 10


def test_another_artifact_that_came_and_went_is_not_read(
    original: Path, compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same manifest before and after says nothing of the weights between them."""
    with torch.no_grad():
        weights = {name: tensor + 1 for name, tensor in compiled.weights.items()}
    place, other = compiled.save(tmp_path / "place"), replace(compiled, weights=weights)
    again = load_artifact(original)
    times: list[Path] = []

    def between(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
        if not times:
            other.save(place)
        found = load_weights(path, device)
        if not times:
            again.save(place)
        times.append(path)
        return found

    monkeypatch.setattr(load, "load_weights", between)
    found = load_artifact(place, verify=False)
    assert len(times) == 2
    for name, weight in compiled.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["is_file", "stat", "read_bytes", "read_text", "exists"])
def test_what_the_disk_does_not_give_is_told(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, name, fail)
    found = refusal(folder)
    assert str(folder) in found
    assert "Input/output error" in found


def test_half_of_the_weights_zeroed(folder: Path) -> None:
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    assert re.search(r"the weight '[\w.]+' is damaged; expected the tensor", refusal(folder))
    assert load_artifact(folder, verify=False).weights
    assert cg.load(folder, verify=False)


def test_saving_through_a_link_keeps_the_link(compiled: Artifact, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
    for _ in range(2):
        compiled.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    found = load_artifact(tmp_path / "real" / "out")
    assert found.texts == compiled.texts


def test_what_dead_processes_left_is_removed_and_told(
    compiled: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [
        tmp_path / f".out.{folders._host()}-{n}-0123abcd.partial" for n in (dead.pid, os.getpid())
    ]
    for path in left:
        path.mkdir()
    compiled.save(tmp_path / "out")
    assert [path.exists() for path in left] == [False, True]
    assert str(left[0]) in caplog.text


def test_what_a_dead_process_took_away_is_put_back(compiled: Artifact, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    saved = compiled.save(tmp_path / "out")
    saved.rename(tmp_path / f".out.{folders._host()}-{dead.pid}-0123abcd.old")
    with pytest.raises(InputError), folders.written_whole(saved):
        raise InputError("changed my mind")
    assert load_artifact(saved).texts == compiled.texts


# --- parts that do not fit together -----------------------------------------------------------


def edited(name: str) -> Callable[[dict[str, Any]], Any]:
    """An edit of the program in a manifest."""
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "variant": lambda p: p["steps"][1].update(variant=7),
        "no steps": lambda p: p.update(steps=[], rows=[]),
        "rows": lambda p: p["rows"].pop(),
        "source": lambda p: p["steps"][1]["slots"].update(dict.fromkeys(p["steps"][1]["slots"], 1)),
        "keeps": lambda p: p["steps"][0].update(keeps=[]),
        "frees": lambda p: p["steps"][0].update(
            frees=[[port["of"], 0] for port in p["variants"][0]["interface"]["outputs"][1:]]
        ),
        "input": lambda p: p["variants"][1]["interface"]["inputs"].pop(),
        "order": lambda p: p["variants"][0]["interface"]["inputs"].reverse(),
        "spec": lambda p: p["variants"][0]["interface"]["outputs"][0].update(spec="f32[9]"),
        "outputs": lambda p: p["signature"].update(outputs=["f32[9]"]),
        "lasting": lambda p: p.update(lasting=[9]),
        "tensor": lambda p: p["signature"]["arguments"].update(x={"tensor": 9}),
        "tree": lambda p: p["signature"].update(result={"tensor": 3}),
        "batch": lambda p: p.update(batch="s1234"),
        "size": lambda p: p["symbols"].update(dict.fromkeys(p["symbols"], 0)),
        "timesteps": lambda p: p.update(timesteps=[1.0]),
    }
    return edits[name]


EDITS = """
variant / no steps / rows / source / keeps / frees / input / order / spec / outputs / lasting
/ tensor / tree / batch / size / timesteps
"""


@pytest.mark.parametrize("name", [name.strip() for name in EDITS.split("/")])
def test_parts_that_do_not_fit_are_told_before_anything_runs(folder: Path, name: str) -> None:
    before = json.loads((folder / MANIFEST).read_text())["forms"][0]["program"]
    signed(folder, lambda manifest: edited(name)(manifest["forms"][0]["program"]))
    assert json.loads((folder / MANIFEST).read_text())["forms"][0]["program"] != before
    assert "the parts of the artifact do not fit together: " in refusal(folder)


def one_node(nodes: list[dict[str, Any]], op: str) -> dict[str, Any]:
    return next(node for node in nodes if node["op"] == op)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda nodes: one_node(nodes, "placeholder").update(spec="f32[9]"), "takes other inputs"),
        (lambda nodes: nodes.remove(one_node(nodes, "placeholder")), "takes other inputs than its"),
        (lambda nodes: one_node(nodes, "output").update(args=[[]]), "returns something else than"),
        (lambda nodes: one_node(nodes, "get_attr").update(target="gone"), "gone, which is no"),
        (lambda nodes: nodes.append(3), "is no list of nodes"),
    ],
)  # fmt: skip
def test_graphs_that_do_not_fit_are_told_before_anything_runs(
    folder: Path, edit: Callable[[list[Any]], object], message: str
) -> None:
    path = folder / "graphs" / "variant0.json"
    nodes = json.loads(path.read_text())
    edit(nodes)
    path.write_text(json.dumps(nodes))
    signed(folder)
    assert message in refusal(folder)


@pytest.mark.parametrize("file", ["../escape.json", "/etc/passwd", "graphs/../../x", "a//b"])
def test_a_manifest_names_files_of_its_folder_only(folder: Path, file: str) -> None:
    record = {"bytes": 1, "sha256": "0" * 64}
    signed(folder, lambda manifest: manifest["files"].update({file: record}))
    assert "names a file outside of the artifact" in refusal(folder)


def test_files_that_are_not_listed_are_not_read(folder: Path) -> None:
    (folder / "graphs" / "extra.json").write_text("no JSON")
    (folder / "compiled" / "aoti").mkdir(parents=True)
    found = load_artifact(folder)
    assert "extra" not in found.prologues
    assert not found.compiled


def test_the_manifest_says_whether_it_holds_code(folder: Path, original: Path) -> None:
    def says(backend: str) -> bool:
        files = {f"compiled/{backend}/variant0{end}": FileRecord(1, "") for end in (".json", *more)}
        manifest = replace(read_manifest(original), files=files)
        manifest.write(folder)
        assert read_manifest(folder) == manifest
        return bool(json.loads((folder / MANIFEST).read_text())["holds_code"])

    more: list[str] = []
    assert not says("onnx")
    more = [".pt2"]
    assert says("aoti")
    more = [".engine"]
    assert says("tensorrt")
