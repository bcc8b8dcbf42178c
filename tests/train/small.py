"""A DiT of two blocks on 4x4 latents, and batches for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cachegraph.zoo.dit import DiT

CLASSES, SHAPE = 10, (4, 4, 4)


@cache
def small() -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=CLASSES).eval()
        with torch.no_grad():  # blocks that matter, and a step that differs from the next
            model.t_embedder.mlp[2].weight.mul_(20)
            for block in model.blocks:
                block.adaLN_modulation[1].weight.mul_(4)
                block.attn.proj.weight.mul_(4)
                block.mlp.fc2.weight.mul_(4)
    return model


def make_small() -> DiT:
    return small()


def noise(epochs: int, rows: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, *SHAPE, generator=generator),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for _ in range(epochs)
    ]


def images(step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, *SHAPE, generator=generator), torch.arange(rows) % CLASSES
