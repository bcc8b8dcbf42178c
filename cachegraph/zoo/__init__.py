"""Models that cachegraph knows: DiT, PixArt-alpha, and a small DiT that is shipped."""

from cachegraph.zoo.digits import ddim_timesteps, load_digits_model, sample_digits
from cachegraph.zoo.dit import DiT
from cachegraph.zoo.pixart import PixArt
from cachegraph.zoo.recognise import build_model, load_model

__all__ = [
    "DiT",
    "PixArt",
    "build_model",
    "ddim_timesteps",
    "load_digits_model",
    "load_model",
    "sample_digits",
]
