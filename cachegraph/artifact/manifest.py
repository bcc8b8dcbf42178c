"""The manifest of an artifact: what is in the folder, and the program, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachegraph.errors import ArtifactError
from cachegraph.graph.weights import WEIGHTS_FILE
from cachegraph.runtime.program import Program

from .data import DataError, from_data, to_data

FORMAT = 3
MANIFEST = "manifest.json"
SCHEDULE = "schedule.yaml"
COMPILED = "compiled"
GRAPHS = "graphs"


def program_of(manifest: Mapping[str, Any], folder: Path) -> Program:
    """The program that a manifest describes.

    Raises:
        ArtifactError: it describes none.
    """
    try:
        found: Program = from_data(manifest.get("program"), Program, "program")
    except DataError as error:
        raise ArtifactError(
            f"the manifest does not describe a program: {error.path}",
            place=str(folder / MANIFEST),
            expected=error.expected,
            found=error.found,
            remedy="compile the artifact again",
        ) from error
    return found


def program_data(program: Program) -> Any:
    """The program as the manifest holds it."""
    return to_data(program, Program)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest, without its digest.

    Raises:
        ArtifactError: there is none, or it is damaged, edited, or of another format.
    """
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
            remedy="compile it again"
            if version in range(FORMAT)
            else "update cachegraph, or compile it again with this one",
        )
    if recorded != digest_of(manifest):
        what = "the manifest was changed after it was written"
        raise ArtifactError(what, place=str(folder / MANIFEST), remedy="compile the artifact again")
    return manifest


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ArtifactError: it is missing, or has another size or content.
    """
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


def fingerprint(path: Path) -> dict[str, Any]:
    """What :func:`check_file` compares."""
    # Hashing gigabytes of weights would make loading slow; their size and header are checked.
    digest = None if path.name == WEIGHTS_FILE else _sha256(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_in(folder: Path) -> str:
    """That of the manifest that lies in a folder now; empty where there is none to be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, but the digest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
