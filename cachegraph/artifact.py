"""A compiled artifact: a folder that runs without the model's code.

``manifest.json`` is written last and the folder is renamed when whole, so a folder without one is
the remains of an interrupted save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx

from .backends import get_backend
from .errors import ArtifactError, InputError
from .known import Prologues
from .program import Program
from .runner import Runner
from .schedule import Schedule, load_schedule
from .serialise import graph_from_json, graph_to_json, weights_module
from .tracking import Track
from .weights import distinct, load_weights, save_weights, stored_weight

FORMAT = 2
_MANIFEST = "manifest.json"
_WEIGHTS = "weights.safetensors"
_SCHEDULE = "schedule.yaml"
_PROGRAM = TypeAdapter(Program)


@dataclass(frozen=True)
class Artifact:
    """A compiled denoising loop, in memory or read from a folder.

    Attributes:
        program: what the steps do.
        schedule: what was asked for.
        graphs: one lowered graph a variant; weights are shared.
        prologues: by the name of their file, the graphs that compute what is known beforehand:
            see :func:`cachegraph.known.named_prologues`.
        texts: the graphs as text, with provenance.
        weights: name -> tensor.
        backend: name of the backend that runs the graphs.
        device: that the weights are on.
    """

    program: Program
    schedule: Schedule
    graphs: tuple[fx.GraphModule, ...]
    prologues: Mapping[str, fx.GraphModule]
    texts: tuple[str, ...]
    weights: Mapping[str, Tensor]
    backend: str
    device: torch.device

    def runner(self, *, track: Track = "timestep", backend: str | None = None) -> Runner:
        """A callable with the traced model's signature.

        Args:
            track: how the step of a call is found: ``timestep`` or ``count``.
            backend: another backend than the artifact was compiled for.

        Raises:
            BackendError: unknown backend.
        """
        chosen = get_backend(backend or self.backend)
        functions = [
            chosen.load(graph, layout.inputs)
            for graph, layout in zip(self.graphs, self.program.variants, strict=True)
        ]
        prologues = Prologues.of(self.program, self.prologues, batched=not chosen.exact)
        return Runner(self.program, functions, self.weights, track, prologues)

    def save(self, path: str | Path) -> Path:
        """Write the artifact beside ``path`` and rename it when whole.

        Raises:
            ArtifactError: ``path`` exists and is no artifact.
        """
        target = Path(path)
        if target.exists() and not (target / _MANIFEST).is_file():
            raise ArtifactError(
                "the output exists and is no artifact",
                place=str(target),
                remedy="choose another path or remove it",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            self._write(partial)
            _swap(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def _write(self, folder: Path) -> None:
        stored, aliases = distinct(self.weights)
        save_weights(stored, folder / _WEIGHTS)
        (folder / _SCHEDULE).write_text(self.schedule.to_yaml())
        (folder / "graphs").mkdir()
        names = [layout.name for layout in self.program.variants]
        for name, text in zip(names, self.texts, strict=True):
            (folder / "graphs" / f"{name}.txt").write_text(text)
        modules = dict(zip(names, self.graphs, strict=True)) | dict(self.prologues)
        for name, module in modules.items():
            lines = ",\n".join(json.dumps(node) for node in graph_to_json(module.graph))
            (folder / "graphs" / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        manifest: dict[str, Any] = {
            "cachegraph": FORMAT,
            "torch": torch.__version__.split("+")[0],
            "backend": self.backend,
            "aliases": aliases,
            "files": {str(p.relative_to(folder)): _fingerprint(p) for p in files},
            "program": _PROGRAM.dump_python(self.program, mode="json"),
        }
        manifest["digest"] = _digest(manifest)
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_artifact(path: str | Path, device: str | torch.device = "cpu") -> Artifact:
    """Read an artifact.

    Args:
        path: the folder.
        device: where the weights go and the graphs run.

    Raises:
        ArtifactError: missing, half-written, damaged, edited, or newer than this cachegraph.
        InputError: this machine does not have the device.
    """
    folder = Path(path)
    place = _usable(device)
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected)
    try:
        program = _PROGRAM.validate_python(manifest["program"])
    except ValidationError as error:
        raise ArtifactError(
            "the manifest does not describe a program",
            place=str(folder / _MANIFEST),
            found=str(error.errors()[0]["msg"]),
        ) from error
    weights = load_weights(folder / _WEIGHTS, place)
    weights.update({alias: weights[name] for alias, name in manifest["aliases"].items()})
    graphs = {
        path.stem: graph_from_json(json.loads(path.read_text()), place)
        for path in sorted((folder / "graphs").glob("*.json"))
    }
    names = {str(n.target) for g in graphs.values() for n in g.find_nodes(op="get_attr")}
    root = weights_module({name: stored_weight(weights, name) for name in sorted(names)})
    modules = {name: fx.GraphModule(root, graph) for name, graph in graphs.items()}
    variants = [layout.name for layout in program.variants]
    return Artifact(
        program=program,
        schedule=load_schedule(folder / _SCHEDULE),
        graphs=tuple(modules.pop(name) for name in variants),
        prologues=modules,
        texts=tuple((folder / "graphs" / f"{name}.txt").read_text() for name in variants),
        weights=weights,
        backend=manifest["backend"],
        device=place,
    )


def _usable(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has no one error for it
        raise InputError(
            "the device cannot be used",
            expected="a device of this machine, such as cpu",
            found=f"{device}: {str(error).splitlines()[0]}",
        ) from error
    return torch.device(device)


def _read_manifest(folder: Path) -> dict[str, Any]:
    place = str(folder)
    if not folder.exists():
        raise ArtifactError("no such artifact", place=place)
    if not folder.is_dir():
        raise ArtifactError("not an artifact", place=place, expected="a folder")
    if not (folder / _MANIFEST).is_file():
        raise ArtifactError(
            "not an artifact, or one whose writing was interrupted",
            place=place,
            expected=f"a {_MANIFEST} in it",
            remedy="compile it again",
        )
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        version = manifest["cachegraph"]
        recorded = manifest.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            "the manifest is damaged", place=str(folder / _MANIFEST), found=repr(error)
        ) from error
    if version != FORMAT:
        raise ArtifactError(
            "the artifact has another format",
            place=place,
            expected=f"format {FORMAT}",
            found=f"format {version}",
            remedy="update cachegraph, or compile it again with this one",
        )
    if recorded != _digest(manifest):
        raise ArtifactError(
            "the manifest was changed after it was written",
            place=str(folder / _MANIFEST),
            remedy="compile the artifact again",
        )
    return manifest


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    found = "no such file" if size is None else f"{size} bytes"
    if size == expected["bytes"]:
        if expected["sha256"] is None or _sha256(path) == expected["sha256"]:
            return
        found = "other content of the same size"
    raise ArtifactError(
        "a file of the artifact is damaged",
        place=str(path),
        expected=f"{expected['bytes']} bytes as written",
        found=found,
        remedy="compile the artifact again",
    )


def _fingerprint(path: Path) -> dict[str, Any]:
    # Hashing gigabytes of weights would make loading slow; their size and header are checked.
    digest = None if path.name == _WEIGHTS else _sha256(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _swap(partial: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, if there is one."""
    if not target.exists():
        partial.rename(target)
        return
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
