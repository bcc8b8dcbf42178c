"""The command that learns a router for a model and a number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cachegraph.errors import InputError

from .options import ArchOption, DeviceOption, InputOption, ModelArgument
from .output import progress, show

if TYPE_CHECKING:
    from cachegraph.train.data import Images
    from cachegraph.train.train import TrainedRouter

_Out = Annotated[
    Path,
    typer.Option(
        *("--out", "-o"),
        metavar="FOLDER",
        show_default=False,
        help="Checkpoint, log, mask and picture; a run that was stopped goes on there.",
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|MODULE:FUNCTION",
        help="For l2c: a folder of latents, or a function of step and rows that gives images and "
        "labels of a step.",
    ),
]
_Number = Annotated[float | None, typer.Option(show_default=False, help="By default as published.")]
_Steps = Annotated[int, typer.Option(min=2, show_default=False, help="Calls of a trajectory.")]
_Method = Annotated[Literal["harmonica", "l2c"], typer.Option(help="Whose.")]
_Cfg = Annotated[float | None, typer.Option(help="Strength of guidance; 2 for digits, else 1.5.")]
_LambdaC = Annotated[
    int | None, typer.Option(min=1, help="Training steps between measurements of lambda; 500.")
]
_MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Training steps; 20,000, of l2c 50,000.")
]
_Epochs = Annotated[int | None, typer.Option(min=1, help="Trajectories, or passes over the data.")]
_Batch = Annotated[
    int, typer.Option(min=1, help="Rows of a call over all processes, both halves counted.")
]
_Seed = Annotated[int, typer.Option(help="Of everything random.")]
_Classes = Annotated[int | None, typer.Option(min=1, help="10 for digits, else 1000.")]
_Every = Annotated[int, typer.Option(min=1, help="Training steps between two checkpoints.")]
_Initial = Annotated[
    Path | None,
    typer.Option(metavar="ROUTER.pt", help="Begin with these scores and their optimiser."),
]
_Published = Annotated[
    bool, typer.Option("--as-published", help="Repeat the published code's quirks.")
]
_Recompute = Annotated[
    Literal["mlp", "all", "none"],
    typer.Option(help="What is computed again for gradients, to save memory."),
]


def train_router(
    model: ModelArgument,
    out: _Out,
    steps: _Steps,
    method: _Method = "harmonica",
    data: _Data = None,
    l1: _Number = None,
    lr: _Number = None,
    ste_threshold: _Number = None,
    cfg_scale: _Cfg = None,
    lambda_c: _LambdaC = None,
    max_steps: _MaxSteps = None,
    epochs: _Epochs = None,
    global_batch_size: _Batch = 64,
    global_seed: _Seed = 0,
    num_classes: _Classes = None,
    ckpt_every: _Every = 500,
    initial: _Initial = None,
    as_published: _Published = False,
    recompute: _Recompute = "mlp",
    device: DeviceOption = "cpu",
    arch: ArchOption = None,
    inputs: InputOption = None,
) -> None:
    """Learn which attention and mlps to run at which step, as HarmoniCa or Learning-to-Cache do.

    Only scores are trained, one a site and step. Under torchrun several processes train as one.
    """
    given = {"l1": l1, "lr": lr, "ste_threshold": ste_threshold, "cfg_scale": cfg_scale}
    given |= {"lambda_c": lambda_c, "max_steps": max_steps, "epochs": epochs}
    given |= {"num_classes": num_classes}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"global_batch_size": global_batch_size, "global_seed": global_seed}
    options |= {"method": method, "steps": steps, "initial": initial, "out": out}
    options |= {"as_published": as_published, "recompute": recompute, "ckpt_every": ckpt_every}
    if method == "l2c":
        options["images"], options["data_name"] = _images(data, global_seed), data
    found = _train(model, options, device, arch, inputs or [])
    if found is not None:
        _tell(found, out)


def _train(
    model: str, options: dict[str, Any], device: str, arch: str | None, inputs: list[str]
) -> TrainedRouter | None:
    """Train with the other processes; None where another one tells of it."""
    from cachegraph.compiler.sources import open_model
    from cachegraph.train.train import train_router as train
    from cachegraph.world import joined, own_device
    from cachegraph.zoo.digits import NUM_CLASSES, ddim_timesteps

    where = own_device(device)
    with joined(where) as world, progress() as say:
        say("loading the model")
        source = open_model(model, arch=arch, inputs=inputs, need_inputs=False)
        if model == "digits":  # its own sampler's
            own = {"num_classes": NUM_CLASSES, "timesteps": ddim_timesteps(options["steps"])}
            guidance = {"cfg_scale": 2.0} if options["method"] == "harmonica" else {}
            options = {**own, **guidance, **options}
        if inputs and source.kwargs:
            first = next(iter(source.kwargs.values()))
            options["shape"] = tuple(first.shape[1:])
        found = train(source.model.to(where), progress=say, **options)
        return found if world.first else None


def _images(data: str | None, seed: int) -> Images:
    from cachegraph.compiler.sources import import_function
    from cachegraph.train.data import LatentFolder

    if data is None:
        raise InputError("method l2c needs --data", expected="a folder of latents, or a function")
    if Path(data).is_dir():
        return LatentFolder(Path(data), seed)
    return import_function(data, "source of images", "a function of step and rows")


def _tell(found: TrainedRouter, out: Path) -> None:
    rows = found.rows()
    runs, total = sum(map(sum, rows)), sum(map(len, rows))
    last = found.log[-1] if found.log else None
    trained = "" if last is None else f", {last.step} training steps, loss {last.loss:.3g}"
    show(f"{out}: {runs} of {total} runs of sites remain{trained}")
    show(f"cachegraph compile MODEL --schedule {out / 'schedule.yaml'}")
