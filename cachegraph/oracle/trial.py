"""Run compiled loops on random inputs: to fill kernel caches, and to compare with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cachegraph.artifact.artifact import Artifact
from cachegraph.backends.named import named_graphs
from cachegraph.errors import ModelError, TraceError
from cachegraph.model.inputs import random_tensor
from cachegraph.model.signature import fill
from cachegraph.model.site import Site, SiteKind, describe
from cachegraph.model.trace import trace
from cachegraph.plan.plan import make_plan
from cachegraph.runtime.program import Program
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.tracking import timestep_input
from cachegraph.schedule.stacks import make_stack

from .reference import ReferenceRunner

Progress = Callable[[str, int, int], object]  # is told what is being done, how many of how many


@dataclass(frozen=True)
class StepError:
    """How far a compiled step is from the reference: relative L2 error of all its outputs."""

    step: int
    variant: str
    error: float


def warm_up(artifact: Artifact, progress: Progress) -> None:
    """Call every variant once with the traced sizes, so that torch keeps the kernels on disk."""
    for form in artifact.forms:
        warm_up(form, progress)
    generator = torch.Generator().manual_seed(0)
    graphs = named_graphs(artifact.program, artifact.graphs)
    for number, (function, name) in enumerate(zip(artifact.functions(), graphs, strict=True)):
        progress(f"compiling {name}", number, len(graphs))
        sizes = {size: values[0] for size, values in graphs[name].sizes.items()}
        tensors = [
            random_tensor("", spec.sizes(sizes), spec.dtype, generator)
            for spec in graphs[name].inputs.values()
        ]
        with torch.no_grad():
            function(*(t.to(artifact.device) for t in tensors))


def calls(program: Program, seed: int) -> Iterator[dict[str, Any]]:
    """The keyword arguments of every call of a trajectory, with the traced sizes.

    As in a sampler, the latent (the first input) and the timestep differ from call to call, and
    all else stays.

    Args:
        program: for the signature and the timesteps.
        seed: of the contents.
    """
    generator = torch.Generator().manual_seed(seed)
    signature = program.signature
    specs = [(name, spec.sizes(program.symbols), spec.dtype) for name, spec in signature.inputs]
    tensors = [random_tensor(*spec, generator) for spec in specs]
    clock = timestep_input(signature)
    for time in times(program):
        tensors[0] = random_tensor(*specs[0], generator)
        if clock is not None:
            tensors[clock] = torch.full_like(tensors[clock], time)
        yield {name: fill(tree, tensors) for name, tree in signature.arguments.items()}


def reference_of(artifact: Artifact, model: nn.Module, seed: int) -> ReferenceRunner:
    """The model under hooks, with the artifact's rows.

    The rows come from the manifest: files that the schedule names are not part of an artifact.

    Raises:
        ModelError: the model cannot be called as the artifact's was, or has other sites.
    """
    program = artifact.program
    try:
        traced = trace(model, (), next(calls(program, seed)))
    except TraceError as error:
        what = "the model cannot be called as the one that the artifact was compiled from"
        raise ModelError(what, expected=program.signature.describe(), found=error.found) from error
    stacks = [site for site in program.sites if site.kind == SiteKind.STACK]
    found = [make_stack(traced, site.name, site.relative) for site in stacks]
    sites = (*traced.sites, *found)
    if _names(sites) != _names(program.sites):
        what = "the artifact was compiled from another model"
        raise ModelError(what, expected=describe(program.sites), found=describe(sites))
    plan = make_plan(sites, program.rows, selection=program.selection)
    return ReferenceRunner.of_plan(model, traced, plan, artifact.schedule)


def compare(
    runner: Runner, reference: ReferenceRunner, count: int, seed: int, progress: Progress
) -> list[StepError]:
    """Errors of the first ``count`` calls of one trajectory with random inputs."""
    program = runner.program
    errors = []
    session = runner.session()
    for step, kwargs in zip(range(count), calls(program, seed), strict=False):
        progress("comparing calls", step, count)
        expected = tensors_in(reference(**kwargs, step=step))
        moved = _pytree.tree_map_only(Tensor, lambda t: t.to(runner.device), kwargs)
        found = tensors_in(session(**moved, step=step))
        variant = program.variants[program.steps[step].variant].name
        errors.append(StepError(step, variant, relative_error(found, expected)))
    return errors


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """L2 norm of the difference over that of what is expected; infinite where it is no number."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    wanted = [t.double().cpu() for t in expected]
    pairs = zip(found, wanted, strict=True)
    difference = sum(float((f.double().cpu() - w).square().sum()) for f, w in pairs)
    scale = sum(float(w.square().sum()) for w in wanted)
    error = math.sqrt(difference / scale) if scale else math.inf if difference else 0.0
    return error if math.isfinite(error) else math.inf


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of what a model returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in tensors_in(one)] if isinstance(value, list | tuple) else []


def times(program: Program) -> list[float]:
    """One timestep a call: the sampler's, else evenly spaced over the usual 1000."""
    steps = len(program.steps)
    falling = [float((steps - step) * 999 // steps) for step in range(steps)]
    return list(program.timesteps or (falling[::-1] if program.ascending else falling))


def _names(sites: Sequence[Site]) -> list[tuple[str, str]]:
    return [(site.name, site.kind) for site in sites]
