"""Models that cachegraph knows: DiT, PixArt-alpha, and a small DiT that is shipped."""

from .digits import ddim_timesteps, load_digits_model, sample_digits
from .dit import DiT
from .pixart import PixArt
from .recognise import build_model, load_model

__all__ = [
    "DiT",
    "PixArt",
    "build_model",
    "ddim_timesteps",
    "load_digits_model",
    "load_model",
    "sample_digits",
]
