"""Load artifacts: no model code, no compiler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

from cachegraph.errors import ArtifactError, InputError
from cachegraph.graph.serialise import graph_from_json, weights_module
from cachegraph.graph.weights import WEIGHTS_FILE, load_weights, stored_weight
from cachegraph.lazy import LazyMapping, LazySequence
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.tracking import Track

from .artifact import Artifact, made_from
from .manifest import (
    COMPILED,
    GRAPHS,
    MANIFEST,
    SCHEDULE,
    check_file,
    digest_of,
    program_of,
    read_manifest,
)
from .origin import Origin


def load(
    artifact: str | Path | Artifact,
    device: str | torch.device = "cpu",
    *,
    track: Track = "timestep",
    backend: str | None = None,
    timesteps: Sequence[float] | None = None,
    cuda_graphs: bool = False,
) -> Runner:
    """A compiled model, callable as the traced one was; needs no model code.

    Args:
        artifact: a folder, or what :func:`compile` returned.
        device: where a folder's weights go.
        track: how the step of a call is found: from its ``timestep``, or by ``count``.
        backend: another backend than the artifact was compiled for.
        timesteps: the sampler's, one a step as the model takes them, in place of the schedule's.
            Steps are found by them, and what depends on them alone is computed ahead from the
            first step on; with ``track="count"`` they are taken as said, calls' are not looked at.
        cuda_graphs: record the kernels of each kind of step once and launch them all at once. Each
            branch of a session records graphs of its own, anew for another batch: about one a
            variant and set of token counts, see ``runtime.cuda_graph.plan_launches``.

    Raises:
        InputError: ``cuda_graphs`` on a device without them.
        BackendError: ``cuda_graphs`` with a backend whose work cannot be recorded.
        SessionError: ``track`` is unknown, or ``timesteps`` do not fit the schedule.
        ArtifactError: the folder is missing, half-written, damaged, edited or newer.
    """
    if not isinstance(artifact, Artifact):
        artifact = load_artifact(artifact, device)
    return artifact.runner(
        track=track, backend=backend, timesteps=timesteps, cuda_graphs=cuda_graphs
    )


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
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        check_file(folder / name, expected)
    program = program_of(manifest, folder)
    weights = load_weights(folder / WEIGHTS_FILE, place)
    weights.update({alias: weights[name] for alias, name in manifest["aliases"].items()})
    variants = [layout.name for layout in program.variants]
    texts = {p.stem: p.read_text() for p in sorted((folder / GRAPHS).glob("*.json"))}

    def read(name: str) -> fx.GraphModule:
        # What is compiled ahead of time runs without its graph, and making one takes a moment.
        graph = graph_from_json(json.loads(texts[name]), place)
        used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        root = weights_module({name: stored_weight(weights, name) for name in sorted(used)})
        return fx.GraphModule(root, graph)

    return Artifact(
        program=program,
        schedule_text=(folder / SCHEDULE).read_text(),
        graphs=LazySequence(LazyMapping(variants, read)),
        prologues=LazyMapping([name for name in texts if name not in variants], read),
        texts=tuple((folder / GRAPHS / f"{name}.txt").read_text() for name in variants),
        weights=weights,
        backend=manifest["backend"],
        device=place,
        compiled={p.name: p for p in (folder / COMPILED).glob("*")},
        saved={folder: digest_of(manifest)},
    )


def is_made_from(path: str | Path, origin: Origin) -> bool:
    """True where a folder holds the very artifact that was made from this, to the last byte."""
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
        if manifest.get("made_from", {}).get("origin") != origin.digest:
            return False
        for name, expected in manifest["files"].items():
            check_file(folder / name, expected)
    except ArtifactError:
        return False
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return found == {*manifest["files"], MANIFEST} and (
        manifest["made_from"] == made_from(folder, origin)
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
