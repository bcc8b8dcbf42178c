"""Time schedules and backends against the uncached model: one process, all in turn.

A trajectory has few kinds of steps, so each kind is timed a few times and the trajectory's time is
the sum over its steps and of what is computed once. Steps of one variant that recompute different
numbers of tokens are timed where they have the least, a middling and the most work; the time of the
others lies in between in proportion to their predicted FLOPs. The values that a step takes from
earlier ones are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cachegraph.model.trace import trace

from .contestants import Contestant, Progress, make_contestants
from .result import Entry, Measured, Quality, Spread, StepKind

Judge = Callable[[Callable[..., Any], int], Quality]  # of what is called as the model, in n steps


def run_bench(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    rounds: int = 5,
    whole: bool = False,
    choice: bool = False,
    quality: Judge | None = None,
    progress: Progress,
) -> list[Measured]:
    """Time every entry.

    Args:
        model: in eval mode.
        args: inputs, the batch as it is to be timed.
        kwargs: inputs by name.
        entries: what to compare, in the order of the result.
        rounds: how often each kind of step is timed; everybody takes a turn in each.
        whole: run whole trajectories too, as many.
        choice: also time graphs that take the first tokens instead of choosing some.
        quality: samples images and judges them; the first entry's are the reference.
        progress: is told what is being done.

    Raises:
        InputError: a schedule or backend does not fit the model.
    """
    progress("tracing the model", 0, 1)
    traced = trace(model, args, kwargs)
    contestants = make_contestants(model, traced, args, kwargs, entries, choice, progress)
    first, samples, bare = [], [], []
    before: list[list[float]] = [[] for _ in contestants]
    for index, contestant in enumerate(contestants):
        progress(f"first calls: {_label(contestant.entry)}", index, len(contestants))
        began = time.perf_counter()
        contestant.before()
        for step in contestant.points:
            contestant.call(step)
            contestant.bare(step)
        first.append(time.perf_counter() - began)
        samples.append({step: list[float]() for step in contestant.points})
        bare.append({step: list[float]() for step in contestant.points})
    device = next(model.parameters()).device
    for number, index in np.ndindex(rounds, len(contestants)):
        contestant, done = contestants[index], number * len(contestants) + index
        progress(f"timing {_label(contestant.entry)}", done, rounds * len(contestants))
        before[index].append(_seconds(device, contestant.before)[0])
        for step in contestant.points:
            samples[index][step].append(_seconds(device, contestant.call, step)[0])
            seconds, ran = _seconds(device, contestant.bare, step)
            if ran:
                bare[index][step].append(seconds)
    wholes: list[list[float]] = [[] for _ in contestants]
    for number, index in np.ndindex(rounds if whole else 0, len(contestants)):
        done = number * len(contestants) + index
        progress(f"whole: {_label(entries[index])}", done, rounds * len(contestants))
        wholes[index].append(_seconds(device, contestants[index].whole)[0])
    found = []
    for index, one in enumerate(contestants):
        progress(f"memory and quality: {_label(one.entry)}", index, len(contestants))
        times = samples[index], bare[index], before[index], wholes[index], first[index]
        judged = quality(one.sampled(), one.plan.steps) if quality else None
        found.append(replace(_measured(one, *times), memory=one.memory(), quality=judged))
    return found


def _seconds(device: torch.device, run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """How long a call takes, the device's work included, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = run(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def _label(entry: Entry) -> str:
    return f"{entry.name}, {'hooks' if entry.hooks else entry.backend}"


def _measured(
    one: Contestant,
    samples: Mapping[int, Sequence[float]],
    bare: Mapping[int, Sequence[float]],
    before: Sequence[float],
    whole: Sequence[float],
    first: float,
) -> Measured:
    by_round = _per_step(one, samples)
    chosen = {step: found for step, found in bare.items() if found}
    model_itself = one.entry.is_model
    kinds = []
    for variant in one.plan.variants:
        at = list(variant.steps)
        points = [step for step in chosen if step in at]
        # Each step against itself, so that the share does not hang on which steps were timed.
        shares = [
            1 - float(np.median(np.asarray(chosen[p]) / np.asarray(samples[p]))) for p in points
        ]
        seconds = Spread.of([float(found[at].mean()) for found in by_round])
        moved = float(np.mean([one.moved[s] for s in at])) if one.moved else None
        kinds.append(
            StepKind(
                variant.name,
                len(at),
                float(np.mean([one.cost.flops[s] for s in at])),
                seconds,
                moved,
                moved / seconds.median if moved is not None else None,
                float(np.mean(shares)) if shares else None,
            )
        )
    return Measured(
        name=one.entry.name,
        backend="hooks" if one.entry.hooks else "model" if model_itself else one.entry.backend,
        trajectory=Spread.of(
            [float(found.sum()) + once for found, once in zip(by_round, before, strict=True)]
        ),
        prologue=Spread.of(before),
        whole=Spread.of(whole) if whole else None,
        steps=tuple(float(s) for s in np.median(np.stack(by_round), axis=0)),
        kinds=tuple(kinds),
        limit=one.cost.limit,
        first_calls=first,
    )


def _per_step(one: Contestant, samples: Mapping[int, Sequence[float]]) -> list[Any]:
    """Seconds of every step, for each round."""
    rounds = len(next(iter(samples.values())))
    result = []
    for number in range(rounds):
        seconds = np.zeros(one.plan.steps)
        for variant in one.plan.variants:
            timed = sorted((one.cost.flops[s], s) for s in variant.steps if s in samples)
            known = [samples[step][number] for _, step in timed]
            work = [flops for flops, _ in timed]
            for step in variant.steps:
                exact = samples.get(step)
                between = float(np.interp(one.cost.flops[step], work, known))
                seconds[step] = exact[number] if exact is not None else between
        result.append(seconds)
    return result
