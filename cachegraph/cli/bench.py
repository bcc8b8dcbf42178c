"""The command that times schedules and backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachegraph.errors import InputError
from cachegraph.folders import writing

from .options import CODE, ArchOption, InputOption, SizeOption, argument, schedule_option
from .output import progress, show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cachegraph.bench.bench import Judge
    from cachegraph.bench.result import Entry
    from cachegraph.compiler.sources import Source


_Model = Annotated[
    str,
    argument(
        "MODEL",
        f"A model as for compile, or an architecture such as DiT-XL/2 (random weights). {CODE}",
    ),
]
_Schedules = Annotated[list[str], schedule_option("A YAML file or preset; once for each.")]
_Backends = Annotated[
    list[str], typer.Option("--backend", help="What runs the graphs; once for each.")
]
_Rounds = Annotated[int, typer.Option(min=1, help="How often everybody takes a turn.")]
_Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Both halves of guidance counted; default: of the examples."),
]
_Threads = Annotated[int | None, typer.Option(min=1, help="Of the CPU.")]
_Hooks = Annotated[
    bool,
    typer.Option("--hooks", help="Also run each schedule by Python hooks, as published codes."),
]
_Choice = Annotated[
    bool, typer.Option("--choice", help="Also time partial steps without their choice of tokens.")
]
_Whole = Annotated[
    bool, typer.Option("--whole", help="Also time whole trajectories, not only kinds of steps.")
]
_Without = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PASS",
        help="Also run each schedule without this exact optimisation; once for each.",
    ),
]
_Quality = Annotated[
    bool, typer.Option("--quality", help="Also sample images and judge them; digits only.")
]
_Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all numbers.")
]
_Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw time of a step against step.")
]

_COLUMNS = 100  # that the tables need


def bench(
    model: _Model,
    schedules: _Schedules,
    backends: _Backends = ["inductor"],  # noqa: B006 - typer copies it
    rounds: _Rounds = 5,
    batch: _Batch = None,
    threads: _Threads = None,
    hooks: _Hooks = False,
    choice: _Choice = False,
    whole: _Whole = False,
    without: _Without = None,
    quality: _Quality = False,
    out: _Out = None,
    plot: _Plot = None,
    arch: ArchOption = None,
    inputs: InputOption = None,
    input_size: SizeOption = None,
) -> None:
    """Time schedules and backends against the uncached model, eager and by the same backends."""
    from cachegraph.bench import report
    from cachegraph.bench.bench import run_bench
    from cachegraph.compiler.sources import open_model

    report.check_paths(out, plot)
    judge = _judge(model) if quality else None
    entries = _entries(schedules, backends, hooks, without or [])
    with progress() as say, report.using_threads(threads):
        say("loading the model")
        source = open_model(
            model, arch=arch, inputs=inputs or (), random_weights=True, input_size=input_size
        )
        found = run_bench(
            source.model,
            *_inputs(source, batch, bool(inputs)),
            entries,
            rounds=rounds,
            whole=whole,
            choice=choice,
            quality=judge,
            progress=say,
        )
        here = report.machine(source.model)
    show(*report.report(source.name, found, here, rounds), columns=_COLUMNS)
    if out is not None:
        data = report.result_data(source.name, found, here, rounds)
        with writing(out):
            out.write_text(json.dumps(data, indent=1) + "\n")
        show(f"numbers   {out}")
    if plot is not None:
        report.plot_steps(found, plot, source.name)
        show(f"plot      {plot}")


def _judge(model: str) -> Judge:
    """Samples digits from the same noise for everybody; the first that come are the reference."""
    import torch

    from cachegraph.bench.result import Quality
    from cachegraph.zoo import sample_digits
    from cachegraph.zoo.digits_quality import accuracy, psnr

    if model != "digits":
        reason = "--quality: only the model digits has a sampler here"
        raise InputError(reason, place=model, remedy="leave it out, or bench digits")
    labels, references = torch.arange(20) % 10, list[torch.Tensor]()

    def judge(model_fn: Callable[..., Any], steps: int) -> Quality:
        images = sample_digits(model_fn, labels, steps=steps)
        references.append(images)
        return Quality(psnr(images, references[0]), accuracy(images, labels), len(images))

    return judge


def _entries(
    schedules: list[str], backends: list[str], hooks: bool, without: list[str]
) -> list[Entry]:
    """What is compared: the uncached model, eager and by each backend, then every schedule."""
    from cachegraph.backends import get_backend
    from cachegraph.bench.result import UNCACHED, Entry
    from cachegraph.passes import passes_without
    from cachegraph.schedule.schedule import load_schedule

    for name in backends:
        get_backend(name)
    passes_without(without)
    asked = {Path(text).stem: load_schedule(text) for text in schedules}
    if len(asked) != len(schedules):
        raise InputError("--schedule: two schedules have one name", found=", ".join(schedules))
    lengths = {name: schedule.steps for name, schedule in asked.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {steps}" for name, steps in lengths.items())
        raise InputError("schedules of different numbers of steps cannot be compared", found=found)
    entries = [Entry(UNCACHED, None, name) for name in dict.fromkeys(("eager", *backends))]
    for name, schedule in asked.items():
        entries += [Entry(name, schedule, backend) for backend in backends]
        entries += [
            Entry(f"{name} without {one}", schedule, backend, disable=(one,))
            for one in without
            for backend in backends
        ]
        if hooks:
            entries.append(Entry(name, schedule, "eager", hooks=True))
    return entries


def _inputs(
    source: Source, batch: int | None, given: bool
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a call, of the batch that was asked for."""
    from cachegraph.compiler.compile import example_inputs

    if batch is None:
        return example_inputs(source.model, source.args, source.kwargs)
    own = getattr(source.model, "example_inputs", None)
    if given or own is None:
        raise InputError(
            "--batch: the inputs of this model come with their batch",
            remedy="say it with --input NAME=SHAPE:DTYPE",
        )
    return own(batch)
