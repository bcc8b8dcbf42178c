"""Schedules side by side: quality of final images against measured time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from cachegraph.bench.front import Point, front, plot_front
from cachegraph.calibrate.plot import check_plot_path
from cachegraph.compiler.compile import assemble, build
from cachegraph.compiler.sources import open_model
from cachegraph.errors import InputError
from cachegraph.images.metrics import mean_flip
from cachegraph.model.trace import trace
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.schedule import Schedule, load_schedule

from .images import Images, Reference, Sampler, images_of, make_sampler
from .player import Watched
from .run import CHECKED

Progress = Callable[..., object]
UNCACHED = "uncached"


@dataclass(frozen=True)
class Compared:
    """One schedule.

    Attributes:
        name: of the schedule, or ``uncached``.
        full_steps: how many.
        seconds: median of a run of the sampler.
        speedup: over uncached.
        psnr: mean over images against uncached ones, in dB; None for these.
        ssim: mean likewise, where torchmetrics is installed and images are pictures.
        flip: mean likewise, where flip_evaluator is.
        front: no other is as good in less time, or better in as much.
    """

    name: str
    full_steps: int
    seconds: float
    speedup: float
    psnr: float | None
    ssim: float | None
    flip: float | None
    front: bool = False


def compare(
    model: str,
    schedules: Sequence[str],
    *,
    sampler: str | None = None,
    prompts: Path | None = None,
    seeds: int = 4,
    rounds: int = 3,
    backend: str = "inductor",
    arch: str | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    progress: Progress,
) -> list[Compared]:
    """Sample the same noises uncached and under every schedule; time all in turn.

    Args:
        model: what ``open_model`` takes, or with ``prompts`` a diffusers pipeline's folder.
        schedules: files or presets, of one number of steps.
        sampler: ``module:function``; the model ``digits`` has one of its own.
        prompts: a text file, one prompt a line.
        seeds: noises; those of ``search`` that nothing is chosen by.
        rounds: how often each is timed.
        backend: that runs the graphs; ``uncached`` is the model itself.
        arch: architecture of a weights file.
        out: a JSON file for the numbers.
        plot: a PNG.
        progress: is told what is being done.

    Returns:
        Uncached first, then in the order of the schedules.

    Raises:
        InputError: something cannot be used.
    """
    asked = _asked(schedules)
    if plot is not None:
        check_plot_path(plot)
    run = make_sampler(model, sampler, next(iter(asked.values())).steps, prompts)
    source = getattr(run, "model", None) or open_model(model, arch=arch, need_inputs=False).model
    watched, noises = Watched(source), range(CHECKED, CHECKED + seeds)
    progress("uncached images", 0, 1)
    reference = Reference.of({seed: images_of(run(watched, seed)) for seed in noises})
    args, kwargs = watched.call or ((), {})
    traced, runners = trace(source, args, kwargs), dict[str, Runner]()
    for number, (name, schedule) in enumerate(asked.items()):
        progress(f"compiling {name}", number, len(asked))
        runners[name] = assemble(build(source, schedule, traced=traced), backend).runner()
    quality = {}
    for number, (name, runner) in enumerate(runners.items()):
        progress(f"images of {name}", number, len(runners))
        made = {seed: images_of(run(runner, seed)) for seed in noises}
        decibels = [psnr for seed in noises for psnr in reference.psnr(seed, made[seed])]
        pair = _pictures(made, reference)
        similar = (None, None) if pair is None else (_ssim(*pair), _flip(*pair))
        quality[name] = fmean(decibels), *similar
    taken = _timed({UNCACHED: watched, **runners}, run, rounds, progress)
    found = _found(asked, taken, quality, runners)
    if out is not None:
        numbers = [asdict(one) for one in found]
        data = {"model": model, "backend": backend, "noises": seeds, "compared": numbers}
        out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        points = [Point(c.name, c.seconds, c.psnr) for c in found if c.psnr is not None]
        plot_front(points, {}, plot, f"{model}, {backend}", "seconds of a run")
    return found


def _asked(schedules: Sequence[str]) -> dict[str, Schedule]:
    """The schedules by name."""
    asked = {Path(text).stem: load_schedule(text) for text in schedules}
    if len(asked) != len(schedules):
        raise InputError("two schedules have one name", found=", ".join(schedules))
    if len({schedule.steps for schedule in asked.values()}) != 1:
        listed = ", ".join(f"{name}: {one.steps}" for name, one in asked.items())
        what = "schedules of different numbers of steps cannot be compared"
        raise InputError(what, found=listed)
    return asked


def _timed(
    everyone: Mapping[str, Callable[..., Any]], run: Sampler, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of whole runs, all in turn."""
    taken: dict[str, list[float]] = {name: [] for name in everyone}
    for number in range(rounds):
        for name, model_fn in everyone.items():
            progress(f"timing {name}", number, rounds)
            began = time.perf_counter()
            run(model_fn, CHECKED)
            taken[name].append(time.perf_counter() - began)
    return taken


def _found(
    asked: dict[str, Schedule],
    taken: dict[str, list[float]],
    quality: dict[str, tuple[float, float | None, float | None]],
    runners: dict[str, Runner],
) -> list[Compared]:
    seconds = {name: median(times) for name, times in taken.items()}
    best = front([Point(name, seconds[name], quality[name][0]) for name in asked])
    names = {point.name for point in best}
    steps = next(iter(asked.values())).steps
    found = [Compared(UNCACHED, steps, seconds[UNCACHED], 1.0, None, None, None)]
    for name in asked:
        full = runners[name].program.plan.full_steps()
        ratio = seconds[UNCACHED] / seconds[name]
        found.append(Compared(name, full, seconds[name], ratio, *quality[name], name in names))
    return found


def _pictures(made: dict[int, Images], reference: Reference) -> tuple[Tensor, Tensor] | None:
    """Images and wanted ones ``(N, C, H, W)``, 0 to 1 where these are; None if no pictures."""
    images = torch.cat(list(made.values()))
    wanted = torch.cat([reference.images[seed] for seed in made])
    if images.ndim != 4:
        return None
    if images.shape[1] not in (1, 3, 4):  # pipelines may put channels last
        images, wanted = images.movedim(-1, 1), wanted.movedim(-1, 1)
    if images.shape[1] not in (1, 3, 4) or min(images.shape[2:]) < 16:
        return None
    return (images - reference.low) / reference.peak, (wanted - reference.low) / reference.peak


def _ssim(images: Tensor, wanted: Tensor) -> float | None:
    """Mean structural similarity, by torchmetrics; None where it is not there."""
    if find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(
        torch.as_tensor(structural_similarity_index_measure(images, wanted, data_range=1.0))
    )


def _flip(images: Tensor, wanted: Tensor) -> float | None:
    """Mean FLIP; a grey picture has three equal channels; of four the fourth is opacity."""
    shown = [part[:, :3] for part in (images, wanted)]
    one, other = (part.expand(-1, 3, -1, -1).movedim(1, -1).contiguous().numpy() for part in shown)
    return mean_flip(one, other)
