"""Learning-to-Cache: pairs of steps from noised images.

Source: horseee/learning-to-cache, ``DiT/train_router.py`` and ``router_training_losses``; Ma et
al., "Learning-to-Cache" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cachegraph.diffusion.process import Process

from .routed import RoutedModel
from .scores import Record, Scores
from .settings import Settings


class LearningToCache:
    """Trains the even indices; the odd one before each fills the cache.

    Args:
        model: traced with the rows of this process.
        scores: what is trained.
        process: its timesteps.
        settings: what was asked for.
    """

    def __init__(
        self, model: RoutedModel, scores: Scores, process: Process, settings: Settings
    ) -> None:
        self.model, self.scores, self.process, self.settings = model, scores, process, settings
        self.step = 0

    def train(self, batch: Mapping[str, Any], epoch: int) -> Record:
        """One step of the optimiser.

        Args:
            batch: ``x0 (B, C, H, W)`` clean images, ``y (B,)`` labels, ``n`` the even index,
                ``drop (B,)`` whose label becomes the null class, ``noise`` like ``x0``.
            epoch: the pass over the data.
        """
        n = int(torch.as_tensor(batch["n"]).flatten()[0])
        y = torch.where(batch["drop"].bool(), self.settings.num_classes, batch["y"])
        x = self.process.noised(batch["x0"], batch["noise"], n + 1)
        output, cache = self.model.with_values(x, self._t(x, n + 1), y)
        x = self.process.ddim(x, output, n + 1)
        args = x, self._t(x, n), y
        teacher = self.model(*args)
        soft = self.scores.w(n)
        student, _ = self.model.routed(args, self._hard(soft), cache)
        data, l1 = (teacher - student).square().mean(), soft.sum()
        loss = data + self.settings.l1 * l1
        grad, mean = self.scores.learn(n, loss, torch.stack([loss, data, l1]))
        self.step += 1
        loss_, data_, l1_ = mean.tolist()
        return Record(n, loss_, data_, l1_, None, grad, self.step, epoch)

    def _hard(self, soft: Tensor) -> Tensor:
        """The scores as 0 and 1 whose gradient is the soft ones', where a threshold is given."""
        if self.settings.ste_threshold is None:
            return soft
        hard = (soft.detach() > self.settings.ste_threshold).to(soft)
        return hard + (soft - soft.detach())

    def _t(self, x: Tensor, i: int) -> Tensor:
        return torch.full((len(x),), self.process.timesteps[i], dtype=torch.int64, device=x.device)
