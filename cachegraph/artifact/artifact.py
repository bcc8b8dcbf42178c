"""A compiled artifact: a folder that runs without the model's code.

``manifest.json`` is written last and the folder is renamed when whole, so a folder without one is
the remains of an interrupted save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx

from cachegraph.backends import AheadOfTime, Progress, check_all, get_backend
from cachegraph.backends.named import named_graphs
from cachegraph.errors import ArtifactError, InputError
from cachegraph.folders import refuse_foreign, written_whole
from cachegraph.graph.serialise import graph_from_json, graph_to_json, weights_module
from cachegraph.graph.weights import (
    WEIGHTS_FILE,
    distinct,
    load_weights,
    save_weights,
    stored_weight,
)
from cachegraph.lazy import LazyMapping, LazySequence
from cachegraph.runtime.cuda_graph import recorders
from cachegraph.runtime.known import Prologues, StepFunction
from cachegraph.runtime.program import Program
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.tracking import Track
from cachegraph.schedule.schedule import Schedule, load_schedule

from .origin import Origin, content_digest

FORMAT = 2
MANIFEST = "manifest.json"
_SCHEDULE = "schedule.yaml"
_COMPILED = "compiled"
_PROGRAM = TypeAdapter(Program)


def _unheard(_: str) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True, repr=False)
class Artifact:
    """A compiled denoising loop, in memory or read from a folder.

    Attributes:
        program: what the steps do.
        schedule: what was asked for.
        graphs: one lowered graph a variant; weights are shared.
        prologues: by the name of their file, the graphs that compute what is known beforehand:
            see :func:`cachegraph.runtime.known.named_prologues`.
        texts: the graphs as text, with provenance.
        weights: name -> tensor.
        backend: name of the backend that runs the graphs.
        device: that the weights are on.
        compiled: backend -> folder with what it compiled ahead of time.
        saved: folder of an artifact that holds some of these -> digest of its manifest.
    """

    program: Program
    schedule: Schedule
    graphs: Sequence[fx.GraphModule]
    prologues: Mapping[str, fx.GraphModule]
    texts: tuple[str, ...]
    weights: Mapping[str, Tensor]
    backend: str
    device: torch.device
    compiled: dict[str, Path] = field(default_factory=dict)
    saved: dict[Path, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """``Artifact(fora, 50 steps, 2 variants, aoti, cpu)``."""
        method, steps = self.schedule.policy.method, len(self.program.steps)
        variants = f"{len(self.graphs)} variant{'s' if len(self.graphs) > 1 else ''}"
        return f"Artifact({method}, {steps} steps, {variants}, {self.backend}, {self.device})"

    def runner(
        self,
        *,
        track: Track = "timestep",
        backend: str | None = None,
        timesteps: Sequence[float] | None = None,
        cuda_graphs: bool = False,
    ) -> Runner:
        """A callable with the traced model's signature.

        Args:
            track: how the step of a call is found: ``timestep`` or ``count``.
            backend: another backend than the artifact was compiled for.
            timesteps: the sampler's, in place of the schedule's; see :class:`Runner`.
            cuda_graphs: record each step's kernels once and launch them all at once.

        Raises:
            BackendError: unknown backend, or one whose work cannot be recorded.
            InputError: ``cuda_graphs`` on a device without them.
            SessionError: ``track`` is unknown, or ``timesteps`` do not fit the schedule.
        """
        chosen = get_backend(backend or self.backend)
        recorder = recorders(self.device, chosen.name) if cuda_graphs else None
        prologues = Prologues.of(self.program, self.prologues, batched=not chosen.exact)
        functions = self.functions(backend)
        return Runner(self.program, functions, self.weights, track, prologues, timesteps, recorder)

    def functions(self, backend: str | None = None) -> list[StepFunction]:
        """One function of flat tensors a variant.

        Args:
            backend: another backend than the artifact was compiled for. One that compiles ahead of
                time writes its files to a temporary folder that lives as long as the artifact.

        Raises:
            BackendError: unknown backend, or one that cannot take the graphs.
        """
        chosen = get_backend(backend or self.backend)
        if isinstance(chosen, AheadOfTime):
            self.compile_ahead(chosen.name)
            folder = self.compiled_folder(chosen.name)
            named = named_graphs(self.program, self.graphs)
            return chosen.open(named, self.weights, folder, self.device)
        return [
            chosen.load(graph, layout.inputs)
            for graph, layout in zip(self.graphs, self.program.variants, strict=True)
        ]

    def compiled_folder(self, backend: str) -> Path:
        """Where a backend's files lie that were compiled ahead of time.

        Raises:
            ArtifactError: it lay in a folder that is gone or holds another artifact by now, whose
                files do something else.
        """
        compiled = self.compiled[backend]
        for folder, digest in self.saved.items():
            if folder in compiled.parents and _digest_in(folder) != digest:
                raise ArtifactError(
                    "the artifact's folder is gone, or another one was written to it since",
                    place=str(folder),
                    expected="the artifact as it was saved or read",
                    remedy="load it again: cachegraph.load(path)",
                )
        return compiled

    def compile_ahead(self, backend: str | None = None, progress: Progress = _unheard) -> None:
        """Let a backend that compiles ahead of time do so now, where it has not yet.

        Args:
            backend: another one than the artifact was compiled for.
            progress: is told what is being done.

        Raises:
            BackendError: unknown backend, or one that cannot take the graphs.
        """
        chosen = get_backend(backend or self.backend)
        if not isinstance(chosen, AheadOfTime) or chosen.name in self.compiled:
            return
        folder = Path(tempfile.mkdtemp(prefix="cachegraph-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._emit(chosen, folder, progress)
        self.compiled[chosen.name] = folder

    def _emit(self, backend: AheadOfTime, folder: Path, progress: Progress) -> None:
        named = named_graphs(self.program, self.graphs)
        check_all(backend, [(name, graph.module.graph) for name, graph in named.items()])
        backend.emit(named, self.weights, folder, progress)

    def save(
        self, path: str | Path, progress: Progress = _unheard, origin: Origin | None = None
    ) -> Path:
        """Write the artifact beside ``path`` and rename it when whole.

        Args:
            path: of the folder.
            progress: is told what is being done.
            origin: all that it was made from, where that can be told: :func:`is_made_from`.

        Raises:
            ArtifactError: ``path`` exists and is no artifact.
        """
        target = Path(path)
        refuse_foreign(target, MANIFEST, "artifact")
        with written_whole(target) as partial:
            self._write(partial, progress, origin)
        compiled = target / _COMPILED / self.backend
        if compiled.is_dir():
            self.compiled[self.backend] = compiled
            self.saved[target] = _digest_in(target)
        return target

    def _write(self, folder: Path, progress: Progress, origin: Origin | None) -> None:
        # First, for it needs the memory that weights take which are mapped and were not read yet.
        self._write_compiled(folder / _COMPILED / self.backend, progress)
        stored, aliases = distinct(self.weights)
        save_weights(stored, folder / WEIGHTS_FILE)
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
        if origin is not None and origin.unchanged():
            manifest["made_from"] = _made_from(folder, origin)
        manifest["digest"] = _digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _write_compiled(self, folder: Path, progress: Progress) -> None:
        """What the backend compiled ahead of time, if it does."""
        chosen = get_backend(self.backend)
        if not isinstance(chosen, AheadOfTime):
            return
        if chosen.name in self.compiled:
            shutil.copytree(self.compiled_folder(chosen.name), folder)
        else:
            folder.mkdir(parents=True)
            self._emit(chosen, folder, progress)


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
            place=str(folder / MANIFEST),
            found=str(error.errors()[0]["msg"]),
        ) from error
    weights = load_weights(folder / WEIGHTS_FILE, place)
    weights.update({alias: weights[name] for alias, name in manifest["aliases"].items()})
    variants = [layout.name for layout in program.variants]
    texts = {p.stem: p.read_text() for p in sorted((folder / "graphs").glob("*.json"))}

    def read(name: str) -> fx.GraphModule:
        # What is compiled ahead of time runs without its graph, and making one takes a moment.
        graph = graph_from_json(json.loads(texts[name]), place)
        used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        root = weights_module({name: stored_weight(weights, name) for name in sorted(used)})
        return fx.GraphModule(root, graph)

    return Artifact(
        program=program,
        schedule=load_schedule(folder / _SCHEDULE),
        graphs=LazySequence(LazyMapping(variants, read)),
        prologues=LazyMapping([name for name in texts if name not in variants], read),
        texts=tuple((folder / "graphs" / f"{name}.txt").read_text() for name in variants),
        weights=weights,
        backend=manifest["backend"],
        device=place,
        compiled={p.name: p for p in (folder / _COMPILED).glob("*")},
        saved={folder: _digest(manifest)},
    )


def is_made_from(path: str | Path, origin: Origin) -> bool:
    """True where a folder holds the very artifact that was made from this, to the last byte."""
    folder = Path(path)
    try:
        manifest = _read_manifest(folder)
        if manifest.get("made_from", {}).get("origin") != origin.digest:
            return False
        for name, expected in manifest["files"].items():
            _check_file(folder / name, expected)
    except ArtifactError:
        return False
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return found == {*manifest["files"], MANIFEST} and (
        manifest["made_from"] == _made_from(folder, origin)
    )


def _made_from(folder: Path, origin: Origin) -> dict[str, str]:
    """What the manifest says of it; the weights' content, too, which loading does not read."""
    return {"origin": origin.digest, "weights": content_digest(folder / WEIGHTS_FILE)}


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
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            "not an artifact, or one whose writing was interrupted",
            place=place,
            expected=f"a {MANIFEST} in it",
            remedy="compile it again",
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["cachegraph"]
        recorded = manifest.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            "the manifest is damaged", place=str(folder / MANIFEST), found=repr(error)
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
            place=str(folder / MANIFEST),
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
    digest = None if path.name == WEIGHTS_FILE else _sha256(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_in(folder: Path) -> str:
    """That of the manifest that lies in a folder now; empty where there is none to be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
