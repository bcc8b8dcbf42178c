"""What stands before a transformer's ``forward``: finds the step of a call and runs its graph."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cachegraph.errors import SessionError
from cachegraph.model.signature import call_arguments

from .call import Call, Context
from .forms import Forms
from .image import Branch, Image
from .tally import Tally
from .timeline import make_timeline

_PLACES = ("_old_forward", "forward")  # the first is what accelerate's offloading has put aside
_CALLER = 6  # frames from a warning to the pipeline: what torch wraps around a call of a module


class Denoiser:
    """Runs a pipeline's transformer compiled.

    It takes the place of the model's ``forward`` on the instance; the model stays what it is, with
    its class, weights and attributes.

    Args:
        pipe: whose scheduler tells images apart.
        component: ``transformer`` or ``transformer_2``.
        forms: what is compiled for its calls.
        varying: inputs that differ from step to step.
        strict: refuse a call that cannot be cached.
    """

    def __init__(
        self, pipe: Any, component: str, forms: Forms, varying: Sequence[str], strict: bool
    ) -> None:
        self.component, self.forms = component, forms
        self.tally = Tally()
        self._pipe = weakref.ref(pipe)
        self._varying, self._strict = tuple(varying), strict
        self._context = Context()
        self._image: Image | None = None
        self._told = False
        self._original: Any = None
        self._own_context: Any = None

    @property
    def pipe(self) -> Any:
        """The pipeline; None where it is gone."""
        return self._pipe()

    @property
    def model(self) -> nn.Module:
        """The transformer."""
        return self.forms.model

    def install(self) -> None:
        """Take the place of ``forward``; inside of what moves weights before it is called."""
        around = vars(self.model)
        place = next(place for place in _PLACES if hasattr(self.model, place))
        self._original = original = getattr(self.model, place)

        @functools.wraps(original)
        @torch.compiler.disable
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        vars(forward)["denoiser"] = self
        around[place] = forward
        if hasattr(self.model, "cache_context"):
            self._own_context = self.model.cache_context
            around["cache_context"] = self.cache_context

    def remove(self) -> None:
        """Put ``forward`` back as it was."""
        around, own = vars(self.model), type(self.model).forward
        for place in _PLACES:
            if _denoiser_in(around.get(place)) is self:
                around[place] = self._original
        if getattr(around.get("forward"), "__func__", None) is own:
            del around["forward"]  # the class has it
        around.pop("cache_context", None)
        self.close()

    def close(self) -> None:
        """Forget the image that was sampled last."""
        if self._image is not None:
            self._image.close()
        self._image = None

    @contextmanager
    def cache_context(self, name: str, **more: Any) -> Iterator[None]:
        """Note what the pipeline says of the calls inside; the model's own caches hear it too."""
        before = self._context
        self._context = Context(name, more.get("step_index"), more.get("num_inference_steps"))
        try:
            with self._own_context(name, **more):
                yield
        finally:
            self._context = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model.

        Raises:
            InputError: the schedule or the model cannot be used.
            SessionError: with ``strict``, a call that cannot be cached.
        """
        pipe = self.pipe
        given = call_arguments(self.model, args, kwargs, self._original)
        call = Call(given, self._context, self._varying)
        why = "the pipeline that the model was accelerated in is gone"
        if pipe is not None:
            image = self._image_of(pipe, call)
            branch, index = image.branch_of(call, self._index(pipe, image), self.forms)
            if branch is not None:
                return self._run(image, branch, call, index)
            why = image.why_not(call, index)
        if self._strict:
            raise SessionError(
                f"a call of {self.component} cannot be cached: {why}",
                remedy="accelerate the pipeline without strict=True to let such calls run uncached",
            )
        if not self._told:
            self._told = True
            warnings.warn(f"calls of {self.component} run uncached: {why}", stacklevel=_CALLER)
        with self.tally.uncached():
            return self._original(*args, **kwargs)

    def _run(self, image: Image, branch: Branch, call: Call, index: int) -> Any:
        step = index - branch.run[0]
        with branch.session.cache_context(call.context.name), self.tally.cached(branch.form, step):
            result = branch.session(step=step, **call.arguments)
        branch.index, image.latest = index, max(image.latest, index)
        branch.time = call.time if image.counted else None
        return result

    def _image_of(self, pipe: Any, call: Call) -> Image:
        """The image that the scheduler's timesteps are of; every ``set_timesteps`` makes new ones.

        Raises:
            SessionError: there are none yet.
        """
        timesteps = getattr(pipe.scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or not len(timesteps):
            raise SessionError(
                "the pipeline's scheduler has no timesteps",
                expected="a tensor, which set_timesteps makes anew for every image",
                remedy="call pipe.scheduler.set_timesteps(n) before a loop of your own",
            )
        if self._image is None or self._image.timesteps is not timesteps:
            self.close()
            self.forms.refresh()
            counted = not hasattr(pipe.scheduler, "step_index")
            timeline = make_timeline(pipe, self.component, lambda: call.time)
            self._image = Image(timesteps, timeline, counted, call.time if counted else None)
            self.tally.images += 1
        return self._image

    def _index(self, pipe: Any, image: Image) -> int | None:
        """The number of a call, where pipeline or scheduler tell; reads no tensor."""
        told = self._context.step_index
        if told is not None:
            count = len(image.timeline.times)
            return told + count - (self._context.steps or count)
        if image.counted:
            return None
        done: int | None = pipe.scheduler.step_index
        return image.timeline.begin if done is None else done


def denoiser_of(model: Any) -> Denoiser | None:
    """What has taken the place of a model's ``forward``, where something has."""
    around = vars(model) if isinstance(model, nn.Module) else {}
    found = (_denoiser_in(around.get(place)) for place in _PLACES)
    return next((denoiser for denoiser in found if denoiser is not None), None)


def _denoiser_in(forward: Any) -> Denoiser | None:
    found: Denoiser | None = getattr(forward, "denoiser", None)
    return found
