"""Draws images whose noise and label depend on their index and the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cachegraph.diffusion.draw import draw_image
from cachegraph.diffusion.process import GUIDED, Process, guide

ModelFn = Callable[..., Tensor]
Kind = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class Labels:
    """Class labels, drawn with the noise of an image or given in turn.

    Attributes:
        name: of the model's input.
        classes: labels are 0 to this less one; it is the null class itself.
        given: labels in turn, by index; empty: drawn.
    """

    name: str
    classes: int
    given: tuple[int, ...] = ()

    def of(self, first: int, drawn: Sequence[int]) -> list[int]:
        """The label of each image."""
        if not self.given:
            return list(drawn)
        return [self.given[(first + j) % len(self.given)] for j in range(len(drawn))]

    def rows(self, first: int, drawn: Sequence[int], doubled: bool) -> dict[str, Tensor]:
        """The labels, then as many null classes where guidance doubles the batch."""
        y = torch.tensor(self.of(first, drawn))
        return {self.name: torch.cat([y, torch.full_like(y, self.classes)]) if doubled else y}


@dataclass(frozen=True)
class Texts:
    """Given embeddings of prompts, which are taken in turn by index.

    Attributes:
        embeddings: model input -> ``(prompts, ...)``.
        null: model input -> that of no prompt, ``(...)``; for guidance.
    """

    embeddings: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    classes: int = 1  # nothing is drawn from them

    def of(self, first: int, drawn: Sequence[int]) -> list[int]:
        """The number of each image's prompt."""
        prompts = len(next(iter(self.embeddings.values())))
        return [(first + j) % prompts for j in range(len(drawn))]

    def rows(self, first: int, drawn: Sequence[int], doubled: bool) -> dict[str, Tensor]:
        """The embedding of each image's prompt, then those of no prompt."""
        found, chosen = {}, self.of(first, drawn)
        for name, all_prompts in self.embeddings.items():
            rows = all_prompts[chosen]
            if doubled:
                rows = torch.cat([rows, self.null[name].expand_as(rows)])
            found[name] = rows
        return found


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled.

    Attributes:
        process: timesteps.
        kind: ``ddpm`` with the model's variance, or ``ddim`` without noise.
        cfg_scale: strength of guidance; at 1 the batch is not doubled.
        shape: ``(C, H, W)`` of what is sampled.
        conditions: labels or texts.
        seed: of everything.
        names: the model's inputs for the image and the timestep.
    """

    process: Process
    kind: Kind
    cfg_scale: float
    shape: tuple[int, ...]
    conditions: Labels | Texts
    seed: int
    names: tuple[str, str] = ("x", "t")

    def labels(self, first: int, count: int) -> np.ndarray:
        """Labels, or numbers of prompts, ``(count,)``."""
        return np.array(self.conditions.of(first, [d[1] for d in self._drawn(first, count)]))

    @torch.no_grad()
    def draw(
        self,
        model: ModelFn,
        first: int,
        count: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        keep: list[Tensor] | None = None,
    ) -> Tensor:
        """The images ``first`` to ``first + count - 1``, ``(count, C, H, W)`` float32.

        Args:
            model: is called by name of its inputs, and with ``step``.
            first: index of the first one.
            count: how many, in one call a step.
            device: of the model.
            dtype: of the model's image input.
            keep: gets what every step has made.
        """
        drawn = self._drawn(first, count)
        doubled = self.cfg_scale != 1
        labels = [label for _, label, _ in drawn]
        given = self.conditions.rows(first, labels, doubled)
        conditions = {name: rows.to(device) for name, rows in given.items()}
        x = torch.stack([noise for noise, _, _ in drawn]).to(device)
        steps = self.process.steps
        for step in range(steps):
            i = steps - 1 - step
            rows = torch.cat([x, x]) if doubled else x
            t = torch.full((len(rows),), self.process.timesteps[i], device=device)
            image, time = self.names
            output = model(**{image: rows.to(dtype), time: t}, **conditions, step=step).float()
            if doubled:
                output = guide(output, self.cfg_scale, GUIDED)[:count]
            if self.kind == "ddim":
                x = self.process.ddim(x, output, i)
            else:
                noise = [torch.randn(self.shape, generator=later) for _, _, later in drawn]
                x = self.process.ddpm(x, output, i, torch.stack(noise).to(device))
            if keep is not None:
                keep.append(x.cpu())
        return x

    def _drawn(self, first: int, count: int) -> list[tuple[Tensor, int, torch.Generator]]:
        return [
            draw_image(self.seed, index, shape=self.shape, classes=self.conditions.classes)
            for index in range(first, first + count)
        ]
