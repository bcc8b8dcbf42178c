"""Measure how much the values of every site change along uncached trajectories.

Source of the measure: Roblox/SmoothCache, ``calibration/calibration_helper.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cachegraph.errors import InputError, ScheduleError
from cachegraph.folders import writing
from cachegraph.plan.action import Forecast
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import Schedule, load_schedule

from .plot import check_plot_path, plot_calibration
from .recorder import Progress, SiteRecorder
from .result import (
    Calibration,
    calibration_block,
    goc_steps,
    smoothcache_lists,
    smoothcache_schedule,
)

_STEPS, _BOUND = 50, 0.1  # where nothing else is asked for

Sampler = Callable[[Callable[..., Any], int], object]
"""Samples one whole trajectory: ``sampler(model_fn, seed)``; ``model_fn`` is called as the model.

Where guidance calls it twice a step, each call is inside ``with model_fn.cache_context("cond"):``
or ``"uncond"``, as diffusers pipelines do.
"""


def calibrate(
    model: nn.Module,
    sampler: Sampler,
    steps: int,
    *,
    max_distance: int = 3,
    trajectories: int = 4,
    average: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Run the uncached model over trajectories and measure the change of every site's values.

    Of every trajectory only the values of the last ``max_distance`` steps are kept.

    The directions that GOC goes by are those of each trajectory's mean value over its batch. With
    ``average`` they are those of one mean over all trajectories, as the publication averages over
    classes (qiujx0520/GOC_ICCV2025, ``2-block_pth_average.py``): what differs between them cancels
    out. Every step's mean is kept then, in float32: 3.3 GB for 50 steps of DiT-XL/2.

    Args:
        model: in eval mode; it is not changed.
        sampler: runs one trajectory; it has to call the model with inputs of the same shapes.
        steps: model calls per trajectory.
        max_distance: the largest distance between two steps to compare.
        trajectories: how many to measure, with seeds from 0.
        average: over all trajectories before directions are taken.
        progress: told after every model call.

    Raises:
        InputError: an argument is out of range, or the sampler does not call the model once a step.
    """
    _check_counts(steps, max_distance, trajectories)
    recorder = SiteRecorder(model, steps, max_distance, average=average, progress=progress)
    for seed in range(trajectories):
        with recorder.trajectory(f"trajectory {seed + 1} of {trajectories}"):
            sampler(recorder, seed)
    return Calibration(recorder.sites, steps, trajectories, recorder.errors(), recorder.cosines())


def load_sampler(text: str) -> Sampler:
    """The sampler that ``module:function`` names.

    Raises:
        InputError: there is no such module or function.
    """
    from cachegraph.compiler.sources import import_function

    return import_function(text, "sampler", "a function of the model and a seed")


def digits_sampler(steps: int) -> Sampler:
    """Draws every digit once with the shipped model."""
    from cachegraph.zoo import sample_digits

    return lambda model_fn, seed: sample_digits(model_fn, range(10), steps=steps, seed=seed)


def run_calibrate(
    model: str,
    out: Path,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    bound: float | None = None,
    trajectories: int = 4,
    max_distance: int = 3,
    host: str | None = None,
    goc_weight: float | None = None,
    average: bool = False,
    plot: Path | None = None,
    arch: str | None = None,
    progress: Progress | None = None,
) -> tuple[Schedule, Calibration]:
    """Measure a model and write the schedule that follows: SmoothCache, or a host with GOC.

    Args:
        model: what ``open_model`` takes.
        out: the schedule to write, a ``.yaml`` file.
        sampler: ``module:function``; the model ``digits`` has one of its own.
        steps: model calls per trajectory; by default those of the host, else 50.
        bound: of SmoothCache, the largest relative L1 change of a reused value; by default 0.1.
        trajectories: how many to measure.
        max_distance: the most steps between a value and the one it is compared with.
        host: a schedule to correct, instead of writing SmoothCache lists.
        goc_weight: correct reused values with this weight where :func:`goc_steps` says so.
        average: see :func:`calibrate`.
        plot: a PNG to draw the curves into.
        arch: architecture of a weights file.
        progress: is told what is being done.

    Returns:
        The schedule, as written, and what was measured.

    Raises:
        InputError: the model, the sampler or an option cannot be used, or at this bound nothing
            can be reused.
    """
    from cachegraph.compiler.sources import open_model

    _check_output(out)
    if plot is not None:
        check_plot_path(plot)
    corrected = None if host is None else _load_host(host, steps, bound, goc_weight)
    if corrected is not None:
        steps = corrected.steps
    steps, bound = (_STEPS if steps is None else steps), (_BOUND if bound is None else bound)
    _check_counts(steps, max_distance, trajectories)
    _check_sampler(model, sampler)
    run = digits_sampler(steps) if sampler is None else load_sampler(sampler)
    source = open_model(model, arch=arch, need_inputs=False)
    measured = calibrate(
        source.model,
        run,
        steps,
        max_distance=max_distance,
        trajectories=trajectories,
        average=average,
        progress=progress,
    )
    schedule = _schedule(measured, corrected, bound, goc_weight, source.name)
    what = _title(host, bound, goc_weight)
    _write(schedule, out, f"{what}, calibrated on {source.name} over {measured.extent}")
    if plot is not None:
        plot_calibration(
            measured,
            plot,
            bound=bound if host is None else None,
            corrected=schedule.correction.steps if schedule.correction is not None else (),
            title=source.name,
        )
    return schedule, measured


def _load_host(
    host: str, steps: int | None, bound: float | None, goc_weight: float | None
) -> Schedule:
    """The schedule to correct, after a look at what goes with it."""
    schedule = load_schedule(host)
    if goc_weight is None:
        raise InputError("a schedule to correct needs a weight", place=host, remedy="give --goc")
    if bound is not None:
        raise InputError(
            "a schedule to correct has no bound",
            place=host,
            remedy="leave out --bound, or --schedule for SmoothCache lists",
        )
    if schedule.correction is not None:
        raise InputError(
            "the schedule has a correction already",
            place=schedule.where("correction"),
            remedy="take it out, or start from the schedule without it",
        )
    if steps not in (None, schedule.steps):
        raise InputError(
            "the number of steps does not fit the schedule",
            place=schedule.where("steps"),
            expected=f"{schedule.steps} steps",
            found=str(steps),
            remedy="leave out --steps",
        )
    # Which steps is not known yet, but a policy that takes no correction is refused before the
    # model runs.
    correction = {"method": "goc", "weight": goc_weight, "steps": (schedule.steps - 1,)}
    try:
        load_schedule(schedule.model_dump(exclude_none=True) | {"correction": correction})
    except ScheduleError as error:
        where = schedule.where("policy")
        raise ScheduleError(
            error.what, place=where, expected=error.expected, found=error.found
        ) from error
    return schedule


def _check_sampler(model: str, sampler: str | None) -> None:
    if sampler is None and model != "digits":
        raise InputError(
            "only the model digits has a sampler here",
            place=model,
            remedy="give --sampler module:function, a function of the model and a seed that "
            "samples one trajectory",
        )


def _title(host: str | None, bound: float, goc_weight: float | None) -> str:
    title = f"SmoothCache at bound {bound:g}" if host is None else Path(host).stem
    return title if goc_weight is None else f"{title} with GOC of weight {goc_weight:g}"


def _write(schedule: Schedule, out: Path, what: str) -> None:
    with writing(out):
        out.write_text(f"# {what}\n{schedule.to_yaml()}", encoding="utf-8")


def _schedule(
    measured: Calibration, host: Schedule | None, bound: float, goc_weight: float | None, name: str
) -> Schedule:
    if host is None:
        schedule = _smoothcache(measured, bound, name)
    else:
        keys = host.model_dump(exclude_none=True)
        for key, path in host.policy.files().items():  # they need not stand beside the result
            keys["policy"][key] = str(path)
        keys["calibration"] = calibration_block(measured, model=name)
        schedule = load_schedule(keys)
    return schedule if goc_weight is None else _with_goc(schedule, measured, goc_weight)


def _smoothcache(measured: Calibration, bound: float, name: str) -> Schedule:
    lists = smoothcache_lists(measured, bound)
    if all(all(rule) for rule in lists.values()):
        least = min(
            min(curve) for kind in measured.kinds for curve in measured.curves(kind) if curve
        )
        raise InputError(
            f"at bound {bound:g} no step can reuse anything",
            expected=f"a bound of at least {least:.2g}, the smallest change that was measured",
            remedy="raise --bound or take more steps",
        )
    return smoothcache_schedule(measured, bound, model=name)


def _with_goc(schedule: Schedule, measured: Calibration, weight: float) -> Schedule:
    """The schedule corrected at the steps of :func:`goc_steps` that have a change to follow."""
    both = schedule.policy.by_block
    chosen = goc_steps(measured, make_rows(schedule, measured.sites))
    keys = schedule.model_dump(exclude_none=True)
    correction = {"method": "goc", "weight": weight, "steps": chosen, "both_modules": both}
    if chosen:
        rows = make_rows(load_schedule(keys | {"correction": correction}), measured.sites)
        chosen = tuple(s for s in chosen if any(isinstance(a, Forecast) for a in rows[s]))
    if not chosen:
        raise InputError(
            "no step is to be corrected",
            expected="reused values that keep moving in one direction",
            remedy="leave out the weight of the correction",
        )
    return load_schedule(keys | {"correction": correction | {"steps": chosen}})


def _check_counts(steps: int, max_distance: int, trajectories: int) -> None:
    for name, number, least in (
        ("steps", steps, 2),
        ("trajectories", trajectories, 1),
        ("max_distance", max_distance, 1),
    ):
        if number < least:
            raise InputError(
                f"{name} is too small", expected=f"at least {least}", found=str(number)
            )
    if max_distance >= steps:
        what = "max_distance is too large"
        raise InputError(what, expected=f"less than {steps} steps", found=str(max_distance))


def _check_output(out: Path) -> None:
    if out.suffix not in (".yaml", ".yml"):
        raise InputError("schedules are written as YAML", place=str(out), expected="a .yaml file")
    if not out.parent.is_dir():
        raise InputError("there is no such folder", place=str(out.parent))
