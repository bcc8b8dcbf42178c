"""Names of weights as their model has them, without what a wrapper has put before them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cachegraph.errors import ModelError

from .checkpoint import list_names

# Wrappers that may be around any module of a model: torch.compile, FSDP, checkpointing.
_INSIDE = re.compile(r"(?<![^.\n])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_prefix(
    state: Mapping[str, Tensor], marks: Iterable[str], path: Path
) -> dict[str, Tensor]:
    """The weights of a model under their own names, such as ``blocks.0...``.

    Args:
        state: name -> tensor; the names may begin with ``module.``, ``model.diffusion_model.`` or
            whatever else the model was an attribute of.
        marks: names that each known model has, whole or how they begin.
        path: of the file, for messages.

    Raises:
        ModelError: the file holds several models.

    Warns:
        UserWarning: what was left out of the names, and which tensors are of something else.
    """
    cleaned = {_INSIDE.sub("", name): tensor for name, tensor in state.items()}
    if len(cleaned) < len(state):
        cleaned = dict(state)  # two names would be one
    found = {name[: -len(mark)] for mark in marks for name in cleaned if name.endswith(mark)}
    found = {prefix for prefix in found if prefix == "" or prefix.endswith(".")}
    if len(found) > 1 and "" not in found:
        raise ModelError(
            "the file holds several models",
            place=str(path),
            found=f"weights under {list_names(sorted(found))}",
            remedy="save the state dict of one of them alone",
        )
    prefix = min(found, default="")
    plain = {n.removeprefix(prefix): t for n, t in cleaned.items() if n.startswith(prefix)}
    left_out = [*([prefix] if prefix else []), *sorted(set(_INSIDE.findall("\n".join(state))))]
    if left_out:
        words = ", ".join(left_out)
        warnings.warn(f"{path}: names of weights are read without {words}", stacklevel=3)
    if more := [name for name in cleaned if not name.startswith(prefix)]:
        warnings.warn(
            f"{path}: not read, for it is no part of the model: {list_names(more)}", stacklevel=3
        )
    return plain
