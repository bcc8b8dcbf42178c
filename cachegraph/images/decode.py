"""From what a model samples to pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cachegraph.errors import InputError

Decode = Callable[[Tensor], Tensor]
"""``(N, C, H, W)`` as sampled to images ``(N, 1 or 3, H, W)`` in [-1, 1]."""


def to_pixels(images: Tensor) -> Tensor:
    """Images ``(N, 1 or 3, H, W)`` in [-1, 1] as uint8 ``(N, H, W, 3)``; grey three times.

    Rounded as in facebookresearch/DiT, ``sample_ddp.py``.
    """
    pixels = (127.5 * images + 128.0).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    return pixels.expand(*pixels.shape[:3], 3).cpu().contiguous()


def load_decoder(vae: Path | None, channels: int, device: torch.device) -> Decode:
    """Pixels as they are, or latents through a diffusers ``AutoencoderKL`` folder.

    Args:
        vae: the folder.
        channels: of what is sampled.
        device: of the autoencoder.

    Raises:
        InputError: latents without an autoencoder, or a folder that holds none that fits.
    """
    if vae is None:
        if channels not in (1, 3):
            raise InputError(
                f"{channels} channels are no pixels",
                expected="1 or 3",
                remedy="give the folder of the autoencoder: --vae FOLDER",
            )
        return lambda images: images
    if not (vae / "config.json").is_file():
        raise InputError(
            "not a diffusers model folder", place=str(vae), expected="config.json and weights"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        remedy = "pip install 'cachegraph[diffusers]'"
        raise InputError("an autoencoder needs diffusers", remedy=remedy) from error
    model = AutoencoderKL.from_pretrained(str(vae), local_files_only=True).eval().to(device)
    if model.config.latent_channels != channels:
        raise InputError(
            "the autoencoder is of other latents",
            place=str(vae),
            expected=f"{channels} channels",
            found=str(model.config.latent_channels),
        )
    scale, shift = model.config.scaling_factor, getattr(model.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        one = [model.decode(z[None].to(model.dtype) / scale + shift).sample for z in latents]
        return torch.cat(one).float()  # one at a time: the largest tensors are here

    return decode
