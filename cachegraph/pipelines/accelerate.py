"""``cachegraph.accelerate(pipe, schedule)``: transformers of a pipeline, compiled as called."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from cachegraph.backends import Progress, get_backend
from cachegraph.errors import InputError, ModelError
from cachegraph.model.dynamic import checked_names
from cachegraph.schedule.schedule import Schedule, load_schedule

from .denoiser import Denoiser, denoiser_of
from .forms import Forms
from .modelstate import refuse_hooks
from .store import Store
from .summary import Summary, summarise

Pipe = TypeVar("Pipe")
_COMPONENTS = ("transformer", "transformer_2")
_ANY_STEPS = 50  # of a schedule that says none: the pipeline does


def accelerate(
    pipe: Pipe,
    schedule: str | Path | Mapping[str, object] | Schedule,
    *,
    backend: str = "inductor",
    out: str | Path | None = None,
    strict: bool = False,
    dynamic: Sequence[str] = (),
    varying: Sequence[str] = (),
    progress: Progress | None = None,
) -> Pipe:
    """Run the transformers of a diffusers pipeline compiled, under a schedule.

    Nothing is compiled yet: each form of call is when it first comes, at an image's first step. The
    pipeline is used as before; its models stay what they are, and keep their weights.

    Args:
        pipe: with a ``scheduler`` and a ``transformer`` or ``transformer_2``, each in eval mode.
        schedule: path, preset name, dict or Schedule. How many steps there are says the pipeline;
            a schedule that fixes another number is refused before the first model call.
        backend: what runs the graphs: ``inductor``, ``eager``, ``aoti``, ``onnx``, ``tensorrt``.
        out: folder to keep what is compiled in, and to look for it in.
        strict: refuse a call that cannot be cached, instead of running it uncached with a warning.
        dynamic: sizes that one form may take many of, where the model allows it: ``height``,
            ``width``, ``frames``, ``text``. Where it does not, a warning says the line, and each
            size is a form of its own.
        varying: inputs that differ from step to step, beside the first one and the timestep.
        progress: is told what is being compiled; by default stderr is.

    Returns:
        The same pipeline.

    Raises:
        InputError: schedule, backend or pipeline cannot be used.
    """
    get_backend(backend)
    checked_names(dynamic)
    asked, models = _loaded(schedule), _models(pipe)
    for model in models.values():
        refuse_hooks(model)
        other = denoiser_of(model)
        if other is not None and other.pipe not in (None, pipe):
            raise ModelError(
                f"{type(model).__name__} is accelerated in another pipeline, whose scheduler tells "
                "its images apart",
                remedy="call cachegraph.restore(that pipeline) first",
            )
    restore(pipe)
    for component, model in models.items():
        store = None if out is None else Store(Path(out))
        forms = Forms(model, asked, backend, varying, progress or _say, store, dynamic)
        Denoiser(pipe, component, forms, varying, strict).install()
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Put a pipeline's transformers back as they were; others are left alone.

    Returns:
        The same pipeline.
    """
    for denoiser in _denoisers(pipe):
        denoiser.remove()
    return pipe


@contextmanager
def accelerated(
    pipe: Pipe, schedule: str | Path | Mapping[str, object] | Schedule, **options: Any
) -> Iterator[Pipe]:
    """A pipeline that is accelerated inside of a ``with`` and restored afterwards.

    Args:
        pipe: as for :func:`accelerate`.
        schedule: likewise.
        options: likewise.

    Raises:
        InputError: schedule, backend or pipeline cannot be used.
    """
    accelerate(pipe, schedule, **options)
    try:
        yield pipe
    finally:
        restore(pipe)


def summary(pipe: Any) -> Summary:
    """What ran of an accelerated pipeline: steps computed and reused, what that saved, forms.

    Raises:
        InputError: the pipeline is not accelerated.
    """
    found = _denoisers(pipe)
    if not found:
        raise InputError(
            f"{type(pipe).__name__} is not accelerated",
            remedy="call cachegraph.accelerate(pipe, schedule) first, and summary before restore",
        )
    return Summary(tuple(map(summarise, found)))


def _loaded(schedule: str | Path | Mapping[str, object] | Schedule) -> Schedule:
    if isinstance(schedule, Mapping) and "steps" not in schedule:
        schedule = {"steps": _ANY_STEPS, **schedule}
    return load_schedule(schedule)


def _models(pipe: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in _COMPONENTS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not models or not hasattr(pipe, "scheduler"):
        parts = getattr(pipe, "components", {})
        raise ModelError(
            f"{type(pipe).__name__} is no pipeline whose denoiser can be accelerated",
            expected="a pipeline with a scheduler and a transformer or transformer_2",
            found=", ".join(parts) if isinstance(parts, Mapping) else "",
            remedy="cachegraph.compile(model, schedule, ...) compiles a model for a loop by hand",
        )
    return models


def _denoisers(pipe: Any) -> list[Denoiser]:
    found = (denoiser_of(getattr(pipe, name, None)) for name in _COMPONENTS)
    return [denoiser for denoiser in found if denoiser is not None]


def _say(text: str) -> None:
    sys.stderr.write(f"cachegraph: {text}\n")
