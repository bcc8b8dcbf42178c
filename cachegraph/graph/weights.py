"""Weights: stored once for all variants, written and read without copies."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from cachegraph.errors import ArtifactError, SessionError, out_of_memory
from cachegraph.spec import version_of

# Bytes. Matrix products round differently on data that is not aligned as torch aligns its own, so
# a loaded model would not compute bit for bit what the compiled one does.
_ALIGNMENT = 64
WEIGHTS_FILE = "weights.safetensors"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SAMPLED = 16  # elements of a weight that are compared before and after
_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


def slice_name(name: str, start: int, stop: int) -> str:
    """The name of rows ``start`` to ``stop`` of a weight, which may be some rows itself."""
    base, first, _ = _rows(name)
    return f"{base}[{first + start}:{first + stop}]"


def stored_weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight of a name, or rows of it as a view where the name says so.

    Raises:
        KeyError: no such weight.
    """
    base, start, stop = _rows(name)
    return weights[base].detach()[start:stop] if stop else weights[name]


def is_stored(weights: Mapping[str, Tensor], name: str) -> bool:
    """True where the name is that of a weight, or of rows of one."""
    return _rows(name)[0] in weights


def add_weight(module: nn.Module, name: str) -> None:
    """Give a module rows of a weight that it has, under the name that says which."""
    base, start, stop = _rows(name)
    path, _, leaf = base.rpartition(".")
    holder = module.get_submodule(path)
    rows = getattr(holder, leaf).detach()[start:stop]
    holder.register_buffer(name.removeprefix(f"{path}."), rows)


def relink(module: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
    """Let a graph take other tensors for its weights of the same names."""
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if not is_stored(weights, name):
            continue
        path, _, _ = _rows(name)[0].rpartition(".")
        holder, leaf = module.get_submodule(path), name.removeprefix(f"{path}.")
        tensor = stored_weight(weights, name)
        for kind in (holder._parameters, holder._buffers, vars(holder)):
            kind.pop(leaf, None)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor)


def _rows(name: str) -> tuple[str, int, int]:
    """A weight's name and the rows of it; 0 to 0 where it is whole."""
    match = _SLICE.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else (name, 0, 0)


Stamp = tuple[tuple[int, int, int], ...]


def stamp(weights: Mapping[str, Tensor]) -> Stamp:
    """Where weights lie, how often each was written to, and a few numbers of each.

    Writes through ``.data``, with which LoRAs are fused, are not counted by torch.
    See :func:`refuse_changed`.
    """
    tensors = list(weights.values())
    places = ((w.data_ptr(), version_of(w)) for w in tensors)
    return tuple((*at, told) for at, told in zip(places, _samples(tensors), strict=True))


def _samples(tensors: Sequence[Tensor]) -> list[int]:
    """One number for a few elements of each tensor; a device is waited for once a dtype."""
    found: dict[tuple[torch.device, torch.dtype, int], dict[int, Tensor]] = {}
    for index, tensor in enumerate(tensors):
        count, start = min(_SAMPLED, tensor.numel()), tensor.storage_offset()
        step = tensor.numel() // max(count, 1)
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if count and not tensor.is_meta and start + (count - 1) * step < held:
            taken = tensor.detach().as_strided((count,), (step,), start)
            found.setdefault((tensor.device, tensor.dtype, count), {})[index] = taken
    numbers = [0] * len(tensors)
    for alike in found.values():
        taken = torch.stack([*alike.values()]).view(torch.uint8).long()
        told = taken @ torch.arange(1, taken.shape[1] + 1, device=taken.device)
        for index, number in zip(alike, told.tolist(), strict=True):
            numbers[index] = number
    return numbers


def refuse_changed(weights: Mapping[str, Tensor], before: Stamp, *, moved: bool = False) -> None:
    """Refuse weights that were written to or replaced since.

    Args:
        weights: name -> tensor.
        before: their stamp when they were compiled or loaded.
        moved: they may lie elsewhere: offloading gives them other memory for every call.

    Raises:
        SessionError: names the first one.
    """
    compared = slice(1, None) if moved else slice(None)  # the place comes first
    for name, now, was in zip(weights, stamp(weights), before, strict=True):
        if now[compared] != was[compared]:
            raise SessionError(
                f"weight {name!r} was changed after it was compiled",
                expected="the weights of a compiled loop as they were then",
                remedy="compile the model again; an artifact that was saved before is untouched",
            )


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


def save_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write a safetensors file whose tensors are aligned, so that they can be mapped into memory.

    safetensors' own writer aligns to 8 bytes. Tensors whose size is no multiple of the alignment
    come last; a reader that minds has to copy those.

    Args:
        weights: without aliases; views into the storage of another tensor are fine.
        path: the file to write.

    Returns:
        Name -> SHA-256 of the tensor's bytes: of what was to be written, so that a disk which did
        not take it cannot have it signed.

    Raises:
        ArtifactError: a weight on the meta device, or of a dtype that the format does not have.
        OSError: it cannot be written.
    """
    head, starts = _header(weights)
    digests = {}
    with path.open("wb") as file:
        file.write(head)
        for name in starts:
            plain = weights[name].detach().cpu().contiguous().reshape(-1)
            content = plain.view(torch.uint8).numpy().data
            digests[name] = hashlib.sha256(content).hexdigest()
            file.write(content)  # numpy's tofile does not tell that a disk is full
    return dict(sorted(digests.items()))


def weight_offsets(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> byte in the file of weights where a tensor begins; tied weights share theirs.

    Args:
        weights: with aliases, as an artifact has them.
    """
    stored, aliases = distinct(weights)
    head, starts = _header(stored)
    offsets = {name: len(head) + start for name, start in starts.items()}
    return offsets | {alias: offsets[name] for alias, name in aliases.items()}


def place_of(
    name: str, weights: Mapping[str, Tensor], offsets: Mapping[str, int]
) -> tuple[int, Tensor]:
    """Where a weight, or rows of one, begin in the file of weights, and the tensor itself.

    Args:
        name: of the weight, or of rows of it.
        weights: with aliases.
        offsets: from :func:`weight_offsets`.
    """
    base, start, _ = _rows(name)
    whole = weights[base]
    row = whole[0].nbytes if start else 0
    return offsets[base] + start * row, stored_weight(weights, name)


def _header(weights: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and name -> first byte of each tensor behind it, in order."""
    ordered = sorted(weights.items(), key=lambda item: (item[1].nbytes % _ALIGNMENT > 0, item[0]))
    header, starts, end = {}, {}, 0
    for name, tensor in ordered:
        if tensor.is_meta or tensor.dtype not in _NAMES:
            raise ArtifactError(
                "a weight cannot be written",
                place=name,
                expected="a model whose weights are loaded, in a dtype of safetensors",
                found=f"{tensor.dtype} on {tensor.device}",
            )
        start, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts


def load_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read a safetensors file; on the CPU the file is mapped into memory.

    Raises:
        ArtifactError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ArtifactError(
            "not enough memory for the weights",
            place=str(path),
            expected=f"{path.stat().st_size} bytes on {device}",
            found=str(error).partition("\n")[0],
            remedy="free some memory, or load them on another device",
        ) from error


def tensor_digests(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of the bytes of each tensor of a safetensors file; all cores share the work.

    About 0.3 s for a gigabyte on two cores.

    Raises:
        ArtifactError: the file is missing, truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            content = memoryview(data)
            ranges = {
                k: [start + at for at in entry["data_offsets"]] for k, entry in header.items()
            }

            def digest(bounds: list[int]) -> str:
                return hashlib.sha256(content[bounds[0] : bounds[1]]).hexdigest()

            with content, ThreadPoolExecutor(os.cpu_count()) as pool:
                return dict(zip(ranges, pool.map(digest, ranges.values()), strict=True))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def verify_weights(path: Path, expected: Mapping[str, str]) -> None:
    """Refuse a file of weights that does not hold what was written.

    Args:
        path: of the file.
        expected: name -> SHA-256, from :func:`tensor_digests`.

    Raises:
        ArtifactError: names the first tensor that differs.
    """
    found = tensor_digests(path)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise ArtifactError(
                f"the weight {name!r} is damaged",
                place=str(path),
                expected="the tensor as it was written" if name in expected else "no such tensor",
                found="other contents" if name in found else "no such tensor",
                remedy="compile the artifact again",
            )


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        "the weights cannot be read",
        place=str(path),
        found=str(error),
        remedy="compile the artifact again",
    )


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
