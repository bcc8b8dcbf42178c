"""Figures of a set of images, and of pairs of images.

Sources: Heusel et al. (2017), FID; Nash et al. (2021), sFID; Salimans et al. (2016), Inception
Score; Kynkäänniemi et al. (2019), precision and recall. All but the last are torchmetrics'.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachegraph.errors import InputError

_NEIGHBOURS = 3  # of precision and recall
_SPLITS = 10  # of the Inception Score
_ROWS = 1024  # of a table of distances at a time


class _Given(nn.Module):
    """Hands on features that are already there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(module: str, name: str) -> Any:
    """A class of torchmetrics; some are not where it says where torch-fidelity is missing."""
    try:
        return getattr(import_module(f"torchmetrics.image.{module}"), name)
    except ImportError as error:
        remedy = "pip install 'cachegraph[eval]'"
        raise InputError("judging images needs torchmetrics", remedy=remedy) from error


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """FID, or sFID, of features ``(N, D)`` float64; needs two images of each."""
    if min(len(one), len(other)) < 2:
        raise InputError("FID needs two images of each set", found=f"{len(one)}, {len(other)}")
    metric = _metric("fid", "FrechetInceptionDistance")(feature=_Given(one.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(one, real=False)
    metric.update(other, real=True)
    return float(metric.compute())


def frechet_distance_to(one: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """FID of features to the mean ``(D,)`` and covariance ``(D, D)`` of a reference."""
    metric = _metric("fid", "FrechetInceptionDistance")(feature=_Given(one.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(one, real=False)
    count = 2**20  # any: the metric wants sums, and gets back what these are of
    metric.real_features_num_samples = torch.tensor(count)
    metric.real_features_sum = mean.double() * count
    square = count * torch.outer(mean.double(), mean.double())
    metric.real_features_cov_sum = covariance.double() * (count - 1) + square
    return float(metric.compute())


def inception_score(logits: Tensor) -> float:
    """Inception Score of ``(N, classes)``, the mean of ten parts in a fixed random order."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps what it is given
        metric = _metric("inception", "InceptionScore")(
            feature=_Given(logits.shape[1]), splits=min(_SPLITS, len(logits))
        )
        torch.manual_seed(0)
        metric.update(logits)
        return float(metric.compute()[0])


def precision_recall(one: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of images near the reference, and of the reference near the images.

    A set's manifold is a ball around each member, as far as its third neighbour.
    """
    if min(len(one), len(reference)) <= _NEIGHBOURS:
        found = f"{len(one)}, {len(reference)}"
        raise InputError("precision and recall need four images of each set", found=found)
    return _covered(one, reference), _covered(reference, one)


def _covered(points: Tensor, centres: Tensor) -> float:
    radii = torch.cat(
        [
            torch.cdist(part, centres).kthvalue(_NEIGHBOURS + 1).values  # the nearest is itself
            for part in centres.split(_ROWS)
        ]
    )
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def paired(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean PSNR, SSIM and, where flip_evaluator is installed, FLIP of pairs ``(N, H, W, 3)``.

    The PSNR of an image is bounded by an error of a ten thousandth of a grey level.
    """
    ssim = _metric("ssim", "StructuralSimilarityIndexMeasure")(data_range=255.0, reduction="sum")
    total = 0.0
    for at in range(0, len(one), _ROWS):
        pair = [torch.from_numpy(part[at : at + _ROWS]).double() for part in (one, other)]
        error = (pair[0] - pair[1]).square().flatten(1).mean(1).clamp_min(1e-8)
        total += float((10 * torch.log10(255**2 / error)).sum())
        ssim.update(*(part.permute(0, 3, 1, 2) for part in pair))
    found = {"psnr": total / len(one), "ssim": float(ssim.compute()) / len(one)}
    flips = mean_flip(*(part.astype(np.float32) / 255 for part in (one, other)))
    return found if flips is None else {**found, "flip": flips}


def mean_flip(test: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean FLIP (Andersson et al. 2020) of sRGB pairs ``(N, H, W, 3)``, float32 in [0, 1].

    0 for equal images, towards 1; None where flip_evaluator is not installed.
    """
    try:
        import flip_evaluator
    except ImportError:
        return None
    pairs = zip(reference, test, strict=True)
    return float(np.mean([flip_evaluator.evaluate(*pair, "LDR")[1] for pair in pairs]))


def drift(one: np.ndarray, other: np.ndarray) -> list[float]:
    """How far the state is from the other's after every step, ``(T, N, C, H, W)``: relative L2."""
    change = np.linalg.norm((one - other).reshape(len(one), -1), axis=1)
    return [float(v) for v in change / np.linalg.norm(other.reshape(len(other), -1), axis=1)]
