"""Compiled loops on disk: one artifact a form of call, found again by what it was made from."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.manifest import MANIFEST, read_manifest
from cachegraph.artifact.origin import content_digest, surroundings
from cachegraph.backends import Progress
from cachegraph.errors import ArtifactError
from cachegraph.graph.weights import WEIGHTS_FILE

SUFFIX = ".cgraph"


class Store:
    """A folder of artifacts, each an ordinary one: ``cachegraph.load`` takes it, too.

    Artifacts of the same weights share the file of them, where the file system can.

    Args:
        folder: made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(
        self, name: str, device: torch.device, weights: Mapping[str, Tensor]
    ) -> Artifact | None:
        """An artifact that was kept, on the model's own weights; None where there is none.

        Args:
            name: from :func:`name_of`.
            device: of the weights.
            weights: the model's.
        """
        path = self.folder / name
        if not (path / MANIFEST).is_file():
            return None
        try:
            found = load_artifact(path, device)
        except ArtifactError as error:
            warnings.warn(f"it is compiled anew: {error}", stacklevel=2)
            return None
        own = {key: weights.get(key, tensor) for key, tensor in found.weights.items()}
        return found.with_weights(own)

    def keep(self, name: str, artifact: Artifact, progress: Progress) -> None:
        """Write an artifact.

        Raises:
            ArtifactError: there is something else in its place.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = artifact.save(self.folder / name, progress)
        mine = read_manifest(path)
        for other in sorted(self.folder.glob(f"*{SUFFIX}")):
            if other == path or not (other / MANIFEST).is_file():
                continue
            theirs = read_manifest(other)
            same = theirs.files[WEIGHTS_FILE] == mine.files[WEIGHTS_FILE]
            if same and theirs.weights == mine.weights:
                with suppress(OSError):  # a file system without links has the file twice
                    linked = path / f"{WEIGHTS_FILE}.link"
                    os.link(other / WEIGHTS_FILE, linked)
                    os.replace(linked, path / WEIGHTS_FILE)
                return


def name_of(model: nn.Module, steps: int, **made_from: Any) -> str:
    """The name of the artifact that is made from all this, and of no other.

    Args:
        model: its class names the artifact; the files of its code are looked at.
        steps: of a trajectory.
        made_from: all else that tells what is made, as text or plain data.
    """
    _, around = surroundings()
    sources = {inspect.getsourcefile(type(module)) for module in model.modules()}
    code = {file: content_digest(Path(file)) for file in sources if file and os.path.isfile(file)}
    described = {**made_from, **around, "model's code": sorted(code.values()), "steps": steps}
    text = json.dumps(described, sort_keys=True, default=repr)
    label = re.sub(r"\W", "", type(model).__name__)
    return f"{label}-{steps}-{hashlib.sha256(text.encode()).hexdigest()[:24]}{SUFFIX}"


def contents_of(weights: Mapping[str, Tensor]) -> str:
    """A digest of what tensors hold: some seconds for the largest models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
