"""HarmoniCa: step-wise denoising training with the image-error proxy, without images.

Source: ModelTC/HarmoniCa, ``train_router.py``; Huang et al., "HarmoniCa" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cachegraph.diffusion.process import Process, guide
from cachegraph.world import World

from .routed import Cache, RoutedModel
from .scores import Record, Scores
from .settings import Settings


class Harmonica:
    """Trains along trajectories; every epoch is one of them.

    Args:
        model: traced with the rows of this process.
        scores: what is trained.
        process: its timesteps.
        settings: what was asked for.
        world: with whom gradients and, unless as published, lambda are shared.
    """

    def __init__(
        self,
        model: RoutedModel,
        scores: Scores,
        process: Process,
        settings: Settings,
        world: World,
    ) -> None:
        self.model, self.scores, self.process = model, scores, process
        self.settings, self._world = settings, world
        self.lam = torch.zeros(0)  # (T - 1,), by index
        self.step = 0  # training steps so far

    def due(self, epoch: int) -> bool:
        """Whether an epoch begins with a measurement of lambda."""
        steps, period = self.settings.steps, self.settings.lambda_c
        if self.settings.as_published:
            return (epoch * steps) % period == 0
        return epoch == 0 or epoch * steps // period > (epoch - 1) * steps // period

    def epoch(self, epoch: int, z: Tensor, y: Tensor) -> Iterator[Record]:
        """One trajectory.

        Args:
            epoch: its number.
            z: noise ``(B, C, H, W)`` of the conditional half.
            y: labels of both halves, ``(2 B,)``.
        """
        x = torch.cat([z, z])
        stale: Cache | None = None
        if self.due(epoch):
            lam, stale = measure_lambda(self.model, self.scores, self.process, self.settings, x, y)
            if not self.settings.as_published:
                lam = self._world.sum(lam) / self._world.size
            self.lam = lam
        first = self.settings.steps - 1
        x, cache = self._begin(x, y, first, stale if self.settings.as_published else None)
        self.step += 1
        for i in reversed(range(first)):
            x, record = self._train(x, y, i, cache, epoch)
            yield record
            if self._enough():
                return

    def _enough(self) -> bool:
        """The published code looks after the step and stops one later."""
        return self.step >= self.settings.max_steps + self.settings.as_published

    @torch.no_grad()
    def _begin(self, x: Tensor, y: Tensor, i: int, stale: Cache | None) -> tuple[Tensor, Cache]:
        """The first call, which fills the cache.

        Args:
            x: noise of both halves.
            y: labels.
            i: respaced index.
            stale: what the last sampling of lambda left. The published code blends it in here;
                it is not emptied.
        """
        args = self._args(x, i, y)
        if stale is None:
            output, cache = self.model.with_values(*args)
        else:
            w = self.scores.w(i).detach()
            output, fresh = self.model.routed(args, w, stale)
            cache = self.model.renew(stale, fresh, w, self.settings.threshold)
        return self._next(x, output, i), cache

    def _train(
        self, x: Tensor, y: Tensor, i: int, cache: Cache, epoch: int
    ) -> tuple[Tensor, Record]:
        args, scale = self._args(x, i, y), self.settings.cfg_scale
        teacher = guide(self.model(*args), scale)
        w = self.scores.w(i)
        output, fresh = self.model.routed(args, w, cache)
        data = (teacher - guide(output, scale)).square().mean()
        l1, lam = w.sum(), self.lam[i]
        loss = lam * data + self.settings.l1 * l1
        told = torch.stack([loss, data, l1, lam])
        grad, mean = self.scores.learn(i, loss, told)
        self.model.renew(cache, fresh, w, self.settings.threshold)
        self.step += 1
        loss_, data_, l1_, lam_ = mean.tolist()
        record = Record(i, loss_, data_, l1_, lam_, grad, self.step, epoch)
        return self._next(x, output.detach(), i), record

    def _args(self, x: Tensor, i: int, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return model_args(self.process, x, i, y)

    def _next(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        return self.process.ddim(x, guide(output, self.settings.cfg_scale), i)


def model_args(process: Process, x: Tensor, i: int, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a guided model is called with: the first half of ``x`` twice, timesteps, labels."""
    half = x[: len(x) // 2]
    t = torch.full((len(x),), process.timesteps[i], dtype=torch.int64, device=x.device)
    return torch.cat([half, half]), t, y


@torch.no_grad()
def measure_lambda(
    model: RoutedModel, scores: Scores, process: Process, settings: Settings, x: Tensor, y: Tensor
) -> tuple[Tensor, Cache]:
    """How much each index's routing moves the image, and the cache of the last sampling.

    Sampling i routes indices T-2 to i and computes the rest; ``lam[i]`` is the mean square of
    its image less that of sampling i+1. Both are the same down to index i+1, so what they share
    is kept, and after index i a sampling is the plain model: T (T + 1) / 2 calls for T * T.

    Returns:
        ``(T - 1,)`` by index, and the cache.
    """

    def onward(x: Tensor, i: int) -> Tensor:
        for k in reversed(range(i)):
            output = guide(model(*model_args(process, x, k, y)), settings.cfg_scale)
            x = process.ddim(x, output, k)
        return x

    first = process.steps - 1
    output, cache = model.with_values(*model_args(process, x, first, y))
    x = process.ddim(x, guide(output, settings.cfg_scale), first)
    reference = onward(x, first)
    lam = torch.zeros(first, device=x.device)
    for i in reversed(range(first)):
        w = scores.w(i)
        output, fresh = model.routed(model_args(process, x, i, y), w, cache)
        model.renew(cache, fresh, w, settings.threshold)
        x = process.ddim(x, guide(output, settings.cfg_scale), i)
        image = onward(x, i)
        lam[i] = (image - reference).square().mean()
        reference = image
    return lam, cache
