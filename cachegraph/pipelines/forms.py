"""One compiled loop a form of call: sizes, constants, which arguments are there, step count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cachegraph.artifact.artifact import Artifact
from cachegraph.backends import AheadOfTime, Progress, get_backend
from cachegraph.compiler.compile import Build, assemble, build
from cachegraph.errors import ScheduleError, SessionError
from cachegraph.graph.weights import relink, stamp
from cachegraph.model.dynamic import FixedSizeError
from cachegraph.model.trace import TracedModel
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.session import Session
from cachegraph.schedule.schedule import Schedule
from cachegraph.spec import TensorSpec

from .call import leaves_of
from .modelstate import bare, refuse_hooks, structure_of, tensors_of
from .store import Store, contents_of, name_of

Arguments = Mapping[str, Any]
Key = tuple[object, ...]
_SWITCH = "return_dict"  # the same values in a tuple or in an object
_MANY = 5  # forms: so many are no surprise for a pipeline that is used in several ways


@dataclass
class Form:
    """A form of call with all that is compiled for it.

    Attributes:
        arguments: leaf -> what it was in the call that it was compiled for, in words.
        steps: of a trajectory.
        traced: the model; None where the artifact was found on disk.
        artifact: the compiled loop.
        runner: runs it.
        idle: sessions that no image uses now; they have learned the sampler's timesteps.
    """

    arguments: Mapping[str, str]
    steps: int
    traced: TracedModel | None
    artifact: Artifact
    runner: Runner
    idle: list[Session] = field(default_factory=list)

    def __str__(self) -> str:
        """``28 steps, hidden_states f32[1, 4096, 64], ...``: tensors only."""
        return _shown(self.arguments, self.steps)

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Take the model's tensors as they are now, where they were replaced or written to.

        Args:
            weights: the model's, by name.
        """
        artifact = self.artifact
        now = {name: weights.get(name, tensor) for name, tensor in artifact.weights.items()}
        same = all(now[name] is tensor for name, tensor in artifact.weights.items())
        if same and stamp(now) == artifact.stamp:
            return
        if self.traced is not None:
            relink(self.traced.module, now)
        self.artifact = artifact.with_weights(now)
        ahead = isinstance(get_backend(artifact.backend), AheadOfTime)  # opened with the old ones
        self.runner = self.artifact.runner(functions=None if ahead else self.runner.functions)
        self.idle.clear()

    def inputs_of(self, arguments: Arguments) -> list[Tensor] | None:
        """The call's tensors in graph order; None where the call has another form."""
        try:
            inputs = self.runner.program.signature.flatten((), arguments)
            self.runner.check_inputs(inputs)
        except SessionError:
            return None
        return inputs

    def session(self) -> Session:
        """One for a new trajectory."""
        return self.idle.pop() if self.idle else self.runner.session(quiet=True)


class Forms:
    """Compiles a model for the calls that it gets.

    Args:
        model: whose weights all forms share.
        schedule: its policy, for any number of steps if it scales.
        backend: what runs the graphs.
        varying: inputs that differ from step to step.
        progress: is told what is being done.
        store: where compiled loops are kept; None for nowhere.
        dynamic: sizes that one form may take many of, where the model does.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        backend: str,
        varying: Sequence[str],
        progress: Progress,
        store: Store | None = None,
        dynamic: Sequence[str] = (),
    ) -> None:
        self.model, self.schedule, self.backend = model, schedule, backend
        self.compiled: list[Form] = []
        self._varying, self._dynamic = tuple(varying), tuple(dynamic)
        self._progress = progress
        self._found: dict[Key, Form] = {}
        self._structure: tuple[object, ...] = ()
        self._store = store

    def refresh(self) -> None:
        """Before an image: forget what was compiled for a model that is another one by now."""
        refuse_hooks(self.model)
        structure = structure_of(self.model)
        if structure != self._structure:
            self.compiled, self._found, self._structure = [], {}, structure
        weights = tensors_of(self.model)
        for form in self.compiled:
            form.follow(weights)

    def find(self, arguments: Arguments, steps: int) -> Form:
        """The form of a call, compiled now where it is a new one.

        Raises:
            InputError: the schedule or the model cannot be used.
        """
        key = (_key_of(arguments), steps)
        form = self._found.get(key)
        if form is None:
            fitting = [f for f in self.compiled if f.inputs_of(arguments) is not None]
            form = next((f for f in fitting if f.steps == steps), None)
            if form is None:
                traced = next((f.traced for f in fitting if f.traced is not None), None)
                form = self._compile(arguments, steps, traced)
                self.compiled.append(form)
            self._found[key] = form
        return form

    def _compile(self, arguments: Arguments, steps: int, traced: TracedModel | None) -> Form:
        schedule = scaled(self.schedule, steps)
        words, name = in_words(arguments), ""
        if self._store is not None:
            weights = tensors_of(self.model)
            how = (self.backend, self._varying, self._dynamic)
            made_from = (words, schedule.to_yaml(), *how, self._structure)
            contents = contents_of(weights)
            name = name_of(self.model, steps, made_from=made_from, contents=contents)
            device = next(iter(weights.values())).device
            found = self._store.find(name, device, weights)
            if found is not None:
                self._progress(f"found {name} for {_shown(words, steps)}")
                return Form(words, steps, None, found, found.runner())
        self._progress(f"compiling for {_shown(words, steps)}")
        self._warn_of_many(words, steps)
        with bare(self.model):
            built = self._build(schedule, arguments, traced)
        artifact = assemble(built, self.backend)
        if self._store is None:
            artifact.compile_ahead(progress=self._progress)
        else:
            self._store.keep(name, artifact, self._progress)
        return Form(words, steps, built.traced, artifact, artifact.runner())

    def _build(self, schedule: Schedule, arguments: Arguments, traced: TracedModel | None) -> Build:
        # Batches stay whole, and so bit for bit: another one is compiled for itself.
        options: dict[str, Any] = {"varying": self._varying, "by_item": False, "traced": traced}
        try:
            return build(self.model, schedule, (), arguments, dynamic=self._dynamic, **options)
        except FixedSizeError as error:
            warnings.warn(f"each size is compiled for itself: {error}", stacklevel=2)
        self._dynamic = ()
        return build(self.model, schedule, (), arguments, **options)

    def _warn_of_many(self, words: Mapping[str, str], steps: int) -> None:
        count = len(self.compiled) + 1
        if count < _MANY or count % _MANY:
            return
        last = self.compiled[-1]
        before, now = {**last.arguments, "steps": str(last.steps)}, {**words, "steps": str(steps)}
        differing = [
            f"{name}: {before.get(name, 'absent')} before, {now.get(name, 'absent')} now"
            for name in dict.fromkeys((*before, *now))
            if before.get(name) != now.get(name)
        ]
        warnings.warn(
            f"{type(self.model).__name__} is compiled for a form of call number {count} "
            f"({'; '.join(differing)}); each takes time and memory: keep to a few sizes, prompt "
            "lengths and numbers of steps",
            stacklevel=2,
        )


def scaled(schedule: Schedule, steps: int) -> Schedule:
    """The schedule for another number of steps.

    Raises:
        ScheduleError: it says step by step what to do, or its keys do not fit so many steps.
    """
    if schedule.steps == steps:
        return schedule
    if (fixed := schedule.fixed_by()) is not None:
        raise ScheduleError(
            f"the pipeline makes {steps} steps, and {fixed} fixes how many there are",
            place=schedule.where("steps"),
            expected=f"{schedule.steps} steps",
            found=str(steps),
            remedy=f"call the pipeline with num_inference_steps={schedule.steps}, or take a policy "
            "that scales, such as fora or taylorseer",
        )
    return schedule.for_steps(steps)


def in_words(arguments: Arguments) -> dict[str, str]:
    """Every leaf of a call's arguments by its name: shape and dtype of a tensor, else the value."""
    return {
        name: str(TensorSpec.of(leaf)) if isinstance(leaf, Tensor) else repr(leaf)
        for name, leaf in leaves_of(arguments)
    }


def _shown(words: Mapping[str, str], steps: int) -> str:
    tensors = (f"{name} {text}" for name, text in words.items() if text.endswith("]"))
    return f"{steps} steps, {', '.join(tensors)}"


def _key_of(arguments: Arguments) -> Key:
    described = (
        (name, tuple(leaf.shape), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else (name, type(leaf), repr(leaf))
        for name, leaf in leaves_of(arguments)
        if name != _SWITCH
    )
    return tuple(described)
