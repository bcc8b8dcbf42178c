"""Judges a file of samples: by itself, against another, against statistics of a reference."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachegraph.errors import InputError

from .features import DIGITS, Features, extract, load_extractor
from .metrics import (
    drift,
    frechet_distance,
    frechet_distance_to,
    inception_score,
    paired,
    precision_recall,
)

_SAME_NOISE = ("seed", "conditions", "classes")
Figures = dict[str, Any]


@dataclass(frozen=True)
class SampleFile:
    """A file of images, as ``cachegraph sample`` or the ADM evaluation writes it.

    Attributes:
        path: of the file.
        pixels: ``(N, H, W, 3)`` uint8, or None where it holds statistics only.
        steps: what every step made of the first images, ``(T, n, C, H, W)``, or None.
        run: how they were sampled; empty in others' files.
        statistics: ``mu``, ``sigma`` and of sFID ``mu_s``, ``sigma_s``, where there are some.
    """

    path: Path
    pixels: np.ndarray | None
    steps: np.ndarray | None
    run: dict[str, Any]
    statistics: dict[str, np.ndarray]

    def same_noise(self, other: SampleFile) -> bool:
        """True where image by image the same noise and condition were used."""
        both = bool(self.run and other.run)
        return both and all(self.run.get(k) == other.run.get(k) for k in _SAME_NOISE)


def read_samples(path: Path) -> SampleFile:
    """Read a file of images.

    Raises:
        InputError: it is none.
    """
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError("not a file of samples", place=str(path), found=str(error)) from error
    pixels = arrays.get("arr_0")
    names = ("mu", "sigma", "mu_s", "sigma_s")
    statistics = {name: arrays[name] for name in names if name in arrays}
    right = pixels is not None and pixels.ndim == 4 and pixels.dtype == np.uint8
    if not (right or (pixels is None and statistics)):
        raise InputError(
            "not a file of samples",
            place=str(path),
            expected="arr_0 (N, H, W, 3) uint8",
            found=", ".join(f"{k} {v.dtype}{v.shape}" for k, v in arrays.items())[:80],
        )
    run = json.loads(str(arrays["run"])) if "run" in arrays else {}
    return SampleFile(path, pixels, arrays.get("steps"), run, statistics)


def evaluate(
    path: Path,
    other: Path | None = None,
    *,
    extractor: str = DIGITS,
    pairs: bool | None = None,
    progress: Callable[..., object] | None = None,
) -> Figures:
    """Figures of a file of samples.

    Args:
        path: the samples.
        other: what they are compared with: samples, or a reference of the ADM evaluation, whose
            statistics are used for FID where it has some.
        extractor: see :func:`.features.load_extractor`.
        pairs: whether image i of both are to be alike; by default where the files say that they
            come from the same noise.
        progress: told what is being done.

    Returns:
        Figures by name; those of distributions are called after the extractor where it is that
        of digits, for they are no FID of anybody else's.

    Raises:
        InputError: a file or the extractor does not serve.
    """
    say = progress or (lambda *_: None)
    one = read_samples(path)
    if one.pixels is None:
        raise InputError("the file holds no images", place=str(path))
    found: Figures = {"samples": str(path), "images": len(one.pixels), "extractor": extractor}
    end = f" ({DIGITS} classifier)" if extractor == DIGITS else ""
    say("reading the extractor")
    see = load_extractor(extractor)
    say("looking at the images")
    seen = extract(see, one.pixels)
    if seen.logits is not None:
        found[f"inception_score{end}"] = inception_score(seen.logits)
    if other is None:
        return found
    reference = read_samples(other)
    found["reference"] = str(other)
    found["reference_images"] = 0 if reference.pixels is None else len(reference.pixels)
    theirs = None
    if reference.pixels is not None:
        say("looking at the reference")
        theirs = extract(see, reference.pixels)
    distances = _distances(seen, theirs, reference.statistics)
    found |= {f"{name}{end}": value for name, value in distances.items()}
    if pairs or (pairs is None and one.same_noise(reference)):
        found |= _pairs(one, reference)
    return found


def _distances(
    seen: Features, theirs: Features | None, statistics: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """FID, sFID, precision and recall, as far as there is what they need."""
    found = dict[str, float]()
    known = {name: torch.from_numpy(value) for name, value in statistics.items()}
    for name, part, mean, spread in (
        ("fid", "features", "mu", "sigma"),
        ("sfid", "spatial", "mu_s", "sigma_s"),
    ):
        own, others = getattr(seen, part), None if theirs is None else getattr(theirs, part)
        if own is None:
            continue
        if mean in known and len(known[mean]) == own.shape[1]:
            found[name] = frechet_distance_to(own, known[mean], known[spread])
        elif others is not None:
            found[name] = frechet_distance(own, others)
    if theirs is not None:
        pair = precision_recall(seen.features, theirs.features)
        found["precision"], found["recall"] = pair
    return found


def _pairs(one: SampleFile, other: SampleFile) -> Figures:
    if one.pixels is None or other.pixels is None or one.pixels.shape != other.pixels.shape:
        shapes = [None if f.pixels is None else f.pixels.shape for f in (one, other)]
        raise InputError(
            "the files do not hold pairs", expected=f"{shapes[0]}", found=f"{shapes[1]}"
        )
    found: Figures = dict(paired(one.pixels, other.pixels))
    if one.steps is not None and other.steps is not None and one.steps.shape == other.steps.shape:
        found["drift"] = drift(one.steps, other.steps)
    return found
