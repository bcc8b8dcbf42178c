"""Weights: stored once for all variants, written and read without copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtifactError


def distinct(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights without the names that stand for the same tensor as another one (tied weights).

    Returns:
        name -> tensor to store, and alias -> name it stands for.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(weights.items()):
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.data_ptr() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor
    return stored, aliases


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    Args:
        weights: without aliases; a view into another tensor's storage is copied first, as the
            format wants every tensor to own its bytes.
        path: the file to write.

    Raises:
        ArtifactError: a weight on the meta device has nothing to write.
    """
    owners: set[int] = set()
    tensors = {}
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise ArtifactError(
                "the weights hold no numbers",
                place=name,
                expected="a model whose weights are loaded",
                found="a tensor on the meta device",
            )
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in owners or tensor.untyped_storage().nbytes() != tensor.nbytes
        tensors[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
        owners.add(storage)
    path.touch()
    readable = path.stat().st_mode  # safetensors makes a file that only its owner can read
    save_file(tensors, path)
    path.chmod(readable)


def load_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read a safetensors file; on the CPU the file is mapped into memory.

    Raises:
        ArtifactError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            "the weights cannot be read",
            place=str(path),
            found=str(error),
            remedy="compile the artifact again",
        ) from error
