"""How good images of digits are: distance to others, and whether they show what was asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over images of 10 log10(peak^2 / MSE) in dB; the peak of [-1, 1] is 2."""
    error = (images - reference).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
    return (10 * torch.log10(4 / error)).mean().item()


def build_classifier() -> nn.Sequential:
    """Untrained network: images ``(B, 1, 16, 16)`` in [-1, 1] to scores ``(B, 10)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images ``(N, 1, 16, 16)`` in [-1, 1] that show their label, of ``(N,)`` digits.

    A classifier decides; ``tools/digits_classifier.py`` trained it.
    """
    model = build_classifier()
    model.load_state_dict(load_file(WEIGHTS))
    scores = model.eval().requires_grad_(False)(images.detach().float().cpu())
    return (scores.argmax(1) == labels.cpu()).float().mean().item()
