"""Files that hold something else than their name says, as downloads that went wrong do."""

from __future__ import annotations

from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml")


def mistaken(path: Path) -> tuple[str, str]:
    """What a file is in place of itself, and what to do; empty texts where nothing tells."""
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except (OSError, ValueError):  # ValueError: a path that no file system can have
        return "", ""  # whoever reads it says why it cannot be
    if not head:
        return "an empty file", "get the file again"
    if head.startswith(_POINTER):
        return "a git-lfs pointer, which stands for the file", "fetch the file itself: git lfs pull"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        remedy = "download the file itself: the address was that of its page, or needs a login"
        return "a web page", remedy
    return "", ""
