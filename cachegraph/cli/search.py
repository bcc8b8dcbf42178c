"""The command that finds a schedule for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import ArchOption, ModelArgument, SeedOption, argument, schedule_option
from .output import progress, show

_Out = Annotated[
    Path,
    typer.Option(
        *("--out", "-o"),
        metavar="FILE.yaml",
        show_default=False,
        help="The schedule; figures, log and picture go beside it.",
    ),
]
_Budget = Annotated[int | None, typer.Option(metavar="N", help="So many full steps.")]
_Seconds = Annotated[
    float | None, typer.Option(metavar="S", help="A run of the sampler takes no longer.")
]
_Speedup = Annotated[
    float | None, typer.Option(metavar="F", help="So many times as fast as uncached.")
]
_Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="sampler(model, seed) that returns images; digits has its own.",
    ),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE.txt", help="One a line; MODEL is a diffusers pipeline's folder."),
]


def search(
    model: ModelArgument,
    out: _Out,
    budget: _Budget = None,
    seconds: _Seconds = None,
    speedup: _Speedup = None,
    sampler: _Sampler = None,
    prompts: _Prompts = None,
    steps: Annotated[int, typer.Option(min=2, help="Model calls per trajectory.")] = 50,
    trials: Annotated[int, typer.Option(min=1, help="The most trajectories to sample.")] = 400,
    noises: Annotated[int, typer.Option(min=1, help="Seeds to choose by.")] = 4,
    check: Annotated[int, typer.Option(min=1, help="Other seeds, for the figures.")] = 4,
    seed: SeedOption = 0,
    backend: Annotated[str, typer.Option(help="That runs the schedule, where time counts.")] = (
        "eager"
    ),
    arch: ArchOption = None,
) -> None:
    """Find the schedule with images closest to uncached ones at a cost; resumes if interrupted."""
    from cachegraph.search.run import Budget, run_search
    from cachegraph.show.picture import plain_table

    with progress() as say:
        found = run_search(
            model,
            out,
            Budget(budget, seconds, speedup),
            sampler=sampler,
            prompts=prompts,
            steps=steps,
            trials=trials,
            noises=noises,
            check=check,
            seed=seed,
            backend=backend,
            arch=arch,
            progress=say,
        )
    table = plain_table("schedule", "full steps", "PSNR", "spread", right=("full steps", "PSNR"))
    for one in found.judged:
        psnr = f"{one.psnr:.2f} dB"
        table.add_row(one.name, str(one.full_steps), psnr, f"{one.spread:.2f} dB")
    show(f"{out}: {found.family}, {found.trials} trials", "", table)
    if found.predicted is not None:
        measured = found.judged[0].seconds
        show(f"a run takes {measured:.3g} s, predicted {found.predicted:.3g} s")


def import_steps(
    source: Annotated[str, argument("SOURCE", "scm:slow, medium, fast or ultra; or a file.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE.yaml", show_default=False, help="A schedule."),
    ],
    steps: Annotated[int | None, typer.Option(min=2, help="Model calls per trajectory.")] = None,
    full: Annotated[int | None, typer.Option(min=2, help="Full steps, of CEM's table.")] = None,
    spread: Annotated[int, typer.Option(min=0, help="Gaps may be so far off the mean one.")] = 1,
    weight: Annotated[
        Literal["none", "linear", "quadratic"], typer.Option(help="Of a gap's length in CEM.")
    ] = "quadratic",
    order: Annotated[int, typer.Option(min=0, help="Of the forecast; 0 reuses.")] = 0,
    kinds: Annotated[str, typer.Option(help="Of the sites, such as attn,mlp.")] = "stack",
) -> None:
    """Write published step lists, step masks or tables as a schedule that can be reviewed."""
    from cachegraph.search.importers import import_schedule

    schedule, comment = import_schedule(
        source,
        steps=steps,
        full=full,
        spread=spread,
        weight=weight,
        order=order,
        kinds=kinds.split(","),
    )
    out.write_text(f"# {comment}\n{schedule.to_yaml()}", encoding="utf-8")
    show(f"{out}: {comment}")


def compare(
    model: ModelArgument,
    schedules: Annotated[
        list[str], schedule_option("A YAML file or preset; once for each, of as many steps.")
    ],
    sampler: _Sampler = None,
    prompts: _Prompts = None,
    seeds: Annotated[int, typer.Option(min=1, help="Noises to sample.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    backend: Annotated[str, typer.Option(help="What runs the graphs.")] = "inductor",
    arch: ArchOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all numbers.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw quality against time.")
    ] = None,
) -> None:
    """Compare schedules: quality of final images against measured time, and which are the best."""
    from cachegraph.search.compare import compare as run
    from cachegraph.show.picture import plain_table

    with progress() as say:
        found = run(
            model,
            schedules,
            sampler=sampler,
            prompts=prompts,
            seeds=seeds,
            rounds=rounds,
            backend=backend,
            arch=arch,
            out=out,
            plot=plot,
            progress=say,
        )
    numbers = ("full steps", "seconds", "speed-up", "PSNR", "SSIM", "FLIP")
    table = plain_table("schedule", *numbers, "front", right=numbers)
    for one in found:
        psnr = "" if one.psnr is None else f"{one.psnr:.2f} dB"
        similar = ["" if value is None else f"{value:.4f}" for value in (one.ssim, one.flip)]
        cells = str(one.full_steps), f"{one.seconds:.3g}", f"{one.speedup:.2f}x", psnr
        table.add_row(one.name, *cells, *similar, "*" if one.front else "")
    show(table, "", "front: no other is as good in less time, or better in as much")
    for path in (out, plot):
        if path is not None:
            show(f"{path}")
