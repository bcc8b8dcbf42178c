"""The command: from a model and a budget to a schedule, its figures and a picture."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cachegraph.bench.front import Point, plot_front
from cachegraph.calibrate.plot import check_plot_path
from cachegraph.compiler.sources import open_model
from cachegraph.errors import InputError
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import Schedule, load_schedule, presets

from .cost import StepCosts, measure_costs, time_run
from .images import Reference, Sampler, images_of, make_sampler
from .player import Player, Watched
from .search import Search
from .space import Candidate, Family, Way, families, starts, token_candidates
from .trials import Trials

Progress = Callable[..., object]
CHECKED = 1_000_000  # the first seed of noises that nothing is chosen by


@dataclass(frozen=True)
class Budget:
    """What a schedule may cost: one of the three.

    Attributes:
        full_steps: as many full steps.
        seconds: a run of the sampler takes no longer.
        speedup: a run takes that share of an uncached one's time.
    """

    full_steps: int | None = None
    seconds: float | None = None
    speedup: float | None = None

    def check(self, steps: int) -> None:
        """Refuse what cannot be, as far as no time has to be measured.

        Raises:
            InputError: not exactly one is given, or it is out of range.
        """
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise InputError(
                "not one budget",
                expected="one of --budget, --seconds, --speedup",
                found=" and ".join(f"--{key}" for key in given) or "none",
            )
        if self.full_steps is not None and not 1 <= self.full_steps <= steps:
            what = "no schedule has so many full steps"
            raise InputError(what, expected=f"1 to {steps}", found=str(self.full_steps))
        if self.speedup is not None and not self.speedup > 1:
            what = "no schedule is needed for that speed-up"
            raise InputError(what, expected="more than 1", found=f"{self.speedup:g}")


@dataclass(frozen=True)
class Judged:
    """Quality of a schedule on noises that nothing was chosen by.

    Attributes:
        name: of the schedule.
        full_steps: how many.
        psnr: mean over images, in dB.
        spread: standard deviation over images.
        images: how many.
        seconds: of a run of the sampler, measured; None where no time was asked for.
    """

    name: str
    full_steps: int
    psnr: float
    spread: float
    images: int
    seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search came to: the schedule, its quality, and that of presets at the same cost."""

    schedule: Schedule
    family: str
    judged: tuple[Judged, ...]
    chosen_by: float
    trials: int
    budget: Budget
    predicted: float | None = None


@dataclass
class _Setting:
    """What everything is run with."""

    name: str
    player: Player
    sampler: Sampler
    steps: int
    watched: Watched
    progress: Progress

    def references(self, seeds: Sequence[int]) -> Reference:
        """Uncached images."""
        made = {}
        for number, seed in enumerate(seeds):
            self.progress("uncached images", number, len(seeds))
            made[seed] = images_of(self.sampler(self.watched, seed))
        return Reference.of(made)

    def judge(self, name: str, schedule: Schedule, reference: Reference) -> Judged:
        """Quality of a schedule on all noises of a reference."""
        found = list[float]()
        for number, seed in enumerate(reference.images):
            self.progress(f"checking {name}", number, len(reference.images))
            runner = self.player.runner(schedule, seed)
            found += reference.psnr(seed, images_of(self.sampler(runner, seed)))
        full = plan_of(schedule, self.player.traced).full_steps()
        spread = stdev(found) if len(found) > 1 else 0.0
        return Judged(name, full, fmean(found), spread, len(found))


def run_search(
    model: str,
    out: Path,
    budget: Budget,
    *,
    sampler: str | None = None,
    prompts: Path | None = None,
    steps: int = 50,
    trials: int = 400,
    noises: int = 4,
    check: int = 4,
    seed: int = 0,
    backend: str = "eager",
    arch: str | None = None,
    progress: Progress,
) -> Found:
    """Search, check, and write schedule, figures, log and picture beside each other.

    Args:
        model: what ``open_model`` takes, or with ``prompts`` a diffusers pipeline's folder.
        out: the schedule, a ``.yaml`` file.
        budget: what it may cost.
        sampler: ``module:function``; the model ``digits`` has one of its own.
        prompts: a text file, one prompt a line.
        steps: model calls of a trajectory.
        trials: the most trajectories that are sampled to choose by.
        noises: seeds to choose by.
        check: other seeds, for the figures.
        seed: of the search; other noises and other choices.
        backend: that runs the schedule where times count.
        arch: architecture of a weights file.
        progress: is told what is being done.

    Raises:
        InputError: something cannot be used, or the budget cannot be met.
    """
    budget.check(steps)
    if out.suffix not in (".yaml", ".yml"):
        raise InputError("schedules are written as YAML", place=str(out), expected="a .yaml file")
    check_plot_path(out.with_suffix(".png"))
    settings = {"model": model, "steps": steps, "noises": noises, "seed": seed, "sampler": sampler}
    log = Trials.open(out.with_suffix(".trials.jsonl"), settings | asdict(budget))
    run = make_sampler(model, sampler, steps, prompts)
    source = getattr(run, "model", None) or open_model(model, arch=arch, need_inputs=False).model
    watched = Watched(source)
    seeds = [1000 * seed + number for number in range(noises)]
    began = time.perf_counter()
    images_of(run(watched, seeds[0]))
    around = time.perf_counter() - began - watched.seconds
    _check_calls(watched, steps)
    player = Player(source, *(watched.call or ((), {})))
    setting = _Setting(model, player, run, steps, watched, progress)
    reference = setting.references(seeds)
    choice = families(player.traced, ranges=budget.full_steps is None)
    tokens = token_candidates(player.traced, steps) if budget.full_steps is None else []
    costs, counts = _counts(budget, setting, choice, tokens, around, backend, seeds[0])
    choice = [family for family in choice if counts[family]]
    found = Search(player, run, steps, seeds, reference, log, trials, random.Random(seed), progress)
    others = [] if costs is None else _affordable(tokens, costs, _seconds(budget, costs))
    best = found.run(choice, counts, others)
    return _finish(setting, best, found, budget, costs, check, backend, out)


def _check_calls(watched: Watched, steps: int) -> None:
    if not watched.calls or any(count != steps for count in watched.calls.values()):
        raise InputError(
            "the sampler does not call the model once a step",
            expected=f"{steps} calls",
            found=", ".join(str(count) for count in watched.calls.values()) or "none",
            remedy="say --steps; where guidance makes calls of its own, put each into "
            'model.cache_context("cond") or ("uncond")',
        )


def _counts(
    budget: Budget,
    setting: _Setting,
    choice: Sequence[Family],
    tokens: Sequence[Candidate],
    around: float,
    backend: str,
    seed: int,
) -> tuple[StepCosts | None, dict[Way, int]]:
    """How many full steps each family can have."""
    if budget.full_steps is not None:
        return None, dict.fromkeys(choice, budget.full_steps)
    watched = setting.watched
    call = watched.call or ((), {})
    costs = measure_costs(
        watched.model, call, choice, tokens, setting.steps, around, backend, setting.progress
    )
    seconds = _seconds(budget, costs)
    costs.check(choice, seconds)
    # Steps in a sampler are not quite what they are alone: one whole run says by how much.
    probe = max(choice, key=lambda family: costs.most(family, seconds))
    count = costs.most(probe, seconds)
    schedule = probe.schedule(setting.steps, starts(setting.steps, count)[0])
    setting.progress("timing a run", 0, 1)
    taken = time_run(watched.model, setting.player.traced, schedule, setting.sampler, backend, seed)
    costs = replace(costs, factor=taken / costs.seconds(probe, count))
    seconds = _seconds(budget, costs)
    costs.check(choice, seconds)
    return costs, {family: costs.most(family, seconds) for family in choice}


def _affordable(
    tokens: Sequence[Candidate], costs: StepCosts, seconds: float
) -> Iterator[Candidate]:
    """Of each share of tokens the candidate with the most full steps that the time allows."""
    fitting = [one for one in tokens if costs.seconds(one.family, len(one.full)) <= seconds]
    best = {one.family.sites: one for one in sorted(fitting, key=lambda one: len(one.full))}
    yield from best.values()


def _seconds(budget: Budget, costs: StepCosts) -> float:
    if budget.seconds is not None:
        return budget.seconds
    return costs.uncached() / (budget.speedup or 1.0)


def _finish(
    setting: _Setting,
    best: Candidate,
    search: Search,
    budget: Budget,
    costs: StepCosts | None,
    check: int,
    backend: str,
    out: Path,
) -> Found:
    schedule = best.family.schedule(setting.steps, best.full)
    seeds = [CHECKED + number for number in range(check)]
    reference = setting.references(seeds)
    judged = [setting.judge(out.stem, schedule, reference)]
    for name, other in _rivals(setting, len(best.full)):
        judged.append(setting.judge(name, other, reference))
    predicted = None
    if costs is not None:
        predicted = costs.seconds(best.family, len(best.full))
        setting.progress("timing the schedule", 0, 1)
        model, traced = setting.watched.model, setting.player.traced
        taken = time_run(model, traced, schedule, setting.sampler, backend, seeds[0])
        judged[0] = replace(judged[0], seconds=taken)
    score = search.score(best, len(search.seeds))
    found = Found(
        schedule, best.family.name, tuple(judged), score, search.sampled, budget, predicted
    )
    _write(found, search, out, setting.name)
    return found


def _rivals(setting: _Setting, count: int) -> Iterator[tuple[str, Schedule]]:
    """Presets with as many full steps that fit the model."""
    for name in presets():
        schedule = load_schedule(name)
        if schedule.steps != setting.steps:
            continue
        try:
            plan = plan_of(schedule, setting.player.traced)
        except InputError:
            continue  # made for another model, or its file is not here
        if plan.full_steps() == count:
            yield name, schedule


def _write(found: Found, search: Search, out: Path, model: str) -> None:
    best = found.judged[0]
    cost = f"{best.full_steps} of {found.schedule.steps} steps full"
    lines = [
        f"# Found by search on {model}: {cost}, {found.family}.",
        f"# {best.psnr:.2f} dB PSNR to uncached images, mean of {best.images} that it was not "
        f"chosen by; {found.chosen_by:.2f} dB on those that it was.",
    ]
    out.write_text("\n".join([*lines, found.schedule.to_yaml()]), encoding="utf-8")
    data: dict[str, Any] = {
        "model": model,
        "budget": {key: v for key, v in asdict(found.budget).items() if v is not None},
        "family": found.family,
        "trials": found.trials,
        "psnr_chosen_by": found.chosen_by,
        "predicted_seconds": found.predicted,
        "checked": [asdict(one) for one in found.judged],
    }
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    points = [Point(one.name, one.full_steps, one.psnr, one is best) for one in found.judged]
    tried = {
        key: fmean(by_seed.values())
        for key, by_seed in search.trials.scores.items()
        if len(by_seed) == len(search.seeds)
    }
    plot_front(points, tried, out.with_suffix(".png"), f"{model}, {cost}")
