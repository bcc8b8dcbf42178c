"""What routers are trained with, by number: any process can draw its part of any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cachegraph.diffusion.draw import draw_image, generator_at
from cachegraph.errors import InputError
from cachegraph.world import World

from .settings import Settings

Noise = tuple[Tensor, Tensor]  # z (B, C, H, W), y (B,) or with the null classes (2 B,)
Batch = Mapping[str, Any]  # x0, y, n, drop, noise

_DROPPED = 0.1  # share of labels that become the null class while training


class Images(Protocol):
    """Clean images or latents for Learning-to-Cache."""

    def __call__(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """``x0 (rows, C, H, W)`` and labels ``(rows,)`` of a step; the same at every call."""


class Draws:
    """Random numbers of a run.

    Each row depends on the seed, the step and its own number, so that N processes draw together
    what one draws. As published, each process has one stream instead.

    Args:
        settings: what was asked for.
        world: whose part is drawn.
    """

    def __init__(self, settings: Settings, world: World) -> None:
        self._settings, self._world = settings, world
        self.stream = torch.Generator()
        self.reseed()

    def reseed(self) -> None:
        """Begin the stream anew, as the published measurement of lambda does by accident."""
        seed = self._settings.global_seed * self._world.size + self._world.rank
        self.stream.manual_seed(seed)

    def noise(self, epoch: int, shape: tuple[int, ...]) -> Noise:
        """Noise and labels of a trajectory's conditional half, this process's part."""
        asked = self._settings
        rows = self._rows(asked.global_batch_size // 2)
        if asked.as_published:
            y = torch.randint(asked.num_classes, (len(rows),), generator=self.stream)
            return torch.randn((len(rows), *shape), generator=self.stream), y
        drawn = [
            draw_image(asked.global_seed, epoch, row, shape=shape, classes=asked.num_classes)
            for row in rows
        ]
        return torch.stack([z for z, _, _ in drawn]), torch.tensor([y for _, y, _ in drawn])

    def batch(self, step: int, images: Images) -> Batch:
        """A step of Learning-to-Cache, this process's part."""
        asked = self._settings
        rows = self._rows(asked.global_batch_size)
        x0, y = images(step, asked.global_batch_size)
        part = slice(rows[0], rows[-1] + 1)
        x0, y = x0[part], y[part]
        half = asked.steps // 2
        if asked.as_published:
            n = 2 * int(torch.randint(half, (1,), generator=self.stream))
            drop = torch.rand(len(rows), generator=self.stream) < _DROPPED
            noise = torch.randn(x0.shape, generator=self.stream)
        else:
            own = [generator_at(asked.global_seed, step, 1, row) for row in rows]
            n = 2 * int(torch.randint(half, (1,), generator=generator_at(asked.global_seed, step)))
            drop = torch.cat([torch.rand(1, generator=g) < _DROPPED for g in own])
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in own])
        return {"x0": x0, "y": y, "n": n, "drop": drop, "noise": noise}

    def _rows(self, count: int) -> range:
        part = self._world.share(count, "the rows of a batch")
        return range(part.start, part.stop)


def with_null(z: Tensor, y: Tensor, null: int) -> Tensor:
    """Labels of both halves ``(2 B,)``; the null class is put behind where there is only one.

    Raises:
        InputError: labels and noise do not belong together.
    """
    if len(y) == len(z):
        return torch.cat([y, torch.full_like(y, null)])
    if len(y) != 2 * len(z):
        raise InputError(
            "noise and labels do not belong together",
            expected=f"{len(z)} or {2 * len(z)} labels",
            found=str(len(y)),
        )
    return y


class LatentFolder:
    """Latents on disk, in a new order every epoch.

    Every ``.safetensors`` file of the folder holds ``latents (N, C, H, W)``, scaled as the model
    takes them, and ``labels (N,)``.

    Args:
        folder: of the files.
        seed: of the orders.

    Raises:
        InputError: there are none, or a file holds something else.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed = seed
        self._files = sorted(folder.glob("*.safetensors"))
        if not self._files:
            raise InputError("no latents", place=str(folder), expected=".safetensors files")
        counts, labels = [], []
        for file in self._files:
            try:
                with safe_open(file, "pt") as opened:
                    counts.append(opened.get_slice("latents").get_shape()[0])
                    labels.append(opened.get_tensor("labels").long())
            except SafetensorError as error:
                expected = "latents (N, C, H, W) and labels (N,)"
                place = str(file)
                raise InputError(
                    "not a file of latents", place=place, expected=expected, found=str(error)
                ) from error
        self._labels = torch.cat(labels)
        self._starts = torch.tensor([0, *counts]).cumsum(0)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self._labels)

    def __call__(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """A step's latents and labels; what is left of an epoch is dropped."""
        each = len(self) // rows
        if each == 0:
            raise InputError(
                "fewer latents than rows in a batch",
                expected=f"{rows} or more",
                found=f"{len(self)}",
            )
        epoch, at = divmod(step, each)
        if self._order[0] != epoch:
            order = torch.randperm(len(self), generator=generator_at(self._seed, epoch))
            self._order = epoch, order
        chosen = self._order[1][at * rows : (at + 1) * rows]
        return torch.stack([self._latent(int(i)) for i in chosen]), self._labels[chosen]

    def _latent(self, index: int) -> Tensor:
        file = int(torch.searchsorted(self._starts, index, right=True)) - 1
        with safe_open(self._files[file], "pt") as opened:
            found: Tensor = opened.get_slice("latents")[index - int(self._starts[file])]
        return found.float()


def share_of(batch: Sequence[Tensor] | Batch, world: World) -> Any:
    """This process's rows of a batch that was given for all of them."""
    if isinstance(batch, Mapping):
        part = world.share(len(batch["x0"]), "the rows of a batch")
        return {k: v[part] if k != "n" else v for k, v in batch.items()}
    z, y = batch
    part = world.share(len(z), "the rows of a batch")
    if len(y) == 2 * len(z):
        return z[part], torch.cat([half[part] for half in y.chunk(2)])
    return z[part], y[part]


def len_of(images: Images) -> int:
    """How many there are; 0 where they do not say."""
    return len(images) if isinstance(images, Sized) else 0
