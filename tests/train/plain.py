"""The published training loops, as plainly as they can be written: what ours must equal.

Every module runs with gradients, the teacher too, and nothing is shared between samplings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.diffusion.process import Process, guide

Entries = list[Tensor] | None


class PlainRouted:
    """A model of ``blocks`` with ``attn`` and ``mlp`` whose outputs are blended by hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [m for block in model.blocks for m in (block.attn, block.mlp)]

    def __call__(self, *args: Tensor, w: Tensor | None = None, cache: Entries = None) -> Any:
        """The output and what every module's value was, blended."""
        used: list[Tensor] = []
        with self._hooks(w, cache, used):
            return self.model(*args), used

    @contextmanager
    def _hooks(self, w: Tensor | None, cache: Entries, used: list[Tensor]) -> Iterator[None]:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            j = len(used)
            if w is not None and cache is not None:
                out = cache[j] * (1 - w[j]) + out * w[j]
            used.append(out)
            return out

        handles = [module.register_forward_hook(hook) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PlainHarmonica:
    """HarmoniCa as published, one process."""

    def __init__(self, model: nn.Module, initial: Tensor, **options: float) -> None:
        self.model, self.options = PlainRouted(model), options
        self.process = Process.of(len(initial))
        self.routers = [nn.Parameter(row.clone()) for row in initial]
        self.optimiser = torch.optim.AdamW(self.routers, lr=options["lr"], weight_decay=0)

    def guided(self, x: Tensor, i: int, y: Tensor, **routed: Any) -> tuple[Tensor, list[Tensor]]:
        half = x[: len(x) // 2]
        t = torch.full((len(x),), self.process.timesteps[i])
        out, used = self.model(torch.cat([half, half]), t, y, **routed)
        return guide(out, self.options["cfg_scale"]), used

    def write(self, cache: Entries, used: list[Tensor], w: Tensor) -> list[Tensor]:
        if cache is None:
            return [entry.detach() for entry in used]
        threshold = self.options["ste_threshold"]
        return [
            new.detach() if w[j] > threshold else old
            for j, (old, new) in enumerate(zip(cache, used, strict=True))
        ]

    @torch.no_grad()
    def sample(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        cache: Entries = None
        for i in reversed(range(len(mask))):
            out, used = self.guided(x, i, y, w=mask[i], cache=cache)
            cache = self.write(cache, used, mask[i])
            x = self.process.ddim(x, out, i)
        assert cache is not None
        return x, cache

    @torch.no_grad()
    def get_lambda(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        mask = torch.ones(len(self.routers), len(self.routers[0]))
        reference, cache = self.sample(x, y, mask)
        lam = torch.zeros(len(mask) - 1)
        for i in reversed(range(len(mask) - 1)):
            mask[i] = torch.sigmoid(self.routers[i])
            image, cache = self.sample(x, y, mask)
            lam[i] = (image - reference).square().mean()
            reference = image
        return lam, cache

    def epoch(self, e: int, z: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor]]:
        x, count = torch.cat([z, z]), len(self.routers)
        stale: Entries = None
        if (e * count) % self.options["lambda_c"] == 0:
            self.lam, stale = self.get_lambda(x, y)
        with torch.no_grad():
            w = torch.sigmoid(self.routers[-1])
            routed = {} if stale is None else {"w": w, "cache": stale}
            out, cache = self.guided(x, count - 1, y, **routed)
            x = self.process.ddim(x, out, count - 1)
        for i in reversed(range(count - 1)):
            teacher, _ = self.guided(x, i, y)
            w = torch.sigmoid(self.routers[i])
            out, used = self.guided(x, i, y, w=w, cache=cache)
            loss = self.lam[i] * (teacher - out).square().mean() + self.options["l1"] * w.sum()
            self.optimiser.zero_grad()
            self.model.model.zero_grad()
            loss.backward()
            cache = self.write(cache, used, w)
            self.optimiser.step()
            with torch.no_grad():
                for router in self.routers:
                    router.clamp_(-5, 5)
            x = self.process.ddim(x, out.detach(), i)
            gradient = self.routers[i].grad
            assert gradient is not None
            yield loss.item(), gradient.clone()


class PlainL2C:
    """Learning-to-Cache as published, one process."""

    def __init__(self, model: nn.Module, initial: Tensor, null: int, **options: Any) -> None:
        self.model, self.options, self.null = PlainRouted(model), options, null
        self.process = Process.of(len(initial))
        self.routers = [nn.Parameter(row.clone()) for row in initial]
        self.optimiser = torch.optim.AdamW(self.routers, lr=options["lr"], weight_decay=0)

    def step(self, x0: Tensor, y: Tensor, n: int, drop: Tensor, noise: Tensor) -> Any:
        y = torch.where(drop.bool(), self.null, y)
        threshold = self.options["ste_threshold"]

        def call(x: Tensor, i: int, **routed: Any) -> Any:
            return self.model(x, torch.full((len(x),), self.process.timesteps[i]), y, **routed)

        with torch.no_grad():
            x = self.process.noised(x0, noise, n + 1)
            out, cache = call(x, n + 1)
            x = self.process.ddim(x, out, n + 1)
        teacher, _ = call(x, n)
        w = torch.sigmoid(self.routers[n])
        used = w if threshold is None else (w > threshold).float() + (w - w.detach())
        student, _ = call(x, n, w=used, cache=cache)
        loss = (teacher - student).square().mean() + self.options["l1"] * w.sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for router in self.routers:
                router.clamp_(-5, 5)
        gradient = self.routers[n].grad
        assert gradient is not None
        return loss.item(), gradient.clone()
