"""Arguments and options that several commands share, and examples for their help pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def argument(metavar: str, text: str) -> Any:
    """An argument that must be given."""
    return typer.Argument(metavar=metavar, show_default=False, help=text)


CODE = (
    "Programs (.pt2), factories, and artifacts compiled for aoti or tensorrt run code: open only "
    "those that you trust."
)


def schedule_option(text: str) -> Any:
    """The option that names a schedule, or several."""
    return typer.Option("--schedule", "-s", metavar="SCHEDULE", show_default=False, help=text)


ModelArgument = Annotated[
    str,
    argument(
        "MODEL",
        "Weights of a known architecture (.pt, .pth, .safetensors), a torch.export program "
        "(.pt2), a diffusers model folder, module:factory, or the shipped model digits. "
        f"{CODE}",
    ),
]
ShapesArgument = Annotated[
    str,
    argument(
        "MODEL",
        "An architecture such as DiT-XL/2, or a model as for compile. No weights are needed. "
        f"{CODE}",
    ),
]
ScheduleOption = Annotated[str, schedule_option("A YAML file, or a preset such as fora-n3.")]
MaybeSchedule = Annotated[
    str | None,
    schedule_option("A YAML file, or a preset such as fora-n3. An artifact has its own."),
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch",  # typer 0.27 makes --ARCH of a metavar that is the name
        metavar="ARCH",
        help="Architecture of a weights file, where its tensors do not tell: DiT-XL/2, or "
        "DiT(num_heads=4).",
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SHAPE:DTYPE",
        help="An example input, such as x=2,4,32,32:f32, or height=32 for a constant; once for "
        "each. The first dimension of the first one is the batch.",
    ),
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="INPUTS",
        help="Inputs of another size that the artifact is to take, too, where sizes do not vary: "
        "what differs from the example, such as 'x=2,4,48,32:f32 height=48'; once for each.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        *("--out", "-o"),
        metavar="FOLDER",
        help="Where the artifact goes; default MODEL-SCHEDULE.cgraph in this folder.",
    ),
]
DisableOption = Annotated[
    list[str] | None,
    typer.Option(
        "--disable-pass",
        metavar="PASS",
        help="Leave out an exact optimisation, slice-columns or hoist-known; once for each.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Compile anew where the artifact is up to date.")
]
VaryingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--varying",
        metavar="NAME",
        help="An input that differs from step to step, beside the first one and the timestep.",
    ),
]
StaticOption = Annotated[
    bool, typer.Option("--static-batch", help="Fix the batch to that of the example inputs.")
]
DynamicOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="Sizes that have to vary, of batch, frames, height, width and text: height,width.",
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Height and width of the (latent) image of an architecture; default 32."
    ),
]
WhatArgument = Annotated[
    str, argument("WHAT", f"An artifact, an ONNX file or a folder of some, or a model. {CODE}")
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant", metavar="VARIANT", help="Show this variant's graph with its provenance."
    ),
]
PartOption = Annotated[
    int | None,
    typer.Option(
        "--part",
        metavar="N",
        help="Of an artifact of several plans or sizes, the N-th of those that the overview shows.",
    ),
]
DiffOption = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="VARIANT VARIANT", help="Show the difference of two variants."),
]
DotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a graph in DOT: of --variant, else the first."),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write the report instead: see report --help."),
]
SitesOption = Annotated[
    bool, typer.Option("--sites", help="List the sites; of a model, without a schedule too.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda; under torchrun each its own GPU.")]
SeedOption = Annotated[int, typer.Option(help="Of everything random.")]


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{line}[/cyan]" for line in lines)])
