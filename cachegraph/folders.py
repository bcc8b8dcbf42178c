"""Folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTEMPTY
from pathlib import Path

from .errors import ArtifactError, InputError, out_of_memory

_ANOTHER = "choose another path"
_NO_SPACE = "free some space, or choose another path"
_NO_MEMORY = "end other programs, or use a machine with more of it"
_LINUX = sys.platform == "linux"
_HERE, _EXCHANGE = -100, 2  # of renameat2: relative to the current folder; exchange both

_log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: in ``$CACHEGRAPH_CACHE``, else ``~/.cache/cachegraph``.

    Args:
        name: of the folder in it, which need not exist; :func:`make_folder` makes it.

    Raises:
        InputError: nobody said where, and there is no home folder.
    """
    try:
        root = os.environ.get("CACHEGRAPH_CACHE") or Path.home() / ".cache" / "cachegraph"
    except RuntimeError as error:
        raise InputError(
            "there is no home folder to keep compiled graphs in",
            found=str(error),
            remedy="set CACHEGRAPH_CACHE to a folder of yours",
        ) from error
    return Path(root) / name


def own_cache(name: str) -> Path:
    """Such a folder, made where there is none; what lies there is run, so it is ours alone.

    Raises:
        InputError: it cannot be made, or somebody else may write to it.
    """
    folder = make_folder(cache_folder(name))
    with writing(folder):
        state = folder.stat()
    if os.name == "posix" and (state.st_uid != os.geteuid() or state.st_mode & stat.S_IWOTH):
        raise InputError(
            "others may write to the folder of compiled code, which is run",
            place=str(folder),
            expected=f"a folder of user {os.geteuid()} that others cannot write to",
            found=f"user {state.st_uid}, {stat.filemode(state.st_mode)}",
            remedy="remove it or change that, or set CACHEGRAPH_CACHE to a folder of yours",
        )
    return folder


def record_content(path: Path) -> None:
    """Note down what a file holds, before it takes its place under the same name."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(digest)


def is_as_recorded(path: Path) -> bool:
    """Whether a file is there and holds what was noted down."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return path.with_name(f"{path.name}.sha256").read_text() == digest
    except (OSError, UnicodeDecodeError):
        return False


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
    try:
        if not (found := _problem(folder)):
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
    found, foreign = "", False
    try:
        if _is_there(target):
            foreign = not (target / mark).is_file()
        else:
            found = _problem(target.parent)
    except OSError as error:
        found = error.strerror or repr(error)
    if foreign:
        what = f"the output exists and is no {what}"
        raise ArtifactError(what, place=str(target), remedy="choose another path or remove it")
    if found:
        raise ArtifactError(
            "the output cannot be written", place=str(target), found=found, remedy=_ANOTHER
        )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write to, which takes its place when all went well.

    It is on the disk then. Several may write to one place at a time; the last one to end stays.
    What writers that were killed have left beside it is removed, and told in the log.

    Raises:
        InputError: the folder that ``target`` is in cannot be written to.
        ArtifactError: writing failed, such as on a full disk; at ``target`` all is as it was.
    """
    place = Path(os.path.realpath(target))  # a link stays one
    make_folder(place.parent, _ANOTHER)
    partial = _beside(place, "partial")
    try:
        _sweep(place)
        partial.mkdir()
        yield partial
        _sync(partial)
        _swap(partial, place)
        _sync_folder(place.parent)
    except OSError as error:
        raise ArtifactError(
            "the output cannot be written",
            place=str(error.filename or target),
            found=error.strerror or str(error),
            remedy=_NO_SPACE,
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ArtifactError(
            "not enough memory to write the output", place=str(target), remedy=_NO_MEMORY
        ) from error
    finally:
        _remove(partial)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong with writing to a file or folder is told with its path.

    Raises:
        InputError: writing failed, such as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            "cannot be written",
            place=str(error.filename or path),
            found=error.strerror or str(error),
            remedy=_NO_SPACE,
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when all went well.

    It is on the disk then; a process that is killed leaves what was there, and a hidden file that
    ends in ``.partial``.

    Raises:
        InputError: see :func:`writing`.
    """
    partial = _beside(path, "partial")
    try:
        with writing(path):
            yield partial
            _sync_path(partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _is_there(path: Path) -> bool:
    """Whether there is something, as far as one may look; that no disk could say is no answer."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    return True


def _problem(folder: Path) -> str:
    """Why a folder cannot be made or written to; empty where it seems that it can."""
    whole = folder.absolute()
    above = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if not above.is_dir():
        return f"a file: {above}"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"no permission: {above}"


def _beside(target: Path, end: str) -> Path:
    """A hidden name that no other writer has, and that says whose it is."""
    name = f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{end}"
    return target.parent / name


def _host() -> str:
    return re.sub(r"\W", "_", platform.node())


def _sweep(target: Path) -> None:
    """Remove what dead processes of this machine have left; put back what they took away."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)-[0-9a-f]+\.(partial|old)")
    for path in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if not found or _lives(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            _log.warning("putting back what an interrupted process took away: %s", target)
            path.rename(target)
        else:
            _log.warning("removing what an interrupted process left: %s", path)
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder as far as that can be done; the next writer finds what is left of it."""
    with suppress(OSError):  # rmtree ignores most errors, but not that of fstat
        shutil.rmtree(folder, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Wait until a folder is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_path(os.path.join(parent, name))
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        _sync_path(folder)


def _sync_path(path: str | Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _swap(partial: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one, if there is one, in one go.

    Where the system has no exchange, nothing is there for a moment. What was there lies under the
    name of the finished one afterwards.
    """
    while not _exchange(partial, target):
        old = _beside(target, "old")
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException as error:
            # Another writer may have put its own there in the meantime.
            if not isinstance(error, OSError) or error.errno not in (ENOTEMPTY, EEXIST):
                with suppress(OSError):
                    old.rename(target)
                raise
            _remove(old)
        else:
            with suppress(FileNotFoundError):
                old.rename(partial)
            return


def _exchange(partial: Path, target: Path) -> bool:
    """Exchange two folders; False where the system cannot, or one of them is not there."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _LINUX else None
    if rename is None:
        return False
    names = os.fsencode(partial), os.fsencode(target)
    done: int = rename(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    return done == 0
