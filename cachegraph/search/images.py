"""Samplers for the search, and how far images are from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachegraph.calibrate.measure import digits_sampler, load_sampler
from cachegraph.errors import InputError

Images = Tensor  # (images, ...), float32 on the CPU
Sampler = Callable[[Callable[..., Any], int], object]  # of what is called as the model, and a seed

_LEAST = 1e-12  # of a mean squared error, relative to the peak's square


def images_of(made: object, place: str = "sampler") -> Images:
    """What a sampler returned as one tensor.

    Args:
        made: a tensor with images along its first dimension, a list of tensors or PIL images, or
            an object that has such ``images``, as pipelines return.
        place: names the sampler.

    Raises:
        InputError: it is something else.
    """
    found = getattr(made, "images", made)
    if isinstance(found, Sequence) and found and not isinstance(found, str):
        parts = [torch.as_tensor(np.asarray(one, dtype=np.float32)) for one in found]
        scale = 255.0 if hasattr(found[0], "getbands") else 1.0  # PIL's, whole numbers
        found = torch.stack(parts) / scale
    if not isinstance(found, Tensor | np.ndarray) or found.ndim < 2 or not len(found):
        raise InputError(
            "the sampler returns no images",
            place=place,
            expected="a tensor with images along its first dimension, or what a pipeline returns",
            found=type(made).__name__,
        )
    return torch.as_tensor(found).detach().float().cpu()


@dataclass(frozen=True)
class Reference:
    """Images of the uncached model, by seed.

    Attributes:
        images: seed -> images.
        peak: largest difference that two pixels can have: that of the range [0, 1] or [-1, 1] where
            all images lie in one of these, else of the images.
        low: the least that a pixel can be, likewise.
    """

    images: dict[int, Images]
    peak: float
    low: float

    @classmethod
    def of(cls, images: dict[int, Images]) -> Reference:
        """Images and the peak that they have together."""
        low = min(float(one.min()) for one in images.values())
        high = max(float(one.max()) for one in images.values())
        if low < -1 or high > 1:
            return cls(images, high - low, low)
        return cls(images, 2.0, -1.0) if low < 0 else cls(images, 1.0, 0.0)

    def psnr(self, seed: int, images: Images) -> list[float]:
        """``10 log10(peak^2 / MSE)`` in dB of each image against the uncached one.

        Raises:
            InputError: the sampler made other images than for the uncached model.
        """
        wanted = self.images[seed]
        if wanted.shape != images.shape:
            raise InputError(
                "the sampler makes images of another shape with a cached model",
                expected=str(list(wanted.shape)),
                found=str(list(images.shape)),
            )
        error = (images - wanted).square().flatten(1).mean(1) / self.peak**2
        decibels = -10 * torch.log10(error.clamp_min(_LEAST))
        found: list[float] = decibels.nan_to_num(0.0, 0.0, 0.0).tolist()  # NaN images are no images
        return found


def make_sampler(
    model: str, sampler: str | None, steps: int, prompts: Path | None = None
) -> Sampler:
    """The sampler that the command line names.

    Args:
        model: ``digits`` has a sampler of its own, which draws every digit once.
        sampler: ``module:function``.
        steps: model calls.
        prompts: a text file, one prompt a line, for the pipeline around a diffusers model.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    if prompts is not None:
        from .pipeline import pipeline_sampler

        return pipeline_sampler(Path(model), prompts, steps)
    if sampler is not None:
        return load_sampler(sampler)
    if model != "digits":
        raise InputError(
            "images are needed, and only the model digits has a sampler here",
            place=model,
            expected="--sampler module:function, or --prompts for a diffusers pipeline's folder",
        )
    return digits_sampler(steps)
