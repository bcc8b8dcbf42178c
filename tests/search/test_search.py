"""Searching for a schedule: what is run, what is chosen, how it is resumed and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import cachegraph as cg
from cachegraph.bench.front import Point, front
from cachegraph.cli import app
from cachegraph.errors import InputError
from cachegraph.schedule.schedule import Schedule, load_schedule
from cachegraph.search import run as running
from cachegraph.search.cost import PlaceCost, StepCosts, measure_costs
from cachegraph.search.images import Reference, images_of
from cachegraph.search.player import Player
from cachegraph.search.run import CHECKED, Budget, Found, run_search
from cachegraph.search.space import (
    Candidate,
    Family,
    Tokens,
    families,
    mutated,
    neighbours,
    starts,
    token_candidates,
)
from tests.models import compile_traced, shared_dit, tiny_dit
from tests.tiny import call, long_drift, tiny, traced

STEPS = 8  # of long_drift
MODEL, SAMPLER = "tests.tiny:tiny", "tests.tiny:long_drift"
STACK = (("kinds", ("stack",)),)


def player(**options: Any) -> Player:
    return Player(tiny(), call(0), {}, **options)


def search(out: Path, budget: Budget, **options: Any) -> Found:
    given = {"trials": 60, "noises": 2, "check": 2, "progress": lambda *_: None} | options
    return run_search(MODEL, out, budget, sampler=SAMPLER, steps=STEPS, **given)


# --- running many schedules


@cache
def drawn(schedule: Schedule, seed: int) -> Tensor:
    """By an artifact of the schedule alone."""
    return long_drift(cg.load(compile_traced(tiny(), traced(), schedule)), seed)


@pytest.mark.parametrize("remember", [1 << 20, 5_000, 0])
def test_what_is_remembered_changes_nothing(remember: int) -> None:
    """Schedules with common beginnings, each against an artifact of its own."""
    plays = player(remember=remember)
    modules = (("kinds", ("attn", "mlp")),)
    asked = [
        *[Family(STACK, "lagrange", 1).schedule(STEPS, full) for full in ((0, 2, 5), (0, 2, 6))],
        Family(STACK, "lagrange", 2).schedule(STEPS, (0, 2, 5)),
        Family(STACK, "foca").schedule(STEPS, (0, 2, 5)),
        Family(modules, "taylor", 1).schedule(STEPS, (0, 2, 5)),
        Family(STACK, "lagrange", 1).schedule(STEPS, (0, 2, 3)),
    ]
    for schedule in [*asked, *asked]:
        for seed in (0, 1):
            found = long_drift(plays.runner(schedule, seed), seed)
            assert torch.equal(found, drawn(schedule, seed))


def test_equal_beginnings_run_once() -> None:
    plays, steps = player(), list[int]()

    def count(schedule: Any, seed: int) -> int:
        steps.clear()
        runner = plays.runner(schedule, seed)
        run_step = runner.run_step
        runner.run_step = lambda step, *rest: (steps.append(step), run_step(step, *rest))[1]
        long_drift(runner, seed)
        return len(steps)

    family = Family(STACK, "lagrange", 1)
    assert count(family.schedule(STEPS, (0, 2, 5)), 0) == STEPS
    assert count(family.schedule(STEPS, (0, 2, 5)), 0) == 0
    assert count(family.schedule(STEPS, (0, 2, 6)), 0) == STEPS - 5
    assert count(family.schedule(STEPS, (0, 2, 5)), 1) == STEPS
    graphs = len(plays._graphs)
    count(family.schedule(STEPS, (0, 1, 4)), 0)
    assert len(plays._graphs) == graphs  # other steps, no other graph


# --- what may be chosen


def test_families_are_those_that_fit() -> None:
    found = families(traced(), ranges=False)
    places = {family.sites for family in found}
    assert places == {STACK, (("kinds", ("attn", "mlp")),)}
    assert {family.basis for family in found} >= {"lagrange", "foca", "chebyshev", "adams"}
    assert all(family.schedule(STEPS, (0, 2, 5)) for family in found)


def test_tokens_are_chosen_where_toca_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = token_candidates(shared_dit()[1], STEPS)
    keys = [one.key for one in found]
    assert "toca 0.1 interval 2: 0 1 3 5 7" in keys
    assert len(set(keys)) == len(keys) == 36
    other = {"cachegraph": 1, "steps": STEPS, "sites": {"kinds": ["cross_attn"]}}
    other |= {"policy": {"method": "fora", "interval": 3}}
    monkeypatch.setattr(Tokens, "schedule", lambda *_: load_schedule(other))
    assert token_candidates(shared_dit()[1], STEPS) == []  # it has no such sites


def dit_drift(model_fn: Any, seed: int) -> Tensor:
    """As ``long_drift``, with a DiT."""
    noise = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1, 4, 8, 8, generator=noise), torch.tensor([3])
    for step in range(STEPS):
        x = x - 0.2 * model_fn(x, torch.full((1,), 900 - 100 * step), y)[:, :4]
    return x


def dit() -> nn.Module:
    return tiny_dit()


def test_tokens_are_recomputed_as_in_an_artifact() -> None:
    """Beginnings that look alike are not where ToCa keeps an order of tokens beside the values."""
    model, made = shared_dit()
    args = torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), torch.tensor([3])
    plays = Player(model, args, {})
    modules = Family((("kinds", ("attn", "mlp")),), "lagrange", 1)
    for one in (modules, Tokens(0.35, 5), Tokens(0.1, 3)):
        schedule = one.schedule(STEPS, (0, 7))
        wanted = dit_drift(cg.load(compile_traced(model, made, schedule)), 1)
        assert torch.equal(dit_drift(plays.runner(schedule, 1), 1), wanted)


@pytest.mark.parametrize(("partial", "tokens"), [(0.0, True), (0.65, False)])
def test_tokens_win_where_they_are_closer_in_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: float, tokens: bool
) -> None:
    """Other steps skip for 0.6 s: in 5.1 s a forecast has one full step, ToCa five or none."""
    cost = PlaceCost(0.0, 1.0, 0.6, 0.0)

    def costs(
        _model: Any, _call: Any, choice: list[Any], others: list[Candidate], steps: int, *_: Any
    ) -> StepCosts:
        places = {family.sites: cost for family in choice}
        places |= {one.family.sites: replace(cost, skipped=partial) for one in others}
        return StepCosts(steps, 0.0, places)

    monkeypatch.setattr(running, "measure_costs", costs)
    monkeypatch.setattr(running, "time_run", lambda *_: 1.0 + 7 * 0.6)
    given: dict[str, Any] = {"trials": 12, "noises": 1, "check": 1, "progress": lambda *_: None}
    module = "tests.search.test_search"
    found = run_search(
        f"{module}:dit",
        tmp_path / "a.yaml",
        Budget(seconds=5.2),
        sampler=f"{module}:dit_drift",
        steps=STEPS,
        **given,
    )
    assert (found.schedule.policy.method == "toca") == tokens
    assert found.judged[0].full_steps == (5 if tokens else 1)


@pytest.mark.parametrize(("steps", "count"), [(50, 10), (50, 1), (8, 3), (5, 5), (20, 19)])
def test_starts_and_moves_stay_in_range(steps: int, count: int) -> None:
    import random

    chance, family = random.Random(0), Family(STACK, "lagrange", 1)
    lists = starts(steps, count)
    pool = [Candidate(family, full) for full in lists]
    for one in list(pool):
        pool += neighbours(one, steps, chance)
    pool += [mutated(pool, steps, [family], chance) for _ in range(50)]
    for one in pool:
        assert one.full[0] == 0
        assert len(set(one.full)) == count
        assert list(one.full) == sorted(one.full)
        assert one.full[-1] < steps


# --- the search


def test_a_list_among_the_best_is_found(tmp_path: Path) -> None:
    """On the noises that it is chosen by; all lists of its family are tried here."""
    out = tmp_path / "found.yaml"
    found = search(out, Budget(full_steps=3), trials=150)
    policy = load_schedule(out).policy
    assert load_schedule(out) == found.schedule
    plays = player()
    reference = Reference.of({seed: images_of(long_drift(tiny(), seed)) for seed in (0, 1)})

    def score(full: tuple[int, ...]) -> float:
        keys = found.schedule.model_dump(exclude_none=True)
        schedule = load_schedule(keys | {"policy": keys["policy"] | {"full_steps": full}})
        values = [
            psnr
            for seed in (0, 1)
            for psnr in reference.psnr(
                seed, images_of(long_drift(plays.runner(schedule, seed), seed))
            )
        ]
        return sum(values) / len(values)

    every = {(0, *rest): score((0, *rest)) for rest in combinations(range(1, STEPS), 2)}
    ranked = sorted(every.values(), reverse=True)
    assert found.chosen_by >= ranked[2] - 1e-3
    assert found.chosen_by >= max(every[full] for full in starts(STEPS, 3)) - 1e-3
    assert every[policy.full_steps] == pytest.approx(found.chosen_by, abs=1e-3)


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "found.yaml"
    found = search(out, Budget(full_steps=3))
    assert out.read_text().startswith("# Found by search on tests.tiny:tiny: 3 of 8 steps full")
    data = json.loads(out.with_suffix(".json").read_text())
    assert data["checked"][0]["psnr"] == found.judged[0].psnr
    assert data["checked"][0]["images"] == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = out.with_suffix(".trials.jsonl").read_text().splitlines()
    seeds = {json.loads(line)["seed"] for line in lines[1:]}
    assert seeds == {0, 1}
    assert max(seeds) < CHECKED


def test_it_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.yaml"
    whole = search(out, Budget(full_steps=3))
    log = out.with_suffix(".trials.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:31]) + "\n")
    sampled = []
    usual = running.images_of
    monkeypatch.setattr(
        "cachegraph.search.search.images_of", lambda made: sampled.append(1) or usual(made)
    )
    again = search(out, Budget(full_steps=3))
    assert again.schedule == whole.schedule
    assert log.read_text().splitlines() == lines
    assert len(sampled) == len(lines) - 31
    with pytest.raises(InputError, match="the log is of another search"):
        search(out, Budget(full_steps=4))
    log.write_text(lines[0] + "\nnonsense\n")
    with pytest.raises(InputError, match="not the log of a search"):
        search(out, Budget(full_steps=3))


def test_a_time_is_met_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[StepCosts] = []

    def once(*args: Any) -> StepCosts:
        if not measured:
            measured.append(measure_costs(*args))
        return measured[0]

    monkeypatch.setattr(running, "measure_costs", once)
    with pytest.raises(InputError, match=r"one full step.* to .*uncached") as caught:
        search(tmp_path / "a.yaml", Budget(seconds=1e-9))
    low, high = [float(word) for word in str(caught.value).split() if _is_number(word)][:2]
    assert 0 < low < high
    with pytest.raises(InputError, match="no schedule takes this time"):
        search(tmp_path / "b.yaml", Budget(seconds=1e3))
    with pytest.raises(InputError, match="no schedule takes this time"):
        search(tmp_path / "c.yaml", Budget(speedup=1e6))


def test_a_time_becomes_full_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 s a full step and 0.1 s a skipped one: in 4 s, 3 of 8; on a machine half as fast, 1."""
    cost = PlaceCost(0.0, 1.0, 0.1, 0.0)

    def costs(
        _model: Any, _call: Any, choice: list[Family], tokens: Any, steps: int, *_: Any
    ) -> StepCosts:
        everyone = [*choice, *(one.family for one in tokens)]
        return StepCosts(steps, 0.0, {family.sites: cost for family in everyone})

    monkeypatch.setattr(running, "measure_costs", costs)
    for factor, full in ((1.0, 3), (2.0, 1)):
        monkeypatch.setattr(running, "time_run", lambda *_, factor=factor: factor * 3.5)
        out = tmp_path / f"{full}.yaml"
        found = search(out, Budget(seconds=4.0), trials=20, noises=1, check=1)
        assert found.judged[0].full_steps == full
        assert found.predicted == pytest.approx(factor * (full + (STEPS - full) * 0.1))
        assert found.judged[0].seconds == factor * 3.5


def _is_number(word: str) -> bool:
    return word.replace(".", "").replace("e-", "").isdigit()


def test_costs_say_how_many_full_steps_fit() -> None:
    """0.5 s around, 0.1 once, 1 a full step, 0.01 a skipped one and 0.002 for every value more."""
    family, deep = Family(STACK, "lagrange", 1), Family(STACK, "lagrange", 3)
    costs = StepCosts(10, 0.5, {STACK: PlaceCost(0.1, 1.0, 0.01, 0.002)})
    assert costs.seconds(family, 4) == pytest.approx(0.6 + 4 + 6 * 0.01)
    assert costs.seconds(deep, 4) == pytest.approx(0.6 + 4 + 6 * 0.014)
    assert costs.seconds(deep, 2) == pytest.approx(0.6 + 2 + 8 * 0.01)
    assert costs.uncached() == pytest.approx(10.5)
    for count in range(1, 11):
        assert costs.most(family, costs.seconds(family, count) + 1e-6) == count
    assert costs.most(family, 1.0) == 0
    slower = replace(costs, factor=2.0)
    assert slower.seconds(family, 4) == 2 * costs.seconds(family, 4)
    costs.check([family], 5.0)
    with pytest.raises(InputError, match=r"1.69 s \(one full step\) to 10.5 s \(uncached\)"):
        costs.check([family], 1.6)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(full_steps=0), "no schedule has so many full steps; expected 1 to 8; found 0"),
        (Budget(full_steps=9), "no schedule has so many full steps; expected 1 to 8; found 9"),
        (Budget(), "not one budget"),
        (Budget(full_steps=3, seconds=1.0), "not one budget"),
        (Budget(speedup=0.5), "no schedule is needed for that speed-up"),
    ],
)
def test_bad_budgets_are_refused(budget: Budget, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        search(tmp_path / "found.yaml", budget)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_sampler_of_other_steps_is_refused(tmp_path: Path) -> None:
    given = {"trials": 9, "noises": 1, "check": 1, "progress": lambda *_: None}
    with pytest.raises(InputError, match="once a step"):
        run_search(
            MODEL, tmp_path / "a.yaml", Budget(full_steps=2), sampler=SAMPLER, steps=9, **given
        )


# --- images and pictures


def test_psnr_against_numbers() -> None:
    black = torch.zeros(2, 1, 4, 4)
    reference = Reference.of({0: torch.cat([black[:1], black[:1] + 1])})
    assert reference.peak == 1
    assert reference.psnr(0, reference.images[0] + 0.1) == pytest.approx([20.0, 20.0], abs=1e-4)
    assert reference.psnr(0, reference.images[0] * torch.nan) == [0.0, 0.0]
    assert Reference.of({0: black - 1}).peak == 2
    assert Reference.of({0: torch.tensor([[3.0, -5.0]])}).peak == 8
    with pytest.raises(InputError, match="another shape"):
        reference.psnr(0, black[:1])


@pytest.mark.parametrize("made", [None, "images", torch.tensor(3.0), []])
def test_samplers_without_images_are_refused(made: object) -> None:
    with pytest.raises(InputError, match="the sampler returns no images"):
        images_of(made)


def test_images_of_pipelines() -> None:
    image_module = pytest.importorskip("PIL.Image")
    made: Any = type("Output", (), {"images": [image_module.new("RGB", (2, 2), (255, 0, 0))]})()
    found: Tensor = images_of(made)
    assert found.shape == (1, 2, 2, 3)
    assert found[0, 0, 0].tolist() == [1, 0, 0]


def test_the_front() -> None:
    points = [Point("a", 10, 40), Point("b", 12, 39), Point("c", 12, 45), Point("d", 9, 40)]
    assert [point.name for point in front(points)] == ["d", "c"]
    assert [point.name for point in front([*points, Point("e", 12, 45)])] == ["d", "c", "e"]


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "found.yaml"
    few = ["--trials", "20", "--noises", "1", "--check", "1", "--steps", "8"]
    given = ["search", MODEL, "--sampler", SAMPLER, "--budget", "3", "-o", str(out), *few]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert f"{out}: " in done.output
    refused = CliRunner().invoke(app, [*given[:5], "99", *given[6:]])
    assert refused.exit_code == 2
    assert "expected 1 to 8" in refused.output
