"""A compiler for the denoising loop of diffusion transformers."""

from importlib.metadata import version

from .artifact import Artifact
from .compiler import compile, load
from .errors import CachegraphError
from .reference import ReferenceRunner
from .runner import Runner, Session
from .schedule import Schedule, load_schedule, presets
from .zoo import load_model

__version__ = version("cachegraph")

__all__ = [
    "Artifact",
    "CachegraphError",
    "ReferenceRunner",
    "Runner",
    "Schedule",
    "Session",
    "compile",
    "load",
    "load_model",
    "load_schedule",
    "presets",
]
