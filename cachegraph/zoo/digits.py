"""The shipped model ``digits`` and its sampler: handwritten digits of 16x16 pixels.

A DiT of 3.7 million parameters in float16, trained by ``tools/train_digits.py``. It is small
enough to sample on a CPU, and real enough that a schedule which harms images can be seen to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cachegraph.errors import InputError

from .dit import DiT

WEIGHTS = Path(__file__).with_name("digits.safetensors")
TIMESTEPS = 1000
NUM_CLASSES = 10
IMAGE_SHAPE = (1, 16, 16)

ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noise model ``(x (B, 1, 16, 16), t (B,), y (B,)) -> (B, 1, 16, 16)``."""


def load_digits_model(device: torch.device | str = "cpu") -> DiT:
    """The shipped digit model in float32, in eval mode, without gradients.

    Args:
        device: where its weights are put.
    """
    with torch.device("meta"):
        model = DiT(
            input_size=16,
            patch_size=2,
            in_channels=1,
            hidden_size=128,
            depth=12,
            num_heads=4,
            num_classes=NUM_CLASSES,
            learn_sigma=False,
        )
    model.load_state_dict(load_file(WEIGHTS), assign=True)
    return model.to(device, torch.float32).eval().requires_grad_(False)


def ddim_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps in the order of sampling; 50 steps: 981, 961, ..., 1.

    Args:
        steps: 1 to 999.

    Raises:
        InputError: ``steps`` is out of range.
    """
    if not 1 <= steps < TIMESTEPS:
        raise InputError(
            "number of steps is out of range", expected=f"1 to {TIMESTEPS - 1}", found=str(steps)
        )
    stride = TIMESTEPS // steps
    return [1 + stride * i for i in reversed(range(steps))]


def sample_digits(
    model_fn: ModelFn,
    labels: Sequence[int] | Tensor,
    *,
    steps: int = 50,
    cfg_scale: float = 2.0,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws one image per label: deterministic DDIM (eta 0) with classifier-free guidance.

    The noise model is called once per step on the doubled batch [cond; uncond]. Nothing is
    clipped between steps, as in the sampling of the DiT publication; only the finished images are.
    Source: Song et al., "Denoising Diffusion Implicit Models" (2020), equation 12 with sigma 0.

    Args:
        model_fn: the model, or anything that is called like it, such as a compiled runner.
        labels: N digits, 0 to 9.
        steps: model calls.
        cfg_scale: guidance strength; 1 is no guidance. At 2 all of 1,000 images showed the digit
            that was asked for.
        seed: of the initial noise, which is drawn on the CPU and so equal on every device. It
            depends on N too.
        progress: called after every step with the number of steps done.
        device: where ``model_fn`` wants its inputs.

    Returns:
        ``(N, 1, 16, 16)`` in [-1, 1], float32, on ``device``.

    Raises:
        InputError: ``steps`` or a label is out of range, or there are no labels.
    """
    timesteps = ddim_timesteps(steps)
    doubled_labels = _doubled_labels(labels).to(device)
    count = len(doubled_labels) // 2
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, *IMAGE_SHAPE), generator=generator).to(device)
    shares = _signal_shares(timesteps)
    with torch.no_grad():
        for step, timestep in enumerate(timesteps):
            t = torch.full((2 * count,), timestep, dtype=torch.int64, device=device)
            cond, uncond = model_fn(torch.cat([x, x]), t, doubled_labels).float().chunk(2)
            noise = uncond + cfg_scale * (cond - uncond)
            here, there = shares[step], shares[step + 1]
            image = (x - (1 - here) ** 0.5 * noise) / here**0.5
            x = there**0.5 * image + (1 - there) ** 0.5 * noise
            if progress is not None:
                progress(step + 1)
    return x.clamp(-1, 1)


def _doubled_labels(labels: Sequence[int] | Tensor) -> Tensor:
    """The labels, then as many null classes: ``(2 N,)``."""
    y = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
    if y.ndim != 1 or len(y) == 0 or y.min() < 0 or y.max() >= NUM_CLASSES:
        raise InputError(
            "labels cannot be drawn",
            expected=f"a list of digits 0 to {NUM_CLASSES - 1}",
            found=str(y.tolist()),
        )
    return torch.cat([y, torch.full_like(y, NUM_CLASSES)])


def _signal_shares(timesteps: Sequence[int]) -> list[float]:
    """Share of signal variance at each timestep, then that of the clean image, which is 1.

    It follows from the betas of training: linear from 1e-4 to 2e-2.
    """
    betas = torch.linspace(1e-4, 2e-2, TIMESTEPS, dtype=torch.float64)
    signal = (1 - betas).cumprod(0).tolist()
    return [signal[t] for t in timesteps] + [1.0]
