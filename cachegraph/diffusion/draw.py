"""Random numbers that depend on a seed and a place alone, so that any process can draw them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator_at(seed: int, *place: int) -> torch.Generator:
    """A generator on the CPU for one place, such as an image's index; others are independent.

    Args:
        seed: of everything.
        place: numbers from 0.
    """
    [state] = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def draw_image(
    seed: int, *place: int, shape: tuple[int, ...], classes: int
) -> tuple[Tensor, int, torch.Generator]:
    """The noise of an image, its label, and the generator for what noise it needs later.

    Args:
        seed: of everything.
        place: of the image.
        shape: ``(C, H, W)``.
        classes: labels are 0 to ``classes - 1``.
    """
    generator = generator_at(seed, *place)
    label = int(torch.randint(classes, (1,), generator=generator))
    return torch.randn(shape, generator=generator), label, generator
