"""The command that draws images with the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachegraph.errors import InputError

from .options import CODE, MaybeSchedule, SeedOption, argument
from .output import Say, is_artifact, progress, show

if TYPE_CHECKING:
    from cachegraph.runtime.runner import Runner


def sample(
    what: Annotated[
        str,
        argument(
            "MODEL_OR_ARTIFACT", f"The shipped model digits, or an artifact made from it. {CODE}"
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", show_default=False, help="A PNG.")
    ],
    schedule: MaybeSchedule = None,
    classes: Annotated[str, typer.Option(help="Digits to draw, such as 0-9 or 3,3,7.")] = "0-9",
    cfg: Annotated[float, typer.Option(help="Strength of guidance; 1 is none.")] = 2.0,
    seed: SeedOption = 0,
) -> None:
    """Draw images of digits with the shipped model under a schedule."""
    from cachegraph.show.image_grid import check_image_path, parse_classes, write_grid
    from cachegraph.show.picture import plural
    from cachegraph.zoo import sample_digits

    check_image_path(out)
    labels = parse_classes(classes)
    with progress() as say:
        runner = _digits_runner(what, schedule, say)
        steps = len(runner.program.steps)
        images = sample_digits(
            runner,
            labels,
            steps=steps,
            cfg_scale=cfg,
            seed=seed,
            progress=lambda done: say("sampling", done, steps),
        )
        write_grid(images, out)
    drawn = f"{plural(len(labels), 'image')}, {plural(steps, 'step')}"
    show(f"{out}: {drawn}, guidance {cfg:g}, seed {seed}")


def _digits_runner(what: str, schedule: str | None, say: Say) -> Runner:
    """The digit model compiled under a schedule, or read from an artifact."""
    from cachegraph.artifact.load import load_artifact
    from cachegraph.compiler.compile import compile
    from cachegraph.schedule.schedule import load_schedule
    from cachegraph.zoo import load_model
    from cachegraph.zoo.digits import IMAGE_SHAPE

    elsewhere = (
        "other models are sampled in their own sampler: compile the model, then there "
        "run = cachegraph.load('NAME.cgraph') and call run(...) as the model"
    )
    if is_artifact(what):
        if schedule is not None:
            raise InputError("an artifact has its own schedule", place=what, remedy="leave out -s")
        say("reading the artifact")
        artifact = load_artifact(what)
        shapes = [spec.shape[1:] for _, spec in artifact.program.signature.inputs]
        if shapes != [IMAGE_SHAPE, (), ()]:
            raise InputError("not an artifact of digits", place=what, remedy=elsewhere)
        return artifact.runner()
    if what != "digits":
        raise InputError("only the model digits has a sampler here", place=what, remedy=elsewhere)
    if schedule is None:
        raise InputError("a model needs --schedule, or give an artifact", place=what)
    asked = load_schedule(schedule)
    return compile(load_model(what), asked, backend="eager", progress=say).runner()
