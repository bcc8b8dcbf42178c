"""Reads the tensors of a weights file, and nothing that could run code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cachegraph.downloads import mistaken
from cachegraph.errors import ModelError, out_of_memory

SUFFIXES = (".pt", ".pth", ".safetensors", ".bin")
NESTED_KEYS = ("ema", "model", "state_dict")  # in order of preference: averages sample better
SHOWN_NAMES = 5

# What torch.load has been seen to raise for files with a few changed bytes; it promises none.
DAMAGED = (
    *(pickle.UnpicklingError, EOFError, OSError, AssertionError, AttributeError),
    *(LookupError, RuntimeError, TypeError, ValueError, MemoryError),
)


def list_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = iter(names)
    text = ", ".join(islice(names, SHOWN_NAMES))
    more = sum(1 for _ in names)
    return f"{text} and {more} more" if more else text


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file by name, and its metadata.

    Tensors are mapped from disk where the format allows it, so reading takes no second copy.

    Args:
        path: ends in one of ``SUFFIXES``; all but ``.safetensors`` are what ``torch.save`` wrote: a
            state dict, plain or under one of ``NESTED_KEYS``.

    Returns:
        Tensors on the CPU by name; metadata by key, empty unless the file is ``.safetensors``.

    Raises:
        ModelError: the file is missing or damaged, or holds something else.
    """
    if not path.is_file():
        raise ModelError("there is no such weights file", place=str(path))
    refuse_mistaken(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _unnest(read_pickle(path), path), {}


def refuse_mistaken(path: Path) -> None:
    """Refuse a file that something else was downloaded to.

    Raises:
        ModelError: says what it is, and how to get the file itself.
    """
    found, remedy = mistaken(path)
    if found:
        raise ModelError("not a readable model file", place=str(path), found=found, remedy=remedy)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "not a readable safetensors file", place=str(path), found=str(error)
        ) from error


def read_pickle(path: Path) -> object:
    """What ``torch.save`` wrote, where that is only tensors in plain containers.

    Raises:
        ModelError: it is damaged or holds something else.
    """
    try:
        # published training scripts keep their command line, a Namespace, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about versions of pickle
            # the format before torch 1.6 is no zip archive and cannot be mapped
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGED as error:
        if out_of_memory(error):
            raise ModelError(
                "not enough memory to read the weights",
                place=str(path),
                found=str(error).partition("\n")[0],
                remedy="free some memory, or store them in a smaller dtype",
            ) from error
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None:
            raise ModelError(
                "not a readable weights file",
                place=str(path),
                found=_what_failed(error),
                remedy="load it with the code that wrote it and save only its weights: "
                "torch.save(model.state_dict(), 'weights.pt')",
            ) from error
        raise ModelError(
            "the file holds pickled Python objects, which can run code when they are read",
            place=str(path),
            expected="a state dict: names and tensors",
            found=f"the class {foreign[1]}",
            remedy="where you trust the file, load it with the code that wrote it and save only "
            "its weights: torch.save(model.state_dict(), 'weights.pt')",
        ) from error


def _what_failed(error: Exception) -> str:
    """What torch says, but for its advice to run whatever code the file brings along."""
    text = str(error)
    for form in ("TorchScript", ".tar"):
        if form in text:
            return f"an archive of another kind ({form})"
    reason = re.search(r"WeightsUnpickler error:\s*(.*)", text)
    if reason is None and "weights_only" not in text:
        reason = re.search(r"(.*)", text)
    return f"{type(error).__name__}: {reason[1]}" if reason and reason[1] else type(error).__name__


def _unnest(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint."""
    nested = content
    if isinstance(content, Mapping):
        inner = (content[key] for key in NESTED_KEYS if isinstance(content.get(key), Mapping))
        nested = next(inner, content)
    if not isinstance(nested, Mapping):
        raise ModelError("no state dict in the file", place=str(path), found=type(nested).__name__)
    tensors = {k: v for k, v in nested.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if len(tensors) < len(nested):
        raise ModelError(
            "not all entries of the state dict are named tensors",
            place=str(path),
            expected=f"names and tensors, or a state dict under {', '.join(NESTED_KEYS)}",
            found=list_names(str(k) for k in nested if k not in tensors),
        )
    return tensors
