"""Run compiled step graphs in a sampler: sessions, branches, slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from cachegraph.errors import SessionError, nearest
from cachegraph.graph.weights import refuse_changed, stamp

from .cuda_graph import Recorder, Replays, plan_launches
from .fit import check_sizes, inputs_of
from .forms import no_form
from .known import KnownValues, Prologues, StepFunction
from .program import Made, Program
from .session import Session
from .tracking import Track, Tracking, checked_timesteps, make_tracking


class ModelConfig(dict[str, Any]):
    """A model's configuration, by key and by attribute, as diffusers pipelines ask for it."""

    def __getattr__(self, name: str) -> Any:
        """The entry of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Runner(nn.Module):
    """Compiled step graphs, callable as the traced model was.

    Args:
        program: what the steps do.
        functions: one compiled graph a variant.
        weights: name -> tensor, shared by all variants.
        track: ``timestep`` finds the step of a call from its timestep; ``count`` takes every call
            for the next step, which spares reading a GPU tensor.
        prologues: what computes values that are known before a step runs, where there are any.
        timesteps: the sampler's, one a step as the model takes them, in place of the schedule's.
        recorder: makes what records CUDA graphs for a session; None to call the functions.
        place: of the artifact that the graphs were read from, for errors.

    Raises:
        SessionError: ``track`` is unknown, or ``timesteps`` do not fit the schedule.

    Attributes:
        config: the traced model's configuration (diffusers).
        functions: one compiled graph a variant.
        recorder: as given.
        forms: runners for calls of each form, where the artifact has several; else this one alone.
        checked_steps: before which the weights are compared with those that were compiled.
    """

    def __init__(
        self,
        program: Program,
        functions: Sequence[StepFunction],
        weights: Mapping[str, Tensor],
        track: Track = "timestep",
        prologues: Prologues | None = None,
        timesteps: Sequence[float] | None = None,
        recorder: Callable[[], Recorder] | None = None,
        place: str = "",
    ) -> None:
        super().__init__()
        self.place = place
        if timesteps is not None:
            times = checked_timesteps(timesteps, len(program.steps), program.ascending)
            program = replace(program, timesteps=times)
        self.program = program
        self.tracking: Tracking = make_tracking(
            program.signature,
            len(program.steps),
            track=track,
            timesteps=program.timesteps,
            ascending=program.ascending,
        )
        self.config = ModelConfig(program.config)
        self.functions = tuple(functions)
        self._prologues = prologues or Prologues()
        self._weights = dict(weights)
        self._stamp = stamp(weights)
        # At the last step, what was given back would be read again.
        last = 0 if self._prologues.released is not None else len(program.steps) - 1
        self.checked_steps = {0, last}
        first = next(iter(weights.values()))
        self.device: torch.device = first.device
        self.dtype: torch.dtype = next(
            (w.dtype for w in weights.values() if w.is_floating_point()), first.dtype
        )
        self._constants = [
            [
                torch.tensor(entry.constants[port.name], dtype=port.spec.dtype, device=self.device)
                for port in program.layout(step).interface.constants
            ]
            for step, entry in enumerate(program.steps)
        ]
        self.recorder = recorder
        self._plans: dict[str, Runner] = {}  # no submodules
        self.forms: tuple[Runner, ...] = (self,)
        self._launches = plan_launches(program) if recorder is not None else ()
        self._session = Session(self)
        self.eval()

    def forward(self, *args: Any, step: int | None = None, **kwargs: Any) -> Any:
        """Call the model for one step of the runner's own session; see :class:`Session`."""
        return self._session(*args, step=step, **kwargs)

    def extra_repr(self) -> str:
        """``50 steps, 2 variants, cpu``: what ``repr`` says of it."""
        return f"{len(self.program.steps)} steps, {len(self.functions)} variants, {self.device}"

    @property
    def plans(self) -> dict[str, Runner]:
        """By name, where the artifact has several; this runner is the first of them."""
        return self._plans

    def session(self, plan: str | None = None, *, quiet: bool = False) -> Session:
        """An independent trajectory over the same weights.

        Args:
            plan: the name of a plan, where the artifact has several.
            quiet: do not warn of a trajectory that is left unfinished.

        Raises:
            SessionError: there is no such plan.
        """
        if plan is None:
            return Session(self, quiet=quiet)
        if plan not in self._plans:
            raise SessionError(
                f"there is no plan {plan!r}",
                expected=", ".join(self._plans) or "no name: the artifact has one plan",
                remedy=nearest(plan, self._plans),
            )
        return Session(self._plans[plan], quiet=quiet)

    def inputs_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
        """A call's tensors in graph order, those of its first item where items are taken apart.

        Returns:
            None where the call has another form.
        """
        return inputs_of(self.program, args, kwargs, self.device)

    def form_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Runner:
        """The runner of the first form that a call has.

        Raises:
            SessionError: it has none.
        """
        for form in self.forms:
            if form.inputs_of(args, kwargs) is not None:
                return form
        raise no_form([form.program for form in self.forms], args, kwargs, self.device)

    def known_values(self) -> KnownValues:
        """What is known beforehand of a trajectory that has not begun."""
        return KnownValues(self.program, self._prologues, self.tracking)

    def reset(self) -> None:
        """Forget the runner's own trajectory."""
        self._session.reset()

    def cache_context(self, name: str, **step: Any) -> Any:
        """Name the branch of the calls inside, as diffusers pipelines do; see :class:`Session`."""
        return self._session.cache_context(name, **step)

    def cache_bytes(self) -> int:
        """Bytes that the runner's own session keeps now."""
        return self._session.cache_bytes()

    def constants(self, step: int) -> list[Tensor]:
        """The step constants that a step's graph takes, in its order."""
        return self._constants[step]

    def replays(self, recorder: Recorder) -> Replays:
        """Recorded graphs of a branch that has recorded none."""
        return Replays(self.program, self._launches, self.functions, recorder)

    def run_step(
        self,
        step: int,
        inputs: Sequence[Tensor],
        values: dict[Made, Tensor],
        known: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """Launch the graph of a step: kept values in, new ones out.

        Args:
            step: which.
            inputs: the model's, in graph order.
            values: (slot, step that made it) -> tensor; updated.
            known: values known beforehand.

        Returns:
            The model's outputs.
        """
        entry, interface = self.program.steps[step], self.program.layout(step).interface
        slots = [values[port.of, entry.slots[port.name]] for port in interface.slots]
        outputs = self.functions[entry.variant](*inputs, *slots, *self.constants(step), *known)
        count = len(self.program.signature.outputs)
        for port, tensor in zip(interface.writes, outputs[count:], strict=True):
            if port.name in entry.keeps:
                values[port.of, step] = tensor
        for made in entry.frees:
            values.pop(made, None)
        return outputs[:count]

    def check_inputs(self, inputs: Sequence[Tensor], branch: str = "") -> None:
        """Refuse tensors that the traced graph was not made for.

        Args:
            inputs: the model's, in graph order.
            branch: that the call belongs to.

        Raises:
            SessionError: another dtype, rank, size or device, or half of guidance alone where
                tokens are chosen by both halves.
        """
        if self.program.selection is not None:
            self.program.selection.check_call(inputs[0].shape[0], branch)
        check_sizes(self.program, inputs, self.device)

    def check_weights(self, *, moved: bool = False) -> None:
        """Refuse to run with weights that were written to after they were compiled.

        Args:
            moved: they may lie elsewhere, if they are the same.

        Raises:
            SessionError: one was, in place; writes through ``.data`` are seen by a few numbers of
                each weight.
        """
        refuse_changed(self._weights, self._stamp, moved=moved)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights, so that their device and dtype can be asked for."""
        yield from (nn.Parameter(w, requires_grad=False) for w in self._weights.values())

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Refused: graphs and what is known beforehand were made for the weights as they are.

        Raises:
            SessionError: always.
        """
        raise SessionError(
            "a compiled loop keeps the weights that it was compiled with",
            remedy="load them into the model and compile that again",
        )

    load_lora_adapter = load_state_dict

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Accept ``.to(...)`` that changes nothing, which pipelines call; refuse the rest."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device.type == self.device.type and probe.dtype == self.dtype:
            return self
        raise SessionError(
            "compiled step graphs cannot be moved or cast",
            expected=f"{self.dtype} on {self.device}",
            found=f"{probe.dtype} on {probe.device}",
            remedy="load the artifact there: cachegraph.load(path, device=...)",
        )
