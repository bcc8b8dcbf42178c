"""A compiler for the denoising loop of diffusion transformers."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._began import BEGAN as BEGAN

if TYPE_CHECKING:
    from .artifact.artifact import Artifact
    from .artifact.load import load
    from .compiler.compile import compile
    from .errors import CachegraphError
    from .oracle.reference import ReferenceRunner
    from .pipelines.accelerate import accelerate, accelerated, restore, summary
    from .runtime.runner import Runner
    from .runtime.session import Session
    from .schedule.schedule import Schedule, load_schedule, presets
    from .train.train import TrainedRouter, train_router
    from .zoo import load_model

__version__ = version("cachegraph")

__all__ = [
    "Artifact",
    "CachegraphError",
    "ReferenceRunner",
    "Runner",
    "Schedule",
    "Session",
    "TrainedRouter",
    "accelerate",
    "accelerated",
    "compile",
    "load",
    "load_model",
    "load_schedule",
    "presets",
    "restore",
    "summary",
    "train_router",
]

# Imported when asked for: torch takes over a second, and running an artifact needs no models.
_MODULES = {
    "Artifact": "artifact.artifact",
    "CachegraphError": "errors",
    "ReferenceRunner": "oracle.reference",
    "Runner": "runtime.runner",
    "Schedule": "schedule.schedule",
    "Session": "runtime.session",
    "TrainedRouter": "train.train",
    "accelerate": "pipelines.accelerate",
    "accelerated": "pipelines.accelerate",
    "compile": "compiler.compile",
    "load": "artifact.load",
    "load_model": "zoo",
    "load_schedule": "schedule.schedule",
    "presets": "schedule.schedule",
    "restore": "pipelines.accelerate",
    "summary": "pipelines.accelerate",
    "train_router": "train.train",
}


def __getattr__(name: str) -> Any:
    """A public name from the module that has it, or a module."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # the module is there, what it needs is not
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also what is not imported yet."""
    return sorted({*globals(), *__all__})
