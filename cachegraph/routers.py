"""Router checkpoints and masks: which attn and mlp of each block are run at which step.

Sources: horseee/learning-to-cache, ``DiT/models/router_models.py:161-170`` and
``dynamic_models.py:238-312``; ModelTC/HarmoniCa, ``dynamic_models.py:284, 330-354``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from .errors import InputError

_KEY = re.compile(r"(\d+)\.prob")
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Mask:
    """A mask over all steps.

    Attributes:
        attn: ``[step][block]``, True where attention is run; step 0 is the first executed.
        mlp: the same for the mlp.
    """

    attn: tuple[tuple[bool, ...], ...]
    mlp: tuple[tuple[bool, ...], ...]

    @property
    def steps(self) -> int:
        """Model calls per trajectory."""
        return len(self.attn)

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return len(self.attn[0])

    def runs(self, steps: list[int] | None = None) -> tuple[int, int]:
        """How many attention and mlp runs remain, over the given steps or all."""
        chosen = range(self.steps) if steps is None else steps
        return sum(sum(self.attn[s]) for s in chosen), sum(sum(self.mlp[s]) for s in chosen)


def read_router(path: Path, threshold: float, semantics: str) -> Mask:
    """The mask that a router checkpoint stands for, or one written by :func:`mask_to_yaml`.

    Router index i is step ``T - 1 - i``. Entry 2l of a router is the attention of block l, 2l + 1
    its mlp; what scores ``sigmoid(prob) > threshold`` is run. With ``l2c`` semantics steps of an
    odd index are run as a whole; with ``harmonica`` the mask rules every step.

    Args:
        path: ``.pt`` checkpoint of Learning-to-Cache or HarmoniCa (also the bare state dict of
            their U-ViT), or a YAML or JSON mask.
        threshold: 0 to 1; has no meaning for a mask.
        semantics: ``l2c`` or ``harmonica``; has no meaning for a mask.

    Raises:
        InputError: the file is neither.
    """
    if path.suffix not in _CHECKPOINTS:
        return _read_mask(path)
    probabilities = _read_checkpoint(path)
    rows = []
    for index in range(len(probabilities) - 1, -1, -1):  # the first step has the largest index
        chosen = (torch.sigmoid(probabilities[index].float()) > threshold).tolist()
        whole = semantics == "l2c" and index % 2 == 1
        rows.append([True] * len(chosen) if whole else chosen)
    return Mask(
        attn=tuple(tuple(row[0::2]) for row in rows), mlp=tuple(tuple(row[1::2]) for row in rows)
    )


def mask_to_yaml(mask: Mask, comment: str) -> str:
    """The mask as text to review: a row a step, a character a block, 1 = run, 0 = reuse."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"steps: {mask.steps}", f"depth: {mask.depth}", "rows:  # step 0 first"]
    for attn, mlp in zip(mask.attn, mask.mlp, strict=True):
        lines.append(f'  - {{attn: "{_digits(attn)}", mlp: "{_digits(mlp)}"}}')
    return "\n".join(lines) + "\n"


def _digits(row: tuple[bool, ...]) -> str:
    return "".join("1" if run else "0" for run in row)


def _read_checkpoint(path: Path) -> list[torch.Tensor]:
    try:
        # Published routers were saved with the command line's Namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            "the router cannot be read",
            place=str(path),
            expected="a checkpoint with tensors only",
            found=str(error).splitlines()[0],
        ) from error
    table = content.get("routers", content) if isinstance(content, Mapping) else {}
    found: dict[int, torch.Tensor] = {}
    for key, value in table.items() if isinstance(table, Mapping) else ():
        match = _KEY.fullmatch(str(key))
        if match and isinstance(value, torch.Tensor):
            found[int(match[1])] = value.flatten()
    lengths = {len(value) for value in found.values()}
    if not found or set(found) != set(range(len(found))) or len(lengths) != 1:
        raise _not_a_router(path, table)
    if lengths.pop() % 2:
        raise _not_a_router(path, table)
    return [found[i] for i in range(len(found))]


def _not_a_router(path: Path, table: Any) -> InputError:
    keys = list(table)[:4] if isinstance(table, Mapping) else type(table).__name__
    return InputError(
        "not a router",
        place=str(path),
        expected="tensors '0.prob', '1.prob', ... of one even length, one a step",
        found=str(keys),
    )


def _read_mask(path: Path) -> Mask:
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError("the mask cannot be read", place=str(path), found=str(error)) from error
    rows = content.get("rows") if isinstance(content, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(
            "not a mask",
            place=str(path),
            expected="rows of {attn: '0110...', mlp: '1011...'}, one a step",
        )
    parsed = {
        kind: [_parse_row(path, i, row, kind) for i, row in enumerate(rows)]
        for kind in ("attn", "mlp")
    }
    lengths = {len(row) for kind in parsed.values() for row in kind}
    if len(lengths) != 1:
        raise InputError("rows of different lengths", place=str(path), found=str(sorted(lengths)))
    return Mask(tuple(parsed["attn"]), tuple(parsed["mlp"]))


def _parse_row(path: Path, index: int, row: Any, kind: str) -> tuple[bool, ...]:
    text = row.get(kind) if isinstance(row, Mapping) else None
    digits = "".join(map(str, text)) if isinstance(text, list) else text
    if not isinstance(digits, str) or not digits or set(digits) - {"0", "1"}:
        raise InputError(
            f"row {index} has no list of 0 and 1 for {kind!r}",
            place=str(path),
            expected="such as {attn: '0110', mlp: '1011'}",
            found=repr(row)[:60],
        )
    return tuple(digit == "1" for digit in digits)
