"""Samples as many images as asked for, with whoever helps, into one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachegraph.errors import InputError
from cachegraph.world import World

from .decode import Decode, to_pixels
from .parts import Parts
from .sampler import ModelFn, Sampler

_PREVIEW = 100  # images
Range = tuple[int, int]


@dataclass(frozen=True)
class Drawing:
    """What draws images.

    Attributes:
        session: makes what is called for a trajectory.
        sampler: how.
        decode: to pixels.
        device: of the model.
        dtype: of its image input.
    """

    session: Callable[[], ModelFn]
    sampler: Sampler
    decode: Decode
    device: torch.device
    dtype: torch.dtype = torch.float32


def sample_images(
    drawing: Drawing,
    out: Path,
    count: int,
    asked: Mapping[str, Any],
    *,
    per_call: int,
    batch: int,
    world: World,
    progress: Callable[..., object] | None = None,
) -> bool:
    """Write ``out``: ``arr_0 (N, H, W, 3)`` uint8, ``arr_1`` labels; with a picture beside it.

    An image depends on its index, the seed and ``per_call`` alone: a model's call always holds as
    many images, for matrix products of another size round differently. So any number of processes
    makes the same file, and one that was killed goes on where it was.

    Args:
        drawing: what draws.
        out: the ``.npz`` file.
        count: how many images.
        asked: what tells them from others, as plain data.
        per_call: images of a call of the model.
        batch: images between two savings, rounded up to whole calls.
        world: the processes that help; every one calls this.
        progress: told after every saving.

    Returns:
        False where the file was there already.

    Raises:
        InputError: something else is there; nothing has been touched.
    """
    parts = Parts(out, {**asked, "images": count, "per_call": per_call})
    whole = parts.is_whole()
    world.barrier()  # all have looked before anything is written
    if whole:
        return False
    if world.first:
        parts.begin()
    world.barrier()
    open_ranges = list(_missing(parts.done(), count, per_call, batch))
    world.barrier()  # all have the same list before it grows
    say = progress or (lambda *_: None)
    for first, stop in open_ranges[world.rank :: world.size]:
        parts.write(first, _draw(drawing, first, stop, per_call))
        done = min(sum(b - a for a, b in parts.done()), count)
        say("sampling", done, count)
    world.barrier()
    if world.first:
        parts.join(count)
        write_preview(out)
    world.barrier()
    return True


def _missing(done: list[Range], count: int, per_call: int, batch: int) -> Iterator[Range]:
    """What is to do, in pieces of about ``batch`` images that begin and end with a call."""
    size = -(-batch // per_call) * per_call
    end = -(-count // per_call) * per_call
    at = 0
    for first, stop in [*done, (end, end)]:
        while at < first:
            yield at, min(at + size, first)
            at = min(at + size, first)
        at = max(at, stop)


def _draw(drawing: Drawing, first: int, stop: int, per_call: int) -> dict[str, np.ndarray]:
    """The images of a range; of the very first call also what every step has made."""
    pixels, labels, found = [], [], dict[str, np.ndarray]()
    for at in range(first, stop, per_call):
        keep: list[Tensor] | None = [] if at == 0 else None
        images = drawing.sampler.draw(
            drawing.session(), at, per_call, drawing.device, drawing.dtype, keep
        )
        if not images.isfinite().all():
            raise InputError(
                f"the images {at} to {at + per_call - 1} are not finite",
                remedy="another precision or --cfg may help",
            )
        if keep is not None:
            found["steps"] = torch.stack(keep).numpy()
        pixels.append(to_pixels(drawing.decode(images)).numpy())
        labels.append(drawing.sampler.labels(at, per_call))
    return {"pixels": np.concatenate(pixels), "labels": np.concatenate(labels), **found}


def write_preview(samples: Path) -> None:
    """A PNG of the first images beside a sample file, ten in a row."""
    from cachegraph.show.image_grid import write_grid

    with np.load(samples) as opened:
        pixels = torch.from_numpy(opened["arr_0"][:_PREVIEW])
    write_grid(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, samples.with_suffix(".png"))
