"""The manifest of an artifact: what is in the folder, and the program, as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cachegraph.downloads import mistaken
from cachegraph.errors import ArtifactError
from cachegraph.graph.weights import WEIGHTS_FILE
from cachegraph.runtime.program import OtherPlan, Program

from .data import DataError, from_data, to_data

FORMAT = 6
MANIFEST = "manifest.json"
SCHEDULE = "schedule.yaml"
COMPILED = "compiled"
GRAPHS = "graphs"
PROVENANCE = "provenance.json"
_CODE = (".pt2", ".engine")  # machine code, which loading runs


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written; of the weights each tensor has a digest of its own instead."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Form:
    """What an artifact is for one form of call.

    Attributes:
        program: what the steps do.
        plans: by name, where there are several; that of the program is the first.
    """

    program: Program
    plans: Mapping[str, OtherPlan]


@dataclass(frozen=True)
class Manifest:
    """All that an artifact says of itself.

    Attributes:
        torch: version that it was compiled with.
        backend: that it was compiled for.
        files: by their names in the folder, the manifest's own left out.
        weights: name -> SHA-256 of the tensor's bytes.
        aliases: name -> the weight that it is another name of.
        forms: one for each form of call.
        made_from: digest of all that it was made from, where that can be told.
    """

    torch: str
    backend: str
    files: Mapping[str, FileRecord]
    weights: Mapping[str, str]
    aliases: Mapping[str, str]
    forms: tuple[Form, ...]
    made_from: str | None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it says."""
        return digest_of(self._data())

    def write(self, folder: Path) -> None:
        """Write it; the last file of a folder."""
        content = json.dumps(self._data() | {"digest": self.digest}, indent=1) + "\n"
        (folder / MANIFEST).write_text(content)

    def _data(self) -> dict[str, Any]:
        # For people and tools that look at one; nothing here goes by it.
        says = {"holds_code": any(name.endswith(_CODE) for name in self.files)}
        return {"cachegraph": FORMAT, **says, **to_data(self, Manifest)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact.

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        instead, remedy = mistaken(folder / MANIFEST)
        raise ArtifactError(
            "the manifest is damaged",
            place=str(folder / MANIFEST),
            found=instead or repr(error),
            remedy=remedy or "compile the artifact again",
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
    return _typed(manifest, folder)


def _typed(manifest: dict[str, Any], folder: Path) -> Manifest:
    del manifest["cachegraph"]
    manifest.pop("holds_code", None)
    try:
        found: Manifest = from_data(manifest, Manifest)
    except DataError as error:
        raise ArtifactError(
            f"the manifest is wrong: {error.path}",
            place=str(folder / MANIFEST),
            expected=error.expected,
            found=error.found,
            remedy="compile the artifact again",
        ) from error
    for name in found.files:
        if not all(re.fullmatch(r"[\w.+-]+", part) and part != ".." for part in name.split("/")):
            raise ArtifactError(
                f"the manifest names a file outside of the artifact: {name!r}",
                place=str(folder / MANIFEST),
            )
    return found


def read_file(folder: Path, name: str, expected: FileRecord) -> bytes:
    """A file as it was written; of the weights, which have digests of their own, nothing.

    Raises:
        ArtifactError: it is missing, or has another size or content.
    """
    path = folder / name
    size = path.stat().st_size if path.is_file() else None
    found = "no such file" if size is None else f"{size} bytes"
    if size == expected.bytes:
        content = path.read_bytes() if expected.sha256 else b""
        if not expected.sha256 or hashlib.sha256(content).hexdigest() == expected.sha256:
            return content
        found = "other content of the same size"
    instead, remedy = mistaken(path) if size else ("", "")
    raise ArtifactError(
        "a file of the artifact is damaged",
        place=str(path),
        expected=f"{expected.bytes} bytes as written",
        found=instead or found,
        remedy=remedy or "compile the artifact again",
    )


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What the disk does not give is told with its path.

    Raises:
        ArtifactError: a file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            "the artifact cannot be read",
            place=str(error.filename or folder),
            found=error.strerror or str(error),
        ) from error


def form_folder(number: int) -> str:
    """Where graphs of one of several forms lie in the folder; those of the first at its top."""
    return f"forms/{number}" if number else ""


def plan_file(name: str) -> str:
    """The file of a plan's schedule, where an artifact has several."""
    return f"schedule-{name}.yaml"


def record(path: Path) -> FileRecord:
    """What :func:`read_file` compares; of the weights their size alone."""
    whole = path.name != WEIGHTS_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if whole else ""
    return FileRecord(path.stat().st_size, digest)


def digest_in(folder: Path) -> str:
    """That of the manifest that lies in a folder now; empty where there is none to be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def stamp_in(folder: Path) -> tuple[int, ...]:
    """Tells the manifest that lies in a folder now from any that lay or will lie there.

    Not by contents: two writers may have put another artifact and the first one again in its place.
    """
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_mtime_ns


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, but the digest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
