"""What an artifact was made from, as one digest: from the same it need not be made again.

A wrong match would give wrong images, so only what can be read to the last byte has a digest: the
files of a model, schedule and of this package, the versions of all others, the machine. A module
of the user's own, a factory or a class of diffusers is code that may be anywhere: it has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachegraph._began import BEGAN
from cachegraph.backends.aoti.backend import compiler_settings

if TYPE_CHECKING:
    from cachegraph.schedule.schedule import Schedule

_PACKAGE = Path(__file__).parents[1]
_PIECE = 2**24  # bytes of a file that one thread reads at a time
_CLOCK = 0.1  # seconds; a file's times may lag behind the clock

State = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """All that an artifact is made from.

    Attributes:
        digest: the same only where everything is the same.
        files: what was read for it, as the files were before that.
    """

    digest: str
    files: Mapping[Path, State]

    def unchanged(self) -> bool:
        """True where no file was touched since; else the digest may be of something else."""
        return all(path.is_file() and _state(path) == was for path, was in self.files.items())


def find_origin(
    model: str,
    read: Sequence[Path] | None,
    schedule: Schedule,
    options: Mapping[str, object],
    others: Mapping[str, Schedule] | None = None,
) -> Origin | None:
    """The origin of what ``cachegraph compile`` makes, or None where it cannot be told for sure.

    Args:
        model: as on the command line.
        read: the files that hold all of it: :func:`cachegraph.compiler.sources.model_files`.
        schedule: what is asked for.
        options: all else that tells what is made, as plain data.
        others: the schedules of an artifact of several plans, by name.
    """
    if read is None:
        return None
    asked = [schedule, *(others or {}).values()]
    given = [*read, *(file for one in asked for file in one.policy.files().values())]
    files = {file: _state(file) for file in given}
    code, around = surroundings()
    if any(max(state[:2]) / 1e9 > BEGAN - _CLOCK for state in code.values()):
        return None  # what was imported may be an older version of it
    described = {
        "model": [file.suffix for file in read] or model,  # files may be moved
        "schedule": schedule.to_yaml(),
        "others": {name: one.to_yaml() for name, one in (others or {}).items()},
        "options": dict(options),
        "given": [content_digest(file) for file in given],
        **around,
    }
    text = json.dumps(described, sort_keys=True)
    return Origin(hashlib.sha256(text.encode()).hexdigest(), {**files, **code})


@cache  # a process goes on with the code that it imported
def surroundings() -> tuple[Mapping[Path, State], Mapping[str, object]]:
    """The files of the package as they were before they were read; all that nobody asks for."""
    files = {file: _state(file) for file in sorted(_code())}
    metadata = [one.metadata for one in distributions()]
    return files, {
        "code": {str(file.relative_to(_PACKAGE)): content_digest(file) for file in files},
        "packages": sorted((one["Name"], one["Version"]) for one in metadata),
        "torch": [torch.__version__, torch.version.git_version],
        "python": sys.version,
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compiler": compiler_settings(),
    }


def content_digest(path: Path) -> str:
    """SHA-256 over those of a file's pieces, which all cores read: a second for a few gigabytes."""

    def piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_PIECE)).digest()

    size = path.stat().st_size
    starts = range(0, size, _PIECE)
    if len(starts) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pieces = list(pool.map(piece, starts))
    else:
        pieces = list(map(piece, starts))
    return hashlib.sha256(b"".join((*pieces, str(size).encode()))).hexdigest()


def _code() -> Iterator[Path]:
    """Every file of the package, the shipped model among them."""
    for folder, folders, names in os.walk(_PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(folder, name) for name in names)


def _state(path: Path) -> State:
    """Differs whenever a file was written to or replaced."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
