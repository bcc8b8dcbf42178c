"""Sample the shipped digits model through compiled, cached step graphs.

Compiles ``digits`` under several schedules, samples the same noise with each, writes a picture
with one row a schedule, and prints what was gained and what it cost. The picture stands as soon as
two schedules are compiled; the others are added to it. Times are medians over rounds in which all
contestants take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from torch import Tensor, nn

import cachegraph as cg
from cachegraph import BEGAN
from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import is_made_from, load_artifact
from cachegraph.artifact.origin import Origin, find_origin
from cachegraph.compiler.compile import assemble, build
from cachegraph.compiler.sources import model_files
from cachegraph.folders import cache_folder
from cachegraph.model.trace import TracedModel, trace
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
FIRST_ROWS = 3  # that the picture has when it is first written
CLASSES = list(range(10))
BATCH = 2 * len(CLASSES)  # with guidance


@dataclass
class Contestant:
    """One way of sampling, and what was measured of it."""

    name: str
    model: Callable[..., Tensor]
    computed: float  # steps that a site computes, on average
    gflops: float  # one image with guidance, all steps
    images: list[Tensor]  # ten a round; the first are those of the picture
    seconds: list[float] = field(default_factory=list)  # of each round but the first


@dataclass(frozen=True)
class Source:
    """What one row is made from, and where that is kept."""

    name: str
    schedule: str | dict[str, object] = field(hash=False)

    @property
    def path(self) -> Path:
        return cache_folder("demo") / f"{self.name.replace(', ', '-')}.cgraph"

    def origin(self) -> Origin | None:
        options = {"backend": "aoti", "batch": BATCH, "dynamic_batch": False}
        schedule = load_schedule(self.schedule)
        return find_origin("digits", model_files("digits"), schedule, options)


def contestants(steps: int, out: Path, progress: Progress) -> list[Contestant]:
    """The eager model, the compiled uncached one, and one a schedule; each compiled.

    The picture is written as soon as it has three rows, and anew with every other one.
    """
    full = {"cachegraph": 1, "steps": steps, "policy": {"method": "full"}}
    sources = [Source("compiled, uncached", full), *(Source(name, name) for name in SCHEDULES)]
    task = progress.add_task("compiling", total=len(sources))
    found: list[Contestant] = []
    for source, artifact in made(sources, partial(_describe, progress, task)):
        _describe(progress, task, source.name, "sampling")
        cost = artifact.program.cost
        images = cost.symbols.get(artifact.program.batch or "", BATCH) / 2
        gflops = cost.total_flops / images / 1e9
        run = cg.load(artifact)
        first = sample_digits(run, CLASSES, steps=steps, seed=0)
        computed = computed_steps(artifact.program.plan)
        entry = Contestant(source.name, run, computed, gflops, [first])
        found.append(entry)
        progress.advance(task)
        if len(found) >= FIRST_ROWS:
            picture(found, steps).save(out)
        if len(found) == FIRST_ROWS:
            left = ", ".join(other.name for other in sources[FIRST_ROWS:])
            say = f"{out} stands after {elapsed():.0f} s; rows to come: {left}"
            progress.console.print(say)
    model = load_digits_model()
    first = sample_digits(model, CLASSES, steps=steps, seed=0)
    return [Contestant("eager, uncached", model, steps, found[0].gflops, [first]), *found]


def elapsed() -> float:
    """Seconds since the command was given."""
    return time.time() - float(os.environ.get("DEMO_BEGAN", BEGAN))


def _describe(progress: Progress, task: TaskID, name: str, text: str) -> None:
    progress.update(task, description=f"{name}: {text}")


def made(
    sources: Sequence[Source], say: Callable[[str, str], None]
) -> Iterator[tuple[Source, Artifact]]:
    """The artifact of each: the kept one, where it was made from all the same.

    Compilers are processes of their own, so graphs of the next ones are rewritten meanwhile.
    """
    origins = {source: source.origin() for source in sources}
    missing = [s for s, o in origins.items() if o is None or not is_made_from(s.path, o)]
    building: dict[Source, Future[Artifact]] = {}
    pool = ThreadPoolExecutor(1)
    try:
        if missing:
            say(missing[0].name, "tracing the model")
            model = load_digits_model()
            # A fixed batch is quicker to compile.
            traced = trace(model, *model.example_inputs(BATCH), dynamic_batch=False)
            for source in missing:
                building[source] = pool.submit(_build, traced, model, source.schedule)
        for source in sources:
            if source in building:
                say(source.name, "rewriting the graphs")
                artifact = building.pop(source).result()
                artifact.save(source.path, partial(say, source.name), origins[source])
            yield source, load_artifact(source.path)
    finally:
        pool.shutdown(cancel_futures=True)


def _build(traced: TracedModel, model: nn.Module, schedule: str | dict[str, object]) -> Artifact:
    return assemble(build(model, schedule, traced=traced), "aoti")


def computed_steps(plan: Plan) -> float:
    """Steps that compute a site as a whole, averaged over the sites."""
    runs = sum(isinstance(action, Compute) for row in plan.rows for action in row)
    return runs / len(plan.sites)


def measure(entries: list[Contestant], steps: int, rounds: int, progress: Progress) -> None:
    """Sample ten classes per round with every contestant in turn, from the same noise."""
    task = progress.add_task("sampling", total=rounds * len(entries))
    for seed in range(1, rounds + 1):  # the first round warmed up
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
    labels = torch.tensor(CLASSES * (rounds + 1))
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
    parser.add_argument(
        "--rounds", type=int, default=4, help="of ten images, to time after a first one"
    )
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    console = Console()
    steps = 50
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        entries = contestants(steps, arguments.out, progress)
        ready = elapsed()
        measure(entries, steps, arguments.rounds, progress)
    console.print(result_table(entries, arguments.rounds))
    limits = ", ".join(f"{e.name} {entries[1].gflops / e.gflops:.2f}x" for e in entries[2:])
    console.print(f"limit by FLOPs: {limits}")
    console.print(f"all rows stood {ready:.1f} s after the command; what was compiled is kept")
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
