"""Folders that are there whole or not at all, and those that cannot be written to."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegraph import folders
from cachegraph.errors import ArtifactError, CachegraphError, InputError
from cachegraph.folders import (
    cache_folder,
    is_as_recorded,
    make_folder,
    own_cache,
    record_content,
    refuse_foreign,
    writing,
    written_whole,
)

WRITERS = 4


def test_several_may_write_to_one_place(tmp_path: Path) -> None:
    target, together = tmp_path / "out", threading.Barrier(WRITERS)

    def write(number: int) -> None:
        for _ in range(50):
            together.wait(timeout=5)
            with written_whole(target) as folder:
                for name in ("a", "b"):
                    (folder / name).write_text(str(number))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    assert list(tmp_path.iterdir()) == [target]
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert (target / "a").read_text() == (target / "b").read_text()


@pytest.mark.parametrize("older", [False, True])
def test_another_writer_in_the_midst_of_a_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """It comes between the rename of the older folder and that of the new one."""
    target, rename, rivals = tmp_path / "out", Path.rename, iter("rival")
    if older:
        target.mkdir()
        (target / "older").touch()

    def overtaken(path: Path, other: Path) -> Path:
        if path.suffix == ".partial" and (rival := next(rivals, None)):
            target.mkdir()
            (target / rival).touch()
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", overtaken)
    with written_whole(target) as folder:
        (folder / "mine").touch()
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_being_written_is_hidden_and_as_others_may_read_it(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with written_whole(tmp_path / "out") as one, written_whole(tmp_path / "out") as other:
        assert one != other
        assert {one.name[:5], other.name[:5]} == {".out."}
        assert {one.suffix, other.suffix} == {".partial"}
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_was_lost_before_the_swap_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(ArtifactError, match="No such file"),
        written_whole(tmp_path / "out") as folder,
    ):
        folder.rmdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def written(target: Path) -> None:
    """As an artifact is."""
    refuse_foreign(target, "mark", "artifact")
    with written_whole(target) as folder:
        (folder / "within").mkdir()
        (folder / "mark").write_text("new")


def test_whichever_look_at_a_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says it, and what lies there is whole."""
    target, left, asked, failing = tmp_path / "out", set(), 0, 0

    def looks(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look(*arguments: Any, **options: Any) -> os.stat_result:
            nonlocal asked
            asked += 1
            if asked == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        return look

    while failing <= asked:
        target.mkdir(exist_ok=True)
        (target / "mark").write_text("old")
        failing, asked = failing + 1, 0
        with monkeypatch.context() as patch:
            for name in ("stat", "lstat", "fstat"):
                patch.setattr(os, name, looks(getattr(os, name)))
            with suppress(CachegraphError):
                written(target)
        left.add((target / "mark").read_text())
    assert failing > 10
    assert left == {"old", "new"}


def test_what_no_disk_could_tell_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").touch()

    def fail(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(ArtifactError, match="cannot be written; found Input/output error"):
        refuse_foreign(tmp_path, "mark", "artifact")


def test_a_file_in_place_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CACHEGRAPH_CACHE", str(file))
    message = f"{file}/aoti: the folder cannot be written to; found a file: {file}; set CACHEGRAPH_"
    with pytest.raises(InputError, match=message):
        make_folder(cache_folder("aoti"))
    with (
        pytest.raises(InputError, match=r"found a file.*; choose another path"),
        written_whole(file / "out"),
    ):
        pass
    message = f"{file}/a/out: the output cannot be written; found a file: {file}; choose another"
    with pytest.raises(ArtifactError, match=message):
        refuse_foreign(file / "a" / "out", "mark", "artifact")
    monkeypatch.setenv("CACHEGRAPH_CACHE", str(tmp_path / "new"))
    assert make_folder(cache_folder("aoti")).is_dir()


def no_permission(path: Path) -> bool:
    raise PermissionError(path)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.os, "access", lambda *_: False)  # root may do anything
    for folder in (tmp_path, tmp_path / "new" / "newer"):
        with pytest.raises(InputError, match=f"{folder}: .* found no permission: {tmp_path}; set"):
            make_folder(folder)
        with pytest.raises(ArtifactError, match=f"found no permission: {tmp_path}; choose"):
            refuse_foreign(folder / "out", "mark", "artifact")
    (tmp_path / "mark").touch()
    with monkeypatch.context() as patch:  # as where one may not even look
        patch.setattr(Path, "exists", no_permission)
        refuse_foreign(tmp_path, "mark", "artifact")  # nothing need be written where all is there


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/nnn.*found File name too long; choose"):
        make_folder(tmp_path / ("n" * 300), "choose another path")
    assert os.listdir(tmp_path) == []


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHEGRAPH_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    with pytest.raises(InputError, match=r"no home folder .*; set CACHEGRAPH_CACHE to a folder of"):
        cache_folder("aoti")


def write_text(path: Path) -> None:
    with writing(path):
        path.write_text("x")


def write_through(target: Path, link: Path) -> None:
    with written_whole(target) as folder:
        (folder / "file").symlink_to(link)
        (folder / "file").write_text("x")


def run_out_of_memory(target: Path) -> None:
    with written_whole(target):
        torch.empty(2**55)


def test_others_may_not_write_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEGRAPH_CACHE", str(tmp_path))
    folder = own_cache("aoti")
    assert folder == tmp_path / "aoti"
    folder.chmod(0o777)
    with pytest.raises(InputError, match=r"others may write .* found user \d+, drwxrwxrwx; remove"):
        own_cache("aoti")
    folder.chmod(0o755)
    monkeypatch.setattr(folders.os, "geteuid", lambda: 54321)
    with pytest.raises(InputError, match="expected a folder of user 54321 that others cannot"):
        own_cache("aoti")


def test_contents_are_compared_with_what_was_noted_down(tmp_path: Path) -> None:
    path = tmp_path / "graph.pt2"
    assert not is_as_recorded(path)
    path.write_bytes(b"code")
    assert not is_as_recorded(path)
    record_content(path)
    assert is_as_recorded(path)
    path.write_bytes(b"evil")
    assert not is_as_recorded(path)


def test_a_full_disk_is_told_with_the_path(tmp_path: Path) -> None:
    full, target = Path("/dev/full"), tmp_path / "out"
    if not full.exists():
        pytest.skip("no /dev/full")
    with pytest.raises(InputError, match=r"^/dev/full: cannot be written; found No space left on"):
        write_text(full)
    with pytest.raises(ArtifactError, match=f"{target}: .* found No space left on device; free"):
        write_through(target, full)
    assert not list(tmp_path.iterdir())


def test_no_memory_is_told_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{tmp_path}/out: not enough memory to write"):
        run_out_of_memory(tmp_path / "out")
    assert not list(tmp_path.iterdir())
