"""Sampled images as one PNG file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from cachegraph.errors import InputError
from cachegraph.folders import writing

_COLUMNS = 10
_SHOWN = 64  # pixels that an image is enlarged to; those of digits are small on a screen
_BORDER = 1  # pixels around an image, before enlarging


def parse_classes(text: str) -> list[int]:
    """Labels from text: ``0-9`` or ``3,3,7``.

    Raises:
        InputError: the text has another form.
    """
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise InputError(
                f"--classes: cannot read {part!r}",
                expected="numbers and ranges, such as 0-9 or 3,7",
            )
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return labels


def check_image_path(path: Path) -> None:
    """Refuses an output that could not be written, before any work is done.

    Raises:
        InputError: it is no PNG file, or pillow is not installed.
    """
    if path.suffix.lower() != ".png":
        raise InputError("images are written as PNG", place=str(path), expected="a name in .png")
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise InputError(
            "writing images needs pillow", remedy="pip install 'cachegraph[eval]'"
        ) from error


def write_grid(images: Tensor, path: Path) -> None:
    """Writes images beside and below each other, ten in a row; small ones are enlarged.

    Args:
        images: ``(N, 1 or 3, H, W)`` in [-1, 1]; colours or grey.
        path: of the PNG file.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    columns = min(count, _COLUMNS)
    lines = -(-count // columns)
    high, wide = height + 2 * _BORDER, width + 2 * _BORDER
    grid = torch.zeros(channels, lines * high, columns * wide)
    for index, image in enumerate(images.cpu()):
        top = index // columns * high + _BORDER
        left = index % columns * wide + _BORDER
        grid[:, top : top + height, left : left + width] = (image + 1) / 2
    pixels = (grid * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
    times = max(_SHOWN // height, 1)
    enlarged = (picture.width * times, picture.height * times)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize(enlarged, Image.Resampling.NEAREST).save(path)
