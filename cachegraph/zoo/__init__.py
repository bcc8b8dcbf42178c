"""Models that are known by their weights: DiT, PixArt-alpha, FLUX, STDiT3; and a shipped DiT."""

from .digits import ddim_timesteps, load_digits_model, sample_digits
from .dit import DiT
from .flux import Flux
from .pixart import PixArt
from .recognise import build_model, load_model
from .stdit import STDiT3

__all__ = [
    "DiT",
    "Flux",
    "PixArt",
    "STDiT3",
    "build_model",
    "ddim_timesteps",
    "load_digits_model",
    "load_model",
    "sample_digits",
]
