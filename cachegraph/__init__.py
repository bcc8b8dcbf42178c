"""A compiler for the denoising loop of diffusion transformers."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._began import BEGAN as BEGAN
from .artifact import Artifact
from .compiler import compile, load
from .errors import CachegraphError
from .reference import ReferenceRunner
from .runner import Runner, Session
from .schedule import Schedule, load_schedule, presets

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Import the models only when they are asked for: running an artifact needs none of them."""
    if name == "load_model":
        from .zoo import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
