"""Weights that lie in several files, as an index beside them says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cachegraph.downloads import mistaken
from cachegraph.errors import ModelError

from .checkpoint import SUFFIXES, list_names, read_tensors

INDEX = ".index.json"
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")


def is_weights(path: Path) -> bool:
    """True for names of weights files, or of an index of some."""
    return path.suffix in SUFFIXES or path.name.endswith(INDEX)


def weights_files(path: Path) -> list[Path]:
    """All files that hold the weights of one: itself, and what it is the index of.

    Raises:
        ModelError: an index that cannot be read.
    """
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_shards(path).values())))]


def read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file, or of all that an index lists; see :func:`.checkpoint.read_tensors`.

    Raises:
        ModelError: a file is missing or damaged, holds something else, or is one of several.
    """
    if not path.name.endswith(INDEX):
        _refuse_part(path)
        return read_tensors(path)
    listed = _shards(path)
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in weights_files(path)[1:]:
        tensors, said = read_tensors(shard)
        state |= tensors
        metadata |= said
        wanted = {name for name, file in listed.items() if file == shard.name}
        if wanted != tensors.keys():
            raise ModelError(
                "the file and its index do not fit together",
                place=str(shard),
                expected=f"the {len(wanted)} tensors that {path.name} lists",
                found=list_names(sorted(wanted ^ tensors.keys())) + " in one of them only",
                remedy="get all files anew, of one version",
            )
    return state, metadata


def _shards(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file."""
    if not path.is_file():
        raise ModelError("there is no such weights file", place=str(path))
    found, remedy = mistaken(path)
    listed = None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        found = found or f"{type(error).__name__}: {error}"
    plain = isinstance(listed, dict) and all(
        isinstance(file, str) and Path(file).name == file and Path(file).suffix in SUFFIXES
        for file in listed.values()
    )
    if not plain or not listed:
        raise ModelError(
            "not an index of weights files",
            place=str(path),
            expected="the key weight_map: for each tensor the name of a file beside it",
            found=found,
            remedy=remedy,
        )
    return dict(listed)


def _refuse_part(path: Path) -> None:
    """Refuse one file of several, with the name of their index."""
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found[2]) < 2:
        return
    index = path.with_name(f"{found[1]}{found[3]}{INDEX}")
    raise ModelError(
        f"the file holds one part of {int(found[2])} of the weights",
        place=str(path),
        expected="the index of all parts",
        remedy=f"give {index}" if index.is_file() else f"get {index.name} and the other parts",
    )
