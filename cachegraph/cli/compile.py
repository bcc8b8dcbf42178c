"""The commands that make an artifact and check it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachegraph.errors import CachegraphError, InputError

from .options import (
    CODE,
    AlsoOption,
    ArchOption,
    DisableOption,
    DynamicOption,
    ForceOption,
    InputOption,
    ModelArgument,
    OutOption,
    SeedOption,
    StaticOption,
    VaryingOption,
    argument,
    schedule_option,
)
from .output import Say, progress, show

if TYPE_CHECKING:
    from cachegraph.artifact.artifact import Artifact
    from cachegraph.compiler.sources import Source
    from cachegraph.schedule.schedule import Schedule


@dataclass(frozen=True)
class _Options:
    """All but the model and the schedule that tells what is made: each is part of its origin."""

    backend: str
    arch: str | None
    inputs: list[str]
    also: list[str]
    static_batch: bool
    dynamic: list[str]
    varying: list[str]
    disable: list[str]


def compile_model(
    model: ModelArgument,
    schedules: Annotated[
        list[str],
        schedule_option("A YAML file, or a preset such as fora-n3; several for as many plans."),
    ],
    out: OutOption = None,
    backend: Annotated[
        str, typer.Option(help="What runs the graphs: eager, inductor, aoti, onnx or tensorrt.")
    ] = "inductor",
    arch: ArchOption = None,
    inputs: InputOption = None,
    also: AlsoOption = None,
    static_batch: StaticOption = False,
    dynamic: DynamicOption = None,
    varying: VaryingOption = None,
    disable: DisableOption = None,
    force: ForceOption = False,
) -> None:
    """Compile a model's denoising loop under a schedule and write it as an artifact."""
    from cachegraph.artifact.load import is_made_from, load_artifact
    from cachegraph.artifact.origin import find_origin
    from cachegraph.compiler.sources import model_files, open_model
    from cachegraph.oracle.trial import warm_up

    asked = _asked(schedules)
    _check(backend, disable or [], out)
    name, first = "-".join(asked), next(iter(asked.values()))
    inputs, also, varying, disable = inputs or [], also or [], varying or [], disable or []
    how = _Options(backend, arch, inputs, also, static_batch, _names(dynamic), varying, disable)
    with progress() as say:
        say("looking for what is there already")
        others = asked if len(asked) > 1 else {}
        origin = find_origin(model, model_files(model), first, asdict(how), others)
        title = Path(model).stem
        target = out or Path(f"{title}-{name}.cgraph")
        kept = not force and origin is not None and is_made_from(target, origin)
        if not kept:
            say("loading the model")
            source = open_model(model, arch=arch, inputs=how.inputs)
            title = source.name
            target = out or Path(f"{title}-{name}.cgraph")
            _refuse_overwrite(target)
            _make(source, asked, how, say).save(target, say, origin)
        say("reading the artifact")
        artifact = load_artifact(target)
        if backend == "inductor":
            warm_up(artifact, say)
    if kept:
        show("up to date: made before from the same model, schedule and options")
    _show_artifact(f"{title}, {name}", artifact, target)


def _names(text: str | None) -> list[str]:
    return text.replace(" ", "").split(",") if text else []


def _check(backend: str, disable: list[str], out: Path | None) -> None:
    """Wrong names are told before any work."""
    from cachegraph.backends import get_backend
    from cachegraph.passes import passes_without

    get_backend(backend)
    passes_without(disable)
    _refuse_overwrite(out)


def _asked(schedules: list[str]) -> dict[str, Schedule]:
    """The schedules by name, each of which is a plan where there are several."""
    from cachegraph.schedule.schedule import load_schedule

    asked = {Path(text).stem: load_schedule(text) for text in schedules}
    if len(asked) != len(schedules):
        raise InputError("two schedules have one name", found=", ".join(schedules))
    return asked


def _make(source: Source, asked: dict[str, Schedule], how: _Options, say: Say) -> Artifact:
    """The artifact of all schedules, in memory."""
    from cachegraph.compiler.compile import compile_all, example_inputs
    from cachegraph.compiler.sources import more_examples

    example = example_inputs(source.model, source.args, source.kwargs)
    made = compile_all(
        source.model,
        asked,
        [example, *(((), more) for more in more_examples(source, how.also))],
        how.backend,
        dynamic_batch=not how.static_batch,
        dynamic=how.dynamic,
        varying=how.varying,
        disable=how.disable,
        progress=say,
    )
    say("writing the artifact")
    return made


def _show_artifact(heading: str, artifact: Artifact, path: Path) -> None:
    """What was compiled, and where it is."""
    from cachegraph.show.picture import size, summary
    from cachegraph.show.view import choices, parts_of, view_artifact

    heading += choices(artifact.program.varying, artifact.program.disabled)
    for title, one in parts_of(artifact):
        view = view_artifact(one)
        show(summary(f"{heading}{title}", view.plan, view.cost, view.batch_text))
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    show(f"artifact  {path}, {size(written)}, backend {artifact.backend}")


def verify(
    artifact: Annotated[Path, argument("ARTIFACT", f"What compile wrote. {CODE}")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", show_default=False, help="The model that it was made from."
        ),
    ] = None,
    integrity: Annotated[
        bool, typer.Option("--integrity", help="Look at the artifact alone; needs no model.")
    ] = False,
    arch: ArchOption = None,
    count: Annotated[
        str,
        typer.Option("--calls", metavar="N", help="Calls to compare, or all of the trajectory."),
    ] = "all",
    tolerance: Annotated[float, typer.Option(help="Largest relative L2 error of a call.")] = 1e-4,
    seed: SeedOption = 0,
) -> None:
    """Compare an artifact with the model under plain Python hooks, on random inputs."""
    if integrity:
        _check_integrity(artifact)
    if model is not None:
        _compare(artifact, model, arch, count, tolerance, seed)
    elif not integrity:
        raise InputError(
            "nothing to compare the artifact with",
            expected="--model MODEL, that it was made from, or --integrity",
        )


def _check_integrity(artifact: Path) -> None:
    """Every file and weight against its digest, the parts against each other."""
    from cachegraph.artifact.load import load_artifact
    from cachegraph.show.view import parts_of

    with progress() as say:
        say("reading the artifact")
        found = load_artifact(artifact)
        parts = parts_of(found)
        for _, one in parts:
            for module in (*one.graphs, *one.prologues.values()):
                module.graph.lint()
    for title, one in parts:
        variants = f"{len(one.graphs)} variants, {len(one.weights)} weights"
        show(f"{artifact}{title}: whole: {len(one.program.steps)} steps, {variants}")


def _compare(
    artifact: Path, model: str, arch: str | None, count: str, tolerance: float, seed: int
) -> None:
    from cachegraph.artifact.load import load_artifact
    from cachegraph.compiler.sources import open_model
    from cachegraph.oracle.trial import compare, reference_of
    from cachegraph.show.picture import plain_table
    from cachegraph.show.view import parts_of

    with progress() as say:
        say("reading the artifact")
        compiled = load_artifact(artifact)
        parts = [(one, _calls(count, len(one.program.steps))) for _, one in parts_of(compiled)]
        say("loading the model")
        source = open_model(model, arch=arch, need_inputs=False)
        errors = []
        for part, steps in parts:
            say("tracing the model")
            reference = reference_of(part, source.model, seed)
            errors += compare(part.runner(), reference, steps, seed, say)
    worst = sorted(errors, key=lambda one: -one.error)
    found = plain_table("step", "variant", "relative L2 error", right=("step", "relative L2 error"))
    for one in worst[:5]:
        found.add_row(str(one.step), one.variant, f"{one.error:.2e}")
    show(f"{artifact} against {source.name}: {len(errors)} calls, seed {seed}", "")
    if worst[0].error > 0:
        show(found, "")
    show(f"largest relative L2 error {worst[0].error:.2g}, tolerance {tolerance:g}")
    if worst[0].error > tolerance:
        raise CachegraphError(
            "the artifact differs from the reference",
            place=str(artifact),
            expected=f"a relative error of at most {tolerance:g} at every call",
            found=f"{worst[0].error:.2e} at step {worst[0].step}",
        )


def _refuse_overwrite(target: Path | None) -> None:
    """As saving would, but before the work."""
    from cachegraph.artifact.manifest import MANIFEST
    from cachegraph.folders import refuse_foreign

    if target is not None:
        refuse_foreign(target, MANIFEST, "artifact")


def _calls(text: str, steps: int) -> int:
    if text == "all":
        return steps
    if not text.isdecimal() or not 1 <= int(text) <= steps:
        raise InputError(
            "--calls: no such number of calls", expected=f"1 to {steps}, or all", found=text
        )
    return int(text)
