"""Router checkpoints and masks: which attn and mlp of each block are run at which step.

Sources: horseee/learning-to-cache, ``DiT/models/router_models.py:161-170``,
``dynamic_models.py:238-312`` and ``U-ViT/libs/uvit_dynamic.py``; ModelTC/HarmoniCa,
``dynamic_models.py:284, 330-354``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachegraph.config.yaml_lines import Source, dotted, read_yaml
from cachegraph.errors import InputError, ModelError, nearest
from cachegraph.folders import writing
from cachegraph.zoo.checkpoint import read_pickle

_KEY = re.compile(r"(\d+)\.prob")
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
_ROW = "such as {attn: '0110', mlp: '1011'}, a digit a block"


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


def router_index(semantics: str, step: int, steps: int) -> int | None:
    """The router that rules a step, or None for a step that is run as a whole.

    - ``l2c`` (Learning-to-Cache on DiT): router i is step ``steps - 1 - i``; odd i are not asked.
    - ``harmonica``: the same numbers; every router but that of the first step is asked.
    - ``uvit`` (Learning-to-Cache on U-ViT): its solver calls the model twice per step of its own;
      router i rules the first call of the i-th of them, counted up, and i = 0 is not asked.
    """
    match semantics:
        case "harmonica":
            return steps - 1 - step if step else None
        case "uvit":
            return step // 2 if step and step % 2 == 0 else None
    index = steps - 1 - step
    return index if index % 2 == 0 else None


def masked_steps(semantics: str, steps: int) -> list[int]:
    """The steps that the routers rule; all others are run as a whole."""
    return [step for step in range(steps) if router_index(semantics, step, steps) is not None]


def runs_text(mask: Mask, semantics: str) -> str:
    """``312 of the 560 modules of 10 masked steps are run: 157 attn, 155 mlp``."""
    ruled = masked_steps(semantics, mask.steps)
    attn, mlp = mask.runs(ruled)
    total = 2 * mask.depth * len(ruled)
    return (
        f"{attn + mlp} of the {total} modules of {len(ruled)} masked steps are run: "
        f"{attn} attn, {mlp} mlp"
    )


def read_router(path: Path, threshold: float, semantics: str) -> Mask:
    """The mask that a router checkpoint stands for, or one written by :func:`mask_to_yaml`.

    Entry 2l of a router is the attention of block l, 2l + 1 its mlp; what scores
    ``sigmoid(prob) > threshold`` is run. :func:`router_index` says which router rules a step.

    Args:
        path: ``.pt`` checkpoint of Learning-to-Cache or HarmoniCa (also the bare state dict of
            their U-ViT), or a YAML or JSON mask.
        threshold: 0 to 1; has no meaning for a mask.
        semantics: ``l2c``, ``harmonica`` or ``uvit``; has no meaning for a mask.

    Raises:
        InputError: the file is neither.
    """
    if path.suffix not in _CHECKPOINTS:
        return _read_mask(path)
    scores = read_scores(path)
    steps, width = len(scores), len(scores[0])
    rows = []
    for step in range(steps):
        index = router_index(semantics, step, steps)
        if index is None:
            rows.append([True] * width)
        else:
            rows.append((torch.sigmoid(scores[index].float()) > threshold).tolist())
    return Mask(
        attn=tuple(tuple(row[0::2]) for row in rows), mlp=tuple(tuple(row[1::2]) for row in rows)
    )


def import_router(path: Path, out: Path, threshold: float = 0.1, semantics: str = "l2c") -> Mask:
    """Write the mask of a router checkpoint as text that can be reviewed and used instead of it.

    Args:
        path: the checkpoint.
        out: a ``.yaml`` file.
        threshold: 0 to 1.
        semantics: ``l2c``, ``harmonica`` or ``uvit``.

    Returns:
        What was written; :func:`runs_text` says how many runs remain.

    Raises:
        InputError: the file is no checkpoint, or ``out`` cannot be written.
    """
    if path.suffix not in _CHECKPOINTS:
        raise InputError(
            "not a router checkpoint", place=str(path), expected=f"one of {', '.join(_CHECKPOINTS)}"
        )
    if out.suffix not in (".yaml", ".yml"):
        raise InputError("masks are written as YAML", place=str(out), expected="a .yaml file")
    mask = read_router(path, threshold, semantics)
    comment = (
        f"The router {path.name} at threshold {threshold:g}, semantics {semantics}.\n"
        f"{runs_text(mask, semantics)}."
    )
    with writing(out):
        out.write_text(mask_to_yaml(mask, comment), encoding="utf-8")
    return mask


def mask_to_yaml(mask: Mask, comment: str) -> str:
    """The mask as text to review: a row a step, a character a block, 1 = run, 0 = reuse."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"steps: {mask.steps}", f"depth: {mask.depth}", "rows:  # step 0 first"]
    for attn, mlp in zip(mask.attn, mask.mlp, strict=True):
        lines.append(f'  - {{attn: "{_digits(attn)}", mlp: "{_digits(mlp)}"}}')
    return "\n".join(lines) + "\n"


def _digits(row: tuple[bool, ...]) -> str:
    return "".join("1" if run else "0" for run in row)


def read_scores(path: Path) -> list[torch.Tensor]:
    """The scores of every router, by its index.

    Args:
        path: a checkpoint of Learning-to-Cache or HarmoniCa.

    Raises:
        InputError: it is none, or holds more than tensors.
    """
    if not path.is_file():
        raise InputError("there is no such file", place=str(path))
    try:
        content = read_pickle(path)
    except ModelError as error:
        raise InputError(
            "the router cannot be read",
            place=str(path),
            expected="a checkpoint with tensors only",
            found=error.found,
        ) from error
    table = content.get("routers", content) if isinstance(content, Mapping) else {}
    found: dict[int, torch.Tensor] = {}
    for key, value in table.items() if isinstance(table, Mapping) else ():
        match = _KEY.fullmatch(str(key))
        if match and isinstance(value, torch.Tensor):
            found[int(match[1])] = value.flatten()
    lengths = {len(value) for value in found.values()}
    one_length = len(lengths) == 1 and max(lengths) > 0 and max(lengths) % 2 == 0
    if not one_length or set(found) != set(range(len(found))):
        keys = list(table)[:4] if isinstance(table, Mapping) else type(table).__name__
        raise InputError(
            "not a router",
            place=str(path),
            expected="tensors '0.prob', '1.prob', ... of one even length, one a step",
            found=str(keys),
        )
    return [found[i] for i in range(len(found))]


def _read_mask(path: Path) -> Mask:
    content, source = _read_text(path)
    if not isinstance(content, Mapping) or not content.get("rows"):
        raise InputError("not a mask", place=_where(source), expected="rows, one a step")
    for key in content:
        if key not in ("steps", "depth", "rows"):
            raise InputError(
                f"unknown key {key!r} in the mask",
                place=_where(source, key),
                expected="one of depth, rows, steps",
                remedy=nearest(key, ("steps", "depth", "rows")),
            )
    rows = content["rows"]
    if not isinstance(rows, list | tuple):
        raise InputError("'rows' is no list", place=_where(source, "rows"), expected=_ROW)
    parsed = {
        kind: tuple(_parse_row(row, kind, _where(source, "rows", i)) for i, row in enumerate(rows))
        for kind in ("attn", "mlp")
    }
    mask = Mask(parsed["attn"], parsed["mlp"])
    for i, pair in enumerate(zip(mask.attn, mask.mlp, strict=True)):
        for row in pair:
            if len(row) != mask.depth:
                raise InputError(
                    "rows of different lengths",
                    place=_where(source, "rows", i),
                    expected=f"{mask.depth} blocks, as in the first row",
                    found=str(len(row)),
                )
    for key, number in (("steps", mask.steps), ("depth", mask.depth)):
        if content.get(key, number) != number:
            raise InputError(
                f"{key!r} does not fit the rows",
                place=_where(source, key),
                expected=str(number),
                found=str(content[key]),
            )
    return mask


def _read_text(path: Path) -> tuple[Any, Source]:
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        return json.loads(path.read_text(encoding="utf-8")), Source(str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("not a JSON file", place=str(path), found=str(error)) from error


def _where(source: Source, *path: str | int) -> str:
    """``file:line``; JSON has no lines here, so there it is ``file: rows[3]``."""
    if source.line(()):
        return source.where(path)
    return f"{source.file}: {dotted(path)}" if path else source.file


def _parse_row(row: Any, kind: str, place: str) -> tuple[bool, ...]:
    if isinstance(row, Mapping) and (unknown := sorted(set(row) - {"attn", "mlp"})):
        raise InputError(f"unknown key {unknown[0]!r} in a row", place=place, expected=_ROW)
    text = row.get(kind) if isinstance(row, Mapping) else None
    digits = "".join(map(str, text)) if isinstance(text, list | tuple) else text
    if not isinstance(digits, str) or not digits or set(digits) - {"0", "1"}:
        what = f"the row has no list of 0 and 1 for {kind!r}"
        raise InputError(what, place=place, expected=_ROW, found=repr(row)[:60])
    return tuple(digit == "1" for digit in digits)
