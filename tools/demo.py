"""Sample the shipped digits model through compiled, cached step graphs.

Compiles ``digits`` under several schedules, samples the same noise with each, writes a picture
with one row a schedule, and prints what was gained and what it cost. Times are medians over rounds
in which all contestants take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from torch import Tensor

import cachegraph as cg
from cachegraph import BEGAN
from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import is_made_from, load_artifact
from cachegraph.artifact.origin import find_origin
from cachegraph.compiler.sources import model_files
from cachegraph.folders import cache_folder
from cachegraph.plan.action import Compute
from cachegraph.plan.plan import Plan
from cachegraph.schedule.schedule import load_schedule
from cachegraph.zoo import load_digits_model, sample_digits
from cachegraph.zoo.digits_quality import accuracy, psnr

SCHEDULES = (
    "fora-n2",
    "fora-n3",
    "digits-smoothcache",
    "digits-goc",
    "digits-taylorseer",
    "fora-n5",
    "toca-n3",
    "duca-n3",
)
CLASSES = list(range(10))


@dataclass
class Contestant:
    """One way of sampling, and what was measured of it."""

    name: str
    model: Callable[..., Tensor]
    computed: float  # steps that a site computes, on average
    gflops: float  # one image with guidance, all steps
    seconds: list[float] = field(default_factory=list)  # a batch of ten images
    images: list[Tensor] = field(default_factory=list)


def contestants(steps: int, progress: Progress) -> list[Contestant]:
    """The eager model, the compiled uncached one, and one a schedule; each compiled."""
    model = load_digits_model()
    full = {"cachegraph": 1, "steps": steps, "policy": {"method": "full"}}
    sources: list[tuple[str, str | dict[str, object]]] = [("compiled, uncached", full)]
    sources += [(name, name) for name in SCHEDULES]
    task = progress.add_task("compiling", total=len(sources))
    found = []
    for name, schedule in sources:
        say = partial(_describe, progress, task, name)
        artifact = compiled(name, schedule, say)
        run = cg.load(artifact)
        cost = artifact.program.cost
        images = cost.symbols.get(artifact.program.batch or "", 2 * len(CLASSES)) / 2
        gflops = cost.total_flops / images / 1e9
        found.append(Contestant(name, run, computed_steps(artifact.program.plan), gflops))
        progress.advance(task)
    uncached = found[0]
    return [Contestant("eager, uncached", model, steps, uncached.gflops), *found]


def _describe(progress: Progress, task: TaskID, name: str, text: str) -> None:
    progress.update(task, description=f"{name}: {text}")


def compiled(name: str, schedule: str | dict[str, object], say: Callable[[str], None]) -> Artifact:
    """The artifact for a schedule: the kept one, where it was made from all the same."""
    path = cache_folder("demo") / f"{name.replace(', ', '-')}.cgraph"
    batch = 2 * len(CLASSES)
    options = {"backend": "aoti", "batch": batch, "dynamic_batch": False}
    origin = find_origin("digits", model_files("digits"), load_schedule(schedule), options)
    if origin is None or not is_made_from(path, origin):
        model = load_digits_model()
        inputs = model.example_inputs(batch)
        # A fixed batch is quicker to compile.
        made = cg.compile(
            model, schedule, *inputs, backend="aoti", dynamic_batch=False, progress=say
        )
        made.save(path, say, origin)
    return load_artifact(path)


def computed_steps(plan: Plan) -> float:
    """Steps that compute a site as a whole, averaged over the sites."""
    runs = sum(isinstance(action, Compute) for row in plan.rows for action in row)
    return runs / len(plan.sites)


def measure(entries: list[Contestant], steps: int, rounds: int, progress: Progress) -> None:
    """Sample ten classes per round with every contestant in turn, from the same noise."""
    task = progress.add_task("sampling", total=rounds * len(entries))
    for seed in range(rounds):
        for entry in entries:
            progress.update(task, description=f"sampling {entry.name}")
            started = time.perf_counter()
            images = sample_digits(entry.model, CLASSES, steps=steps, seed=seed)
            entry.seconds.append(time.perf_counter() - started)
            entry.images.append(images)
            progress.advance(task)


def result_table(entries: list[Contestant], rounds: int) -> Table:
    """What was gained and what it cost."""
    eager, compiled = entries[0], entries[1]
    labels = torch.tensor(CLASSES * rounds)
    table = Table(title=f"digits: {len(labels)} images a row, {len(CLASSES)} at a time")
    table.add_column("schedule", no_wrap=True)
    for column in ("steps\nrun", "GFLOP\n/img", "sec\n/img", "vs com-\npiled"):
        table.add_column(column, justify="right")
    for column in ("vs\neager", "right\ndigit", "PSNR\ndB"):
        table.add_column(column, justify="right")
    for entry in entries:
        seconds = statistics.median(entry.seconds)
        closeness = psnr(torch.cat(entry.images), torch.cat(compiled.images))
        table.add_row(
            entry.name,
            f"{entry.computed:.3g}",
            f"{entry.gflops:.2f}",
            f"{seconds / len(CLASSES):.3f}",
            f"{statistics.median(compiled.seconds) / seconds:.2f}x",
            f"{statistics.median(eager.seconds) / seconds:.2f}x",
            f"{accuracy(torch.cat(entry.images), labels):.0%}",
            "-" if entry is compiled else f"{closeness:.1f}",
        )
    return table


def picture(entries: list[Contestant], steps: int, zoom: int = 4) -> Image.Image:
    """One row a contestant, ten classes, the same noise in every row."""
    cell, margin, gap = 16 * zoom, 150, 4
    canvas = Image.new(
        "L", (margin + len(CLASSES) * (cell + gap), len(entries) * (cell + gap)), color=24
    )
    draw = ImageDraw.Draw(canvas)
    for row, entry in enumerate(entries):
        top = row * (cell + gap)
        text = f"{entry.name}\n{entry.computed:.3g} of {steps} steps run"
        draw.multiline_text((6, top + cell // 3), text, fill=230)
        for column, image in enumerate(entry.images[0]):
            pixels = ((image[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            digit = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(digit, (margin + column * (cell + gap), top))
    return canvas


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of ten images each, to time")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    console = Console()
    steps = 50
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        entries = contestants(steps, progress)
        ready = time.time() - float(os.environ.get("DEMO_BEGAN", BEGAN))
        measure(entries, steps, arguments.rounds, progress)
    picture(entries[1:], steps).save(arguments.out)
    console.print(result_table(entries, arguments.rounds))
    limits = ", ".join(f"{e.name} {entries[1].gflops / e.gflops:.2f}x" for e in entries[2:])
    console.print(f"limit by FLOPs: {limits}")
    console.print(f"sampling began {ready:.1f} s after the command; what was compiled is kept")
    console.print(
        "steps run: of 50, those that compute a site as a whole, on average over the sites\n"
        "PSNR: against compiled, uncached images of the same noise; higher is closer"
    )
    console.print(
        f"medians of {arguments.rounds} alternating rounds, DDIM {steps} steps, guidance, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(f"picture: {arguments.out} (one row a schedule, the same noise)")


if __name__ == "__main__":
    main()
