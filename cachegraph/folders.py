"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: in ``$CACHEGRAPH_CACHE``, else ``~/.cache/cachegraph``.

    Args:
        name: of the folder in it, which need not exist.
    """
    root = os.environ.get("CACHEGRAPH_CACHE") or Path.home() / ".cache" / "cachegraph"
    return Path(root) / name


def refuse_foreign(target: Path, mark: str, what: str) -> None:
    """Refuse to replace a file or folder that is something else than what is to be written.

    Args:
        target: where something is to be written.
        mark: the file that every such folder holds.
        what: what such a folder is called.

    Raises:
        ArtifactError: ``target`` exists without that file.
    """
    if target.exists() and not (target / mark).is_file():
        raise ArtifactError(
            f"the output exists and is no {what}",
            place=str(target),
            remedy="choose another path or remove it",
        )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write to, which takes its place when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _swap(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
