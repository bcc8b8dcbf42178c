"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTEMPTY
from pathlib import Path

from .errors import ArtifactError, InputError

_ANOTHER = "choose another path"


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: in ``$CACHEGRAPH_CACHE``, else ``~/.cache/cachegraph``.

    Args:
        name: of the folder in it, which need not exist; :func:`make_folder` makes it.
    """
    root = os.environ.get("CACHEGRAPH_CACHE") or Path.home() / ".cache" / "cachegraph"
    return Path(root) / name


def make_folder(folder: Path, remedy: str = "set CACHEGRAPH_CACHE to a folder of yours") -> Path:
    """Make a folder to write to, and those above it, where there is none.

    Args:
        folder: to make.
        remedy: what to do where that fails.

    Returns:
        The folder.

    Raises:
        InputError: it cannot be made or written to.
    """
    found = _problem(folder)
    try:
        if not found:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = error.strerror or repr(error)
    if found:
        raise InputError(
            "the folder cannot be written to", place=str(folder), found=found, remedy=remedy
        )
    return folder


def refuse_foreign(target: Path, mark: str, what: str) -> None:
    """Refuse to write where that must fail, or replace what is something else.

    Args:
        target: where something is to be written.
        mark: the file that every such folder holds.
        what: what such a folder is called.

    Raises:
        ArtifactError: ``target`` exists without that file, or cannot be made.
    """
    if os.path.exists(target):  # unlike Path.exists, no error where one may not look
        if not (target / mark).is_file():
            what = f"the output exists and is no {what}"
            raise ArtifactError(what, place=str(target), remedy="choose another path or remove it")
    elif found := _problem(target.parent):
        raise ArtifactError(
            "the output cannot be written", place=str(target), found=found, remedy=_ANOTHER
        )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write to, which takes its place when all went well.

    Several may write to one place at a time; the last one to end stays.

    Raises:
        InputError: the folder that ``target`` is in cannot be written to.
    """
    make_folder(target.parent, _ANOTHER)
    partial = _beside(target, "partial")
    partial.mkdir()
    try:
        yield partial
        _swap(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _problem(folder: Path) -> str:
    """Why a folder cannot be made or written to; empty where it seems that it can."""
    whole = folder.absolute()
    above = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if not above.is_dir():
        return f"a file: {above}"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"no permission: {above}"


def _beside(target: Path, end: str) -> Path:
    """A hidden name that no other writer has."""
    return target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{end}"


def _swap(partial: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, if there is one."""
    placed = False
    while not placed:
        old = _beside(target, "old")
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            partial.rename(target)
            placed = True
        except BaseException as error:
            # Another writer may have put its own there in the meantime.
            if not isinstance(error, OSError) or error.errno not in (ENOTEMPTY, EEXIST):
                with suppress(OSError):
                    old.rename(target)
                raise
        if old.exists():
            shutil.rmtree(old)
