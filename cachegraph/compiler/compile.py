"""From a model and a schedule to a compiled artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.data import to_data
from cachegraph.backends import Progress, check_all, get_backend
from cachegraph.errors import InputError, ModelError
from cachegraph.graph.provenance import Provenance
from cachegraph.graph.step_graph import StepGraph
from cachegraph.graph.text import graph_text
from cachegraph.model.export import changing
from cachegraph.model.signature import call_arguments
from cachegraph.model.trace import TracedModel, trace
from cachegraph.passes import passes_without
from cachegraph.plan.plan import Plan
from cachegraph.runtime.fit import inputs_of
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import Schedule, load_schedule

from .cost import PlanCost, plan_cost
from .join import join, join_forms, with_own_names
from .pipeline import PassReport, module_weights, rewrite
from .program import make_program, named_prologues
from .provenance import make_provenance
from .sized import SizedCalls

ScheduleSource = str | Path | Mapping[str, object] | Schedule


@dataclass(frozen=True)
class Build:
    """Everything between a schedule and an artifact, for looking at.

    Attributes:
        traced: the model.
        schedule: what was asked for.
        plan: what every step does.
        graphs: the lowered graph of each variant.
        reports: what each pass did.
        cost: what a trajectory costs.
        weights: name -> tensor, shared by all graphs.
        varying: inputs that were said to differ from step to step.
        disabled: names of exact optimisations that were left out.
        calls: what is known of calls, for whoever asks for further costs.
    """

    traced: TracedModel
    schedule: Schedule
    plan: Plan
    graphs: tuple[StepGraph, ...]
    reports: tuple[PassReport, ...]
    cost: PlanCost
    weights: Mapping[str, Tensor]
    varying: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    calls: SizedCalls = field(default_factory=SizedCalls, repr=False)

    @cached_property
    def provenance(self) -> Provenance:
        """Where the nodes of the graphs come from, and what each costs."""
        return make_provenance(self.plan, self.graphs, self.reports, self.cost, self.calls)


def build(
    model: nn.Module,
    schedule: ScheduleSource,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    by_item: bool = True,
    dynamic: Sequence[str] = (),
    varying: Sequence[str] = (),
    disable: Sequence[str] = (),
    traced: TracedModel | None = None,
    progress: Progress | None = None,
) -> Build:
    """Trace, plan and rewrite; needs shapes only, so weights may be on the meta device.

    Args:
        model: in eval mode.
        schedule: path, preset name, dict or Schedule.
        args: example inputs; the model's own ``example_inputs()`` where left out.
        kwargs: example inputs by name.
        dynamic_batch: let the batch vary where torch.export can.
        by_item: where it cannot, take batches apart, if items do not depend on another. Their
            products are rounded otherwise than those of a batch.
        dynamic: sizes that have to vary: ``batch``, ``frames``, ``height``, ``width``, ``text``.
        varying: inputs that differ from step to step, beside the first one and the timestep.
        disable: names of exact optimisations to leave out: ``slice-columns``, ``hoist-known``.
        traced: the model's trace, where it is there already.
        progress: is told what is being done.

    Raises:
        InputError: the schedule or the model cannot be used.
    """
    say = progress or (lambda _: None)
    asked, passes = load_schedule(schedule), passes_without(disable)
    if traced is None:
        how: Any = {"dynamic_batch": dynamic_batch, "by_item": by_item, "dynamic": dynamic}
        traced = _traced(model, args, kwargs, progress, **how)
    for one in traced.contents:
        if (name := traced.signature.inputs[one.input][0]) in varying:
            raise changing(one.place, name)
    plan = plan_of(asked, traced)
    weights = module_weights(traced)
    reports: list[PassReport] = []

    def on_pass(_step: StepGraph, report: PassReport) -> None:
        say(f"rewriting {report.variant} of {len(plan.variants)}: {report.pass_name}")
        reports.append(report)

    graphs = rewrite(traced, plan, passes=passes, varying=varying, weights=weights, on_pass=on_pass)
    calls = SizedCalls()
    cost = plan_cost(plan, graphs, traced.module, weights, traced.symbols, calls)
    said = tuple(varying), tuple(disable)
    return Build(traced, asked, plan, graphs, tuple(reports), cost, weights, *said, calls)


def compile(
    model: nn.Module,
    schedule: ScheduleSource,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "inductor",
    out: str | Path | None = None,
    dynamic_batch: bool = True,
    dynamic: Sequence[str] = (),
    varying: Sequence[str] = (),
    disable: Sequence[str] = (),
    also: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model's denoising loop under a schedule; the model itself is not changed.

    Args:
        model: any module in eval mode.
        schedule: path, preset name, dict or Schedule.
        args: example inputs; the model's own ``example_inputs()`` where left out. The first
            dimension of the first tensor is the batch.
        kwargs: example inputs by name.
        backend: what runs the graphs: ``eager``, ``inductor``, ``aoti``, ``onnx``, ``tensorrt``.
        out: folder to write the artifact to.
        dynamic_batch: let the batch vary where torch.export can.
        dynamic: sizes that have to vary, too: ``height`` and ``width`` of the latent, ``frames``,
            the length of the ``text``; or the ``batch``, where a fixed one is no use. A model that
            fixes one is refused, with the line that does so.
        varying: inputs that differ from step to step, beside the first one and the timestep. All
            others must stay the same throughout a trajectory.
        disable: names of exact optimisations to leave out: ``slice-columns``, ``hoist-known``.
        also: calls of other sizes that the artifact is to take, too, where sizes do not vary: for
            each what differs from the example inputs, by name. A trajectory has the form of its
            first call.
        progress: is told what is being done.

    Returns:
        The artifact; ``artifact.runner()`` or ``cachegraph.load(artifact)`` runs it.

    Raises:
        InputError: the schedule, the model or the backend cannot be used.
    """
    asked = load_schedule(schedule)
    artifact = compile_all(
        model,
        {asked.policy.method: asked},
        [example_inputs(model, args, kwargs), *(((), more) for more in also)],
        backend,
        dynamic_batch=dynamic_batch,
        dynamic=dynamic,
        varying=varying,
        disable=disable,
        progress=progress,
    )
    say = progress or (lambda _: None)
    if out is None:
        artifact.compile_ahead(progress=say)
    else:
        say("writing the artifact")
        artifact.save(out, say)
    return artifact


def compile_all(
    model: nn.Module,
    schedules: Mapping[str, Schedule],
    examples: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    backend: str,
    *,
    varying: Sequence[str] = (),
    disable: Sequence[str] = (),
    progress: Progress | None = None,
    **sizes: Any,
) -> Artifact:
    """One artifact, in memory, of every schedule for every form of call.

    Args:
        model: in eval mode.
        schedules: by the names of their plans.
        examples: inputs of one call for each form; of all but the first what differs from that one.
        backend: what runs the graphs.
        varying: see :func:`compile`, as for all that follows.
        disable: see there.
        progress: see there.
        sizes: which of them vary: ``dynamic_batch`` and ``dynamic``.

    Raises:
        InputError: one of them cannot be used, or two examples have one form.
    """
    get_backend(backend)  # wrong names are told before any work
    passes_without(disable)
    made: list[Artifact] = []
    for number, (args, kwargs) in enumerate(examples):
        if number:
            args, kwargs = (), {**call_arguments(model, *examples[0]), **kwargs}
        if any(inputs_of(one.program, args, kwargs, one.device) is not None for one in made):
            raise InputError(
                "two calls have one form",
                place=f"also[{number - 1}]",
                expected="other sizes or constants than those that are compiled already",
                remedy="leave it out",
            )
        traced = _traced(model, args, kwargs, progress, **sizes)
        with_own_names(traced, {k: w for one in made for k, w in one.weights.items()}, number)
        plans = {
            name: assemble(
                build(
                    model,
                    schedule,
                    varying=varying,
                    disable=disable,
                    traced=traced,
                    progress=progress,
                ),
                backend,
            )
            for name, schedule in schedules.items()
        }
        made.append(join(plans))
    return join_forms(made)


def _traced(
    model: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    progress: Progress | None,
    **sizes: Any,
) -> TracedModel:
    if progress is not None:
        progress("tracing the model")
    return trace(model, *example_inputs(model, args, kwargs), **sizes)


def assemble(built: Build, backend: str) -> Artifact:
    """The artifact of what was built, in memory.

    Raises:
        BackendError: the backend is unknown or cannot take the graphs.
    """
    check_all(get_backend(backend), [(step.variant.name, step.graph) for step in built.graphs])
    program = make_program(built.traced, built.schedule, built.plan, built.graphs, built.cost)
    return Artifact(
        program=replace(program, varying=built.varying, disabled=built.disabled),
        schedule_text=built.schedule.to_yaml(),
        graphs=tuple(step.module for step in built.graphs),
        prologues=named_prologues(built.graphs),
        texts=tuple(graph_text(step) for step in built.graphs),
        weights=built.weights,
        backend=backend,
        device=next(iter(built.weights.values())).device,
        provenance_text=json.dumps(to_data(built.provenance, Provenance)),
    )


def example_inputs(
    model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The given example inputs, else the model's own.

    Raises:
        ModelError: none are given and the model has none.
    """
    if args is not None or kwargs is not None:
        return args or (), kwargs or {}
    own = getattr(model, "example_inputs", None)
    if own is None:
        raise ModelError(
            f"{type(model).__name__} has no example inputs of its own",
            remedy="give args=... or kwargs=... (on the command line: --input NAME=SHAPE:DTYPE)",
        )
    return own()
