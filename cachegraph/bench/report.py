"""What a benchmark found, as tables, data and a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn

from cachegraph.calibrate.plot import check_plot_path, figure_class
from cachegraph.errors import InputError
from cachegraph.folders import writing
from cachegraph.show.picture import amount, plain_table, plural, size

from .result import UNCACHED, Compared, Measured, Memory, Spread

_LINES, _MARKS = ("-", ":", "-."), ("o", "s", "D")  # ten colours each


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    torch: str
    device: str
    processor: str
    cores: int
    threads: int
    system: str


def machine(model: nn.Module) -> Machine:
    """This machine, and the device that the model is on."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    return Machine(
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        processor=_processor(),
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        system=platform.platform(terse=True),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Lets torch use so many threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_paths(out: Path | None, plot: Path | None) -> None:
    """Refuse early what cannot be written later.

    Raises:
        InputError: a folder is missing, or the plot is no PNG.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError("there is no such folder", place=str(out.parent))
    if plot is not None:
        check_plot_path(plot)


def report(
    model: str, found: Sequence[Measured], here: Machine, rounds: int
) -> Iterator[RenderableType]:
    """A table of trajectories, one of kinds of steps, and how they came about.

    Args:
        model: its name.
        found: what was measured; ratios are to the first that is compiled and uncached.
        here: the machine.
        rounds: how often each was timed.
    """
    steps = len(found[0].steps)
    yield Text(f"{model}: {steps} steps", "bold")
    yield ""
    yield _trajectories(found)
    yield ""
    yield _kinds(found)
    yield ""
    yield _memory(found)
    yield ""
    spread = ", all in turn, median [quartiles], ± half their distance" if rounds > 1 else ""
    yield (
        f"{plural(rounds, 'round')}{spread}; a trajectory is the sum over its steps of the time of "
        "their kind; bytes are those that a call must read and write at least"
    )
    yield from _meanings(found)
    yield "memory, at most: measured (predicted against that), beside the process itself"
    threads = plural(here.threads, "thread")
    yield f"{here.processor}, {threads}, {here.device}, torch {here.torch}"


def _meanings(found: Sequence[Measured]) -> Iterator[str]:
    """What columns mean that are not in every table."""
    if any(kind.choice is not None for one in found for kind in one.kinds):
        yield "choice: share of a call that goes into choosing tokens, gathering and scattering"
    if (quality := found[0].quality) is not None:
        yield (
            f"PSNR to the uncached model's images, mean of {quality.images}; "
            "right: share that shows the digit asked for"
        )


def _by(one: Measured) -> str:
    """What runs it, for the eye."""
    return "eager" if one.backend == "model" else one.backend


def _baselines(found: Sequence[Measured]) -> tuple[Measured, Measured]:
    """The uncached model, compiled and eager."""
    uncached = [one for one in found if one.name == UNCACHED]
    compiled = [one for one in uncached if one.backend != "model"]
    return (compiled or uncached)[0], uncached[0]


def _trajectories(found: Sequence[Measured]) -> RenderableType:
    compiled, eager = _baselines(found)
    whole = any(one.whole for one in found)
    numbers = ["seconds", *(["run whole"] if whole else []), "vs compiled", "vs eager", "limit"]
    numbers += ["PSNR dB", "right"] if any(one.quality for one in found) else []
    table = plain_table("schedule", "by", *numbers, right=tuple(numbers))
    for one in found:
        seconds = one.trajectory.median
        judged = []
        if one.quality is not None:
            psnr = "" if one.backend == "model" else f"{one.quality.psnr:.1f}"
            judged = [psnr, f"{one.quality.accuracy:.0%}"]
        cells = [_spread(one.trajectory), *([_spread(one.whole)] if whole and one.whole else [])]
        table.add_row(
            one.name,
            _by(one),
            *cells,
            f"{compiled.trajectory.median / seconds:.2f}x",
            f"{eager.trajectory.median / seconds:.2f}x",
            f"{one.limit:.2f}x" if one.name != UNCACHED else "",
            *judged,
        )
    return table


def _memory(found: Sequence[Measured]) -> RenderableType:
    kinds = [field.name for field in fields(Memory)]
    table = plain_table("schedule", "by", *kinds, right=tuple(kinds))
    for one in found:
        if one.memory is not None:
            cells = (_compared(getattr(one.memory, kind)) for kind in kinds)
            table.add_row(one.name, _by(one), *cells)
    return table


def _compared(memory: Compared) -> str:
    """``126 MiB (+0.2%)``."""
    if memory.measured is None:
        return f"({size(memory.predicted)})"
    error = memory.predicted / memory.measured - 1 if memory.measured else memory.predicted
    exact = abs(error) < 0.0005
    return size(memory.measured) if exact else f"{size(memory.measured)} ({error:+.1%})"


def _kinds(found: Sequence[Measured]) -> RenderableType:
    compiled, _ = _baselines(found)
    step = compiled.trajectory.median / len(compiled.steps)
    chosen = any(kind.choice is not None for one in found for kind in one.kinds)
    last = ["choice"] if chosen else []
    numbers = ("calls", "FLOPs", "bytes", "ms a call", "of full", "GB/s", *last)
    table = plain_table("schedule", "by", "variant", *numbers, right=numbers)
    for one in found:
        for kind in one.kinds:
            share = [] if kind.choice is None else [f"{kind.choice:.1%}"]
            table.add_row(
                one.name,
                _by(one),
                kind.variant,
                str(kind.calls),
                amount(kind.flops),
                "" if kind.moved is None else size(kind.moved),
                _brief(kind.seconds),
                f"{kind.seconds.median / step:.1%}",
                "" if kind.bandwidth is None else f"{kind.bandwidth / 1e9:.3g}",
                *share,
            )
    return table


def _spread(spread: Spread) -> str:
    """``53.2 [52.8-53.9]``; of one sample, ``53.2``."""
    low, median, high = map(_digits, (spread.low, spread.median, spread.high))
    return f"{median} [{low}-{high}]" if spread.low < spread.high else median


def _brief(spread: Spread) -> str:
    """Milliseconds and half the distance of the quartiles: ``2940 ±1.2%``; of one, ``2940``."""
    half = (spread.high - spread.low) / 2 / spread.median
    return _digits(spread.median * 1e3) + (f" ±{half:.1%}" if half else "")


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".")


def result_data(
    model: str, found: Sequence[Measured], here: Machine, rounds: int
) -> dict[str, Any]:
    """Everything as plain data, for ``--out``; times in seconds."""
    compiled, eager = _baselines(found)
    entries = []
    for one in found:
        seconds = one.trajectory.median
        ratios = {
            "versus_compiled": compiled.trajectory.median / seconds,
            "versus_eager": eager.trajectory.median / seconds,
        }
        entries.append(asdict(one) | ratios)
    return {"model": model, "rounds": rounds, "machine": asdict(here), "entries": entries}


def plot_steps(found: Sequence[Measured], path: Path, title: str) -> None:
    """Write a PNG: time of each step over the trajectory, and quality against time if judged.

    Raises:
        InputError: see :func:`cachegraph.calibrate.plot.check_plot_path`.
    """
    check_plot_path(path)
    judged = any(one.quality is not None for one in found)
    figure = figure_class()(figsize=(13 if judged else 9, 4.8), layout="constrained")
    panel, *others = figure.subplots(1, 1 + judged, squeeze=False)[0]
    for index, one in enumerate(found):
        line, point = _look(one, index)
        milliseconds = [seconds * 1e3 for seconds in one.steps]
        panel.step(range(len(one.steps)), milliseconds, where="mid", **line)
        label = f"{one.name}, {_by(one)}: {_digits(one.trajectory.median)} s"
        panel.plot([], [], label=label, **line, **point)
        for other in others:
            if one.name == UNCACHED:
                other.axvline(one.trajectory.median, **line)
            elif one.quality is not None:
                other.plot(one.trajectory.median, one.quality.psnr, **point)
    panel.set_ylabel("ms a step")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("step (0 = the first that runs)")
    for other in others:
        other.set_xlim(left=0)
        other.set_xlabel("seconds a trajectory; dashed: uncached")
        other.set_ylabel("PSNR to the uncached model, dB")
        other.margins(y=0.1)
    for one_panel in (panel, *others):
        one_panel.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    with writing(path):
        figure.savefig(path, dpi=120)


def _look(one: Measured, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of an entry's line: dashed where uncached, thin under hooks; of its point: hollow there."""
    again, colour = index // 10, f"C{index % 10}"
    style = "--" if one.name == UNCACHED else _LINES[again % len(_LINES)]
    hooks = one.backend == "hooks"
    line = {"color": colour, "linestyle": style, "linewidth": 0.7 if hooks else 1.5}
    if one.quality is None or one.name == UNCACHED:
        return line, {}
    mark = _MARKS[again % len(_MARKS)]
    inside = "none" if hooks else colour
    return line, {"marker": mark, "markeredgecolor": colour, "markerfacecolor": inside}
