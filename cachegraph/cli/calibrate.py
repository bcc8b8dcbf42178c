"""The commands that make schedules: from measurements, and from router checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import ArchOption, ModelArgument, argument, schedule_option
from .output import progress, show

_Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE.yaml", show_default=False, help="A schedule.")
]
_Steps = Annotated[
    int | None,
    typer.Option(min=2, help="Model calls per trajectory; default: the schedule's, else 50."),
]
_Bound = Annotated[
    float | None,
    typer.Option(min=0, help="Of SmoothCache: the largest change of a reused value; default: 0.1."),
]
_Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="sampler(model, seed) that runs one trajectory; digits has its own.",
    ),
]
_Host = Annotated[
    str | None,
    schedule_option(
        "A file or preset to correct with --goc, instead of writing SmoothCache lists."
    ),
]
_Goc = Annotated[
    float | None,
    typer.Option(
        metavar="WEIGHT",
        help="Add a GOC correction of this weight, at the steps where values keep their direction; "
        "its publication types in 3, 5, 7 and 9 of 20.",
    ),
]
_Average = Annotated[
    bool,
    typer.Option(
        "--average",
        help="For --goc: directions of the mean over all trajectories, as published over classes; "
        "keeps every step's in memory.",
    ),
]
_Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw error against step.")]


def calibrate(
    model: ModelArgument,
    out: _Out,
    steps: _Steps = None,
    bound: _Bound = None,
    sampler: _Sampler = None,
    trajectories: Annotated[int, typer.Option(min=1, help="How many to measure.")] = 4,
    distance: Annotated[int, typer.Option(min=1, help="The most steps between two values.")] = 3,
    schedule: _Host = None,
    goc: _Goc = None,
    average: _Average = False,
    plot: _Plot = None,
    arch: ArchOption = None,
) -> None:
    """Measure how a model's values change from step to step, and write a schedule that follows."""
    from cachegraph.calibrate.measure import run_calibrate

    with progress() as say:
        _, measured = run_calibrate(
            model,
            out,
            sampler=sampler,
            steps=steps,
            bound=bound,
            trajectories=trajectories,
            max_distance=distance,
            host=schedule,
            goc_weight=goc,
            average=average,
            plot=plot,
            arch=arch,
            progress=say,
        )
    drawn = f", {plot}" if plot else ""
    show(f"{out}{drawn}: {len(measured.sites)} sites over {measured.extent}")
    show(f"cachegraph plan {model} --schedule {out} shows what it computes")


def import_router_file(
    router: Annotated[Path, argument("ROUTER.pt", "A checkpoint.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="MASK.yaml", show_default=False, help="A mask.")
    ],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="What scores above it is run.")
    ] = 0.1,
    semantics: Annotated[
        Literal["l2c", "harmonica", "uvit"], typer.Option(help="Whose rules the mask follows.")
    ] = "l2c",
) -> None:
    """Write a router checkpoint as a mask that can be reviewed and used instead of it."""
    from cachegraph.methods.router_file import import_router, runs_text

    mask = import_router(router, out, threshold, semantics)
    show(f"{out}: {mask.steps} steps, {mask.depth} blocks; {runs_text(mask, semantics)}")
