"""What images are judged by: an extractor given by path, or the classifier of digits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cachegraph.compiler.program_files import opening
from cachegraph.compiler.sources import import_function
from cachegraph.errors import InputError
from cachegraph.zoo.digits_quality import WEIGHTS, build_classifier

DIGITS = "digits"
_SPATIAL = 7  # channels of a map that sFID looks at; Nash et al. (2021), as the ADM evaluator
_BATCH = 256

Extract = Callable[[Tensor], Mapping[str, Tensor]]
"""uint8 images ``(N, 3, H, W)`` to ``features (N, D)`` and, where there are such, ``spatial``
``(N, C, h, w)`` or ``(N, D')``, and ``logits (N, classes)``."""


@dataclass(frozen=True)
class Features:
    """What an extractor sees in a set of images, float64.

    Attributes:
        features: ``(N, D)``.
        spatial: ``(N, D')``, or None.
        logits: ``(N, classes)``, or None.
    """

    features: Tensor
    spatial: Tensor | None
    logits: Tensor | None


def load_extractor(text: str) -> Extract:
    """An extractor: ``digits``, a TorchScript or ``torch.export`` file, or ``module:function``.

    Files and modules run code: open only those that you trust.

    Raises:
        InputError: it is none of these.
    """
    if text == DIGITS:
        return _digits()
    path = Path(text)
    if path.suffix == ".pt2" and path.is_file():
        with opening(path):
            program = torch.export.load(path).module()
        return _named(program)
    if path.is_file():
        try:
            with warnings.catch_warnings():
                # it is deprecated, and the form in which Inception is passed on
                warnings.simplefilter("ignore", DeprecationWarning)
                model = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise InputError(
                "not an extractor",
                place=text,
                expected="a TorchScript or torch.export (.pt2) file",
                found=str(error).splitlines()[0],
            ) from error
        return _named(model)
    takes = "a function of uint8 images (N, 3, H, W)"
    return _named(import_function(text, "feature extractor", takes))


@torch.no_grad()
def extract(extractor: Extract, pixels: np.ndarray) -> Features:
    """What an extractor sees in ``pixels (N, H, W, 3)`` uint8.

    Raises:
        InputError: its answer has no features, or none that are finite.
    """
    found: dict[str, list[Tensor]] = {"features": [], "spatial": [], "logits": []}
    for at in range(0, len(pixels), _BATCH):
        batch = torch.from_numpy(pixels[at : at + _BATCH]).permute(0, 3, 1, 2)
        for name, value in extractor(batch).items():
            kept = value[:, :_SPATIAL] if value.ndim == 4 and name == "spatial" else value
            found[name].append(kept.flatten(1).double().cpu())
    whole = {name: torch.cat(parts) for name, parts in found.items() if parts}
    if "features" not in whole or not whole["features"].isfinite().all():
        raise InputError("the extractor gives no finite features", expected="features (N, D)")
    return Features(whole["features"], whole.get("spatial"), whole.get("logits"))


def _named(call: Callable[[Tensor], Any]) -> Extract:
    """An extractor that may answer with a tensor, or with a mapping."""

    def extractor(images: Tensor) -> Mapping[str, Tensor]:
        answer = call(images)
        if isinstance(answer, Tensor):
            return {"features": answer}
        names = ("features", "spatial", "logits")
        if not isinstance(answer, Mapping) or not set(answer) <= set(names):
            raise InputError(
                "the extractor answers with something else",
                expected=f"a tensor (N, D), or a mapping of {', '.join(names)}",
                found=type(answer).__name__,
            )
        return answer

    return extractor


def _digits() -> Extract:
    model = build_classifier()
    model.load_state_dict(load_file(WEIGHTS))
    model.eval().requires_grad_(False)
    flatten = next(i for i, part in enumerate(model) if isinstance(part, nn.Flatten))

    def extractor(images: Tensor) -> Mapping[str, Tensor]:
        if tuple(images.shape[2:]) != (16, 16):
            raise InputError(
                "the classifier of digits takes images of 16x16",
                found=f"{images.shape[3]}x{images.shape[2]}",
                remedy="give --extractor",
            )
        grey = images[:, :1].float() / 127.5 - 1
        spatial = model[:flatten](grey)
        features = model[flatten:-1](spatial)
        return {"features": features, "spatial": spatial, "logits": model[-1](features)}

    return extractor
