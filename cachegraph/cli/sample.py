"""The command that draws images: some as a picture, or many as a file to be judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cachegraph.errors import InputError

from .options import CODE, DeviceOption, MaybeSchedule, SeedOption, argument
from .output import Say, is_artifact, progress, show

if TYPE_CHECKING:
    from cachegraph.images.source import Asked
    from cachegraph.runtime.runner import Runner

_MANY = "Many images"  # panel of the help page
_What = Annotated[
    str,
    argument(
        "MODEL_OR_ARTIFACT",
        "For a picture the shipped model digits, or an artifact made from it; with --num any "
        f"artifact, or a model as for compile. {CODE}",
    ),
]
_Out = Annotated[
    Path,
    typer.Option(
        *("--out", "-o"), metavar="FILE", show_default=False, help="A PNG; .npz with --num."
    ),
]
_Classes = Annotated[
    str | None,
    typer.Option(help="Classes to draw, such as 0-9 or 3,3,7; with --num in turn, else drawn."),
]
_Cfg = Annotated[
    float | None,
    typer.Option(help="Strength of guidance; 1 is none. By default 2 for digits, else 1.5."),
]
_Num = Annotated[
    int | None,
    typer.Option(
        *("--num", "--num-fid-samples"), min=1, rich_help_panel=_MANY, help="How many images."
    ),
]
_Sampler = Annotated[
    Literal["ddim", "ddpm"], typer.Option(rich_help_panel=_MANY, help="As in DiT's code.")
]
_Batch = Annotated[
    int, typer.Option(min=1, rich_help_panel=_MANY, help="Images between two savings.")
]
_PerCall = Annotated[
    int,
    typer.Option(
        min=1,
        rich_help_panel=_MANY,
        help="Images in a call of the model; another number may round otherwise.",
    ),
]
_Vae = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", rich_help_panel=_MANY, help="Of a diffusers AutoencoderKL."),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE.txt", rich_help_panel=_MANY, help="A prompt a line, in turn."),
]
_Embeddings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.safetensors",
        rich_help_panel=_MANY,
        help="Of the prompts, by the model's input; of no prompt as null.NAME.",
    ),
]
_NumClasses = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_MANY, help="10 for digits, else 1000.")
]


def sample(
    what: _What,
    out: _Out,
    schedule: MaybeSchedule = None,
    classes: _Classes = None,
    cfg: _Cfg = None,
    seed: SeedOption = 0,
    num: _Num = None,
    sampler: _Sampler = "ddim",
    batch_size: _Batch = 64,
    per_call: _PerCall = 8,
    vae: _Vae = None,
    prompts: _Prompts = None,
    embeddings: _Embeddings = None,
    num_classes: _NumClasses = None,
    device: DeviceOption = "cpu",
) -> None:
    """Draw images under a schedule: of digits as a picture, or with --num as many as you like.

    With --num, noise and label of an image depend on its index and the seed alone. Under torchrun
    several processes draw together and make the same file; one that was stopped goes on.
    """
    if num is None:
        _picture(what, out, schedule, classes or "0-9", 2.0 if cfg is None else cfg, seed)
        return
    from cachegraph.images.source import Asked
    from cachegraph.show.image_grid import parse_classes

    if out.suffix != ".npz":
        raise InputError("many images are written as .npz", place=str(out), expected="FILE.npz")
    labels = tuple(parse_classes(classes)) if classes is not None else ()
    asked = Asked(sampler, seed, cfg, labels, num_classes, vae, prompts, embeddings)
    _many(what, out, schedule, asked, num, (batch_size, per_call), device)


def _many(
    what: str,
    out: Path,
    schedule: str | None,
    asked: Asked,
    num: int,
    sizes: tuple[int, int],
    device: str,
) -> None:
    from cachegraph.images.run import sample_images
    from cachegraph.images.source import drawing_of, identity, open_runner
    from cachegraph.world import joined, own_device

    where = own_device(device)
    with joined(where) as world, progress() as say:
        runner, name = open_runner(what, schedule, where, say)
        drawing = drawing_of(runner, asked)
        made = sample_images(
            drawing,
            out,
            num,
            identity(name, drawing, asked),
            per_call=sizes[1],
            batch=sizes[0],
            world=world,
            progress=say,
        )
        first = world.first
    if first:
        show(f"{out}: {num} images" + ("" if made else ", as it was"))


def _picture(
    what: str, out: Path, schedule: str | None, classes: str, cfg: float, seed: int
) -> None:
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
    import torch

    from cachegraph.images.source import open_runner
    from cachegraph.zoo.digits import IMAGE_SHAPE

    elsewhere = (
        "sample others with --num N -o samples.npz, or in their own sampler: "
        "run = cachegraph.load('NAME.cgraph') and call run(...) as the model"
    )
    if not is_artifact(what) and what != "digits":
        reason = "only digits are drawn as a picture"
        raise InputError(reason, place=what, remedy=elsewhere)
    runner, _ = open_runner(what, schedule, torch.device("cpu"), say)
    shapes = [spec.shape[1:] for _, spec in runner.program.signature.inputs]
    if shapes != [IMAGE_SHAPE, (), ()]:
        raise InputError("not an artifact of digits", place=what, remedy=elsewhere)
    return runner
