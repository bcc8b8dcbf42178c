"""Load artifacts: no model code, no compiler."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from cachegraph.errors import ArtifactError, InputError
from cachegraph.graph.serialise import graph_from_json, weights_module
from cachegraph.graph.weights import WEIGHTS_FILE, load_weights, stored_weight, verify_weights
from cachegraph.lazy import LazyMapping, LazySequence
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.tracking import Track

from .artifact import Artifact
from .check import check_forms, check_program, graph_names
from .manifest import (
    COMPILED,
    GRAPHS,
    MANIFEST,
    PROVENANCE,
    SCHEDULE,
    Manifest,
    form_folder,
    plan_file,
    read_file,
    read_manifest,
    reading,
    stamp_in,
)
from .origin import Origin

_TRIES, _PATIENCE = 20, 10.0  # at least so many times, and for so many seconds


def load(
    artifact: str | Path | Artifact,
    device: str | torch.device = "cpu",
    *,
    track: Track = "timestep",
    backend: str | None = None,
    timesteps: Sequence[float] | None = None,
    cuda_graphs: bool = False,
    release: bool = False,
    verify: bool = True,
) -> Runner:
    """A compiled model, callable as the traced one was; needs no model code.

    An artifact compiled for ``aoti`` or ``tensorrt`` holds machine code, which runs here: load only
    those that you trust. Those for ``eager``, ``inductor`` and ``onnx`` are data.

    Args:
        artifact: a folder, or what :func:`compile` returned.
        device: where a folder's weights go.
        track: how the step of a call is found: from its ``timestep``, or by ``count``.
        backend: another backend than the artifact was compiled for.
        timesteps: the sampler's, one a step as the model takes them, in place of the schedule's.
            Steps are found by them, and what depends on them alone is computed ahead from the
            first step on; with ``track="count"`` they are taken as said, calls' are not looked at.
            Say them where you can: a sampler of fewer steps, or of others, is an error at its first
            call then. Without them it gives an image, and only when the trajectory is left
            unfinished does an ``UnfinishedWarning`` tell.
        cuda_graphs: record the kernels of each kind of step once and launch them all at once. Each
            branch of a session records graphs of its own, anew for another batch: about one a
            variant and set of token counts, see ``runtime.cuda_graph.plan_launches``.
        release: leave weights that only prologues use, such as those of modulation, out of memory
            while steps run: they are read from the folder again when a prologue runs. It takes
            timesteps that are known: said here or in the schedule, else from the second trajectory
            on.
        verify: compare the weights of a folder with their digests: about 0.8 seconds for the 2.7 GB
            of DiT-XL/2 on two cores.

    Raises:
        InputError: ``cuda_graphs`` on a device without them, or ``release`` of weights that are not
            mapped from a folder or that every step needs.
        BackendError: ``cuda_graphs`` with a backend whose work cannot be recorded.
        SessionError: ``track`` is unknown, or ``timesteps`` do not fit the schedule.
        ArtifactError: the folder is missing, half-written, damaged, edited or newer.
    """
    if not isinstance(artifact, Artifact):
        artifact = load_artifact(artifact, device, verify=verify)
    return artifact.runner(
        track=track,
        backend=backend,
        timesteps=timesteps,
        cuda_graphs=cuda_graphs,
        release=release,
    )


def load_artifact(
    path: str | Path, device: str | torch.device = "cpu", *, verify: bool = True
) -> Artifact:
    """Read an artifact.

    Args:
        path: the folder.
        device: where the weights go and the graphs run.
        verify: compare the weights with their digests.

    Raises:
        ArtifactError: missing, half-written, damaged, edited, or newer than this cachegraph.
        InputError: this machine does not have the device.
    """
    folder, place = Path(path), _usable(device)
    end, tries = time.monotonic() + _PATIENCE, 0
    while tries < _TRIES or time.monotonic() < end:
        tries += 1
        stamp = stamp_in(folder)
        try:
            with reading(folder):
                found = _read(folder, read_manifest(folder), place, verify)
        except ArtifactError:
            if stamp_in(folder) == stamp:
                raise
            continue  # another artifact has taken its place while it was read
        if stamp_in(folder) == stamp:
            return found
    raise ArtifactError(
        "the artifact is written anew all the time",
        place=str(folder),
        remedy="load it when its writer is done",
    )


def _read(folder: Path, manifest: Manifest, device: torch.device, verify: bool) -> Artifact:
    """What the manifest lists, and nothing else; what is used is what was compared."""
    contents = {name: read_file(folder, name, one) for name, one in manifest.files.items()}
    if verify:
        verify_weights(folder / WEIGHTS_FILE, manifest.weights)
    weights = load_weights(folder / WEIGHTS_FILE, device)
    weights.update({alias: weights[name] for alias, name in manifest.aliases.items()})
    check_forms([(form.program, form.plans) for form in manifest.forms], str(folder))
    first, *others = [
        _form(number, folder, manifest, contents, weights, device)
        for number in range(len(manifest.forms))
    ]
    return replace(first, forms=tuple(others))


def _form(
    number: int,
    folder: Path,
    manifest: Manifest,
    contents: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> Artifact:
    """What the artifact is for one form of call."""
    program, plans = manifest.forms[number].program, manifest.forms[number].plans
    at = f"{form_folder(number)}/".removeprefix("/")
    graphs = {n: _content(contents, f"{at}{GRAPHS}/{n}.json") for n in graph_names(program)}
    check_program(program, graphs, weights, str(folder))
    for other in plans.values():
        check_program(program.with_plan(other), {}, weights, str(folder))

    def read(name: str) -> fx.GraphModule:
        # What is compiled ahead of time runs without its graph, and making one takes a moment.
        graph = graph_from_json(json.loads(graphs[name]), device)
        used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        root = weights_module({name: stored_weight(weights, name) for name in sorted(used)})
        return fx.GraphModule(root, graph)

    variants = [layout.name for layout in program.variants]
    backends = {
        name.removeprefix(at).split("/")[1]
        for name in contents
        if name.startswith(f"{at}{COMPILED}/")
    }
    return Artifact(
        program=program,
        schedule_text=_content(contents, SCHEDULE),
        graphs=LazySequence(LazyMapping(variants, read)),
        prologues=LazyMapping([name for name in graphs if name not in variants], read),
        texts=tuple(_content(contents, f"{at}{GRAPHS}/{name}.txt") for name in variants),
        weights=weights,
        backend=manifest.backend,
        device=device,
        compiled={name: folder / at / COMPILED / name for name in sorted(backends)},
        saved={folder: manifest.digest},
        plans={name: (_content(contents, plan_file(name)), plans[name]) for name in plans},
        provenance_text=contents.get(f"{at}{PROVENANCE}", b"").decode(),
    )


def _content(contents: Mapping[str, bytes], name: str) -> str:
    if name not in contents:
        raise ArtifactError(f"the artifact has no file {name}", remedy="compile it again")
    return contents[name].decode()


def is_made_from(path: str | Path, origin: Origin) -> bool:
    """True where a folder holds the very artifact that was made from this, to the last byte."""
    folder = Path(path)
    try:
        with reading(folder):
            manifest = read_manifest(folder)
            if manifest.made_from != origin.digest:
                return False
            for name, record in manifest.files.items():
                read_file(folder, name, record)
            verify_weights(folder / WEIGHTS_FILE, manifest.weights)
    except ArtifactError:
        return False
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return found == {*manifest.files, MANIFEST}


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
