"""Timing: what is timed, how trajectories are composed, and what the choice of tokens is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.bench import bench
from cachegraph.bench.bench import run_bench
from cachegraph.bench.choice import without_choice
from cachegraph.bench.contestants import _points, make_contestants
from cachegraph.bench.report import _brief, _spread
from cachegraph.bench.result import UNCACHED, Entry, Spread
from cachegraph.compiler.compile import Build, assemble, build
from cachegraph.errors import BackendError
from cachegraph.graph.step_graph import StepGraph
from cachegraph.runtime.known import StepFunction
from cachegraph.schedule.schedule import uncached
from tests.models import TOCA as KEEPS_LITTLE
from tests.models import dit_steps, fora, one_thread, relative_error, shared_dit  # noqa: F401

TOCA = {
    "cachegraph": 1,
    "steps": 8,
    "policy": {"method": "toca", "interval": 4, "fresh_ratio": 0.3, "ratio_schedule": "linear"},
}


def silent(*_: object) -> None:
    """Progress that nobody sees."""


@pytest.fixture(scope="module")
def toca() -> Build:
    model, traced = shared_dit()
    return build(model, TOCA, traced=traced)


def test_steps_are_timed_where_tokens_are_few_middling_and_many(toca: Build) -> None:
    points = _points(toca.plan, toca.cost.flops)
    for variant in toca.plan.variants:
        flops = {toca.cost.flops[step] for step in variant.steps}
        timed = {toca.cost.flops[step] for step in points if step in variant.steps}
        assert timed >= {min(flops), max(flops)}
        assert len(timed) == min(3, len(flops))
    assert max(len({toca.cost.flops[s] for s in v.steps}) for v in toca.plan.variants) >= 3


def test_a_trajectory_is_the_sum_over_its_steps(toca: Build) -> None:
    """With a clock that shows FLOPs, times must be FLOPs: between the timed steps too."""
    clock = Clock(toca)
    entries = [
        Entry(UNCACHED, None, "eager"),
        Entry("toca", toca.schedule, "eager"),
        Entry("toca", toca.schedule, "eager", hooks=True),
    ]
    call = dit_steps(1)[0]
    with mock.patch.object(bench, "_seconds", clock.seconds):
        uncached, compiled, hooks = run_bench(
            shared_dit()[0], call, {}, entries, rounds=2, whole=True, choice=True, progress=silent
        )
    cost = toca.cost
    assert uncached.trajectory.median == pytest.approx(8 * cost.full_flops)
    assert compiled.trajectory.median == pytest.approx(cost.total_flops)
    assert hooks.steps == pytest.approx([float(f) for f in cost.flops])
    assert compiled.limit == cost.limit
    assert [one.backend for one in (uncached, compiled, hooks)] == ["model", "eager", "hooks"]
    kinds = {kind.variant: kind for kind in compiled.kinds}
    assert sum(kind.calls for kind in kinds.values()) == 8
    shares = [kind.choice for kind in kinds.values() if kind.choice is not None]
    assert len(shares) == len(kinds)
    assert shares == pytest.approx([0.75] * len(shares))
    assert all(kind.choice is None for kind in hooks.kinds)
    assert compiled.whole == Spread(1.0, 1.0, 1.0)


def test_the_baseline_is_the_model_as_it_is(toca: Build) -> None:
    model, traced = shared_dit()
    call = dit_steps(1)[0]
    entries = [Entry(UNCACHED, None, name) for name in ("eager", "inductor")]
    entries += [Entry("toca", toca.schedule, "eager"), Entry("full", uncached(8), "eager")]
    found = make_contestants(model, traced, call, {}, entries, False, silent)
    assert [bool(one.built.reports[-1].rewrites) for one in found] == [False, False, True, True]
    assert [one.built.graphs[0].prologue is None for one in found] == [True, True, False, False]


class Clock:
    """Says that a step takes as many seconds as it has FLOPs, a quarter of it without choice."""

    def __init__(self, built: Build) -> None:
        self.flops = built.cost.flops
        self.full = built.cost.full_flops

    def seconds(self, device: torch.device, run: Any, *args: Any) -> tuple[float, Any]:
        result = run(*args)
        if not args:
            return 1.0, result
        full = run.__self__.entry.is_model
        flops = self.full if full else self.flops[args[0]]
        return flops / (4 if run.__name__ == "bare" else 1), result


def _partial(built: Build) -> StepGraph:
    return next(g for g in built.graphs if any(n.name.startswith("tokens") for n in g.inputs))


def _bare(built: Build, graph: StepGraph) -> StepFunction:
    [function] = without_choice(assemble(built, "eager"), [graph])
    assert function is not None
    return function


def _first_tokens(partial: StepGraph) -> list[Tensor]:
    """Inputs that make a partial step choose its first 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    given = []
    for node in partial.inputs:
        shape = [d if isinstance(d, int) else 2 for d in node.meta["val"].shape]
        noise = torch.randn(shape, generator=generator)
        given.append(noise if node.meta["val"].is_floating_point() else noise.argsort(-1))
    orders = [i for i, n in enumerate(partial.inputs) if "order" in n.name]
    assert orders
    for i in orders:  # the first tokens are the best ones
        given[i] = torch.arange(given[i].shape[-1]).expand(given[i].shape)
    tokens = [i for i, n in enumerate(partial.inputs) if n.name.startswith("tokens")]
    for i in tokens:
        given[i] = torch.arange(5)
    given[[n.name for n in partial.inputs].index("y")].fill_(1)
    return given


def test_graphs_without_choice_do_the_same_work_on_the_first_tokens(toca: Build) -> None:
    partial = _partial(toca)
    given = _first_tokens(partial)
    wanted, found = partial.module(*given), _bare(toca, partial)(*given)
    assert len(wanted) == len(found)
    # The first block's mlp sees the same stream; of its new values, here 5, nothing is scattered.
    assert found[1].shape == (2, 5, 32)
    assert torch.allclose(found[1], wanted[1][:, :5], atol=1e-6)


def test_work_that_is_not_kept_is_done_and_not_handed_out() -> None:
    model, traced = shared_dit()
    last = build(model, KEEPS_LITTLE, traced=traced)
    graph = last.graphs[2]
    assert len(graph.outputs) == 1
    assert len(_bare(last, graph)(*_first_tokens(graph))) == 1


def test_full_steps_without_choice_make_no_orders(toca: Build) -> None:
    full = toca.graphs[0]
    assert any(toca.plan.variants[0].extras)
    plain = _bare(toca, full)
    count = len(full.outputs)
    x, t, y = dit_steps(1)[0]
    # int() of a free batch would fix it in the trace that others share.
    shapes = [[d if isinstance(d, int) else 2 for d in n.meta["val"].shape] for n in full.inputs]
    counts = [torch.zeros(shape).long() for shape in shapes[3:]]
    found = plain(x, t, y, *counts)
    assert len(found) == count
    assert found[-1] is found[0]


def test_a_variant_without_tokens_has_no_choice() -> None:
    model, traced = shared_dit()
    plain = build(model, fora(4, 2), traced=traced)
    for backend in ("eager", "aoti"):
        assert without_choice(assemble(plain, backend), plain.graphs) == [None, None]


def test_compiling_ahead_of_time_gives_the_same_graphs_without_choice(
    toca: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEGRAPH_CACHE", str(tmp_path))
    partial = _partial(toca)
    given = _first_tokens(partial)
    [ahead] = without_choice(assemble(toca, "aoti"), [partial])
    assert ahead is not None
    wanted, found = _bare(toca, partial)(*given), ahead(*given)
    assert len(found) == len(wanted) == len(partial.outputs)
    assert relative_error(found, wanted) < 1e-5


def test_onnx_is_not_timed_without_choice(toca: Build) -> None:
    with pytest.raises(BackendError, match="without their choice of tokens"):
        without_choice(replace(assemble(toca, "eager"), backend="onnx"), toca.graphs)


# --- the command


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *args], env={"COLUMNS": "100", "TERM": "dumb"})


TINY = "DiT(hidden_size=32, depth=2, num_heads=4)"


@pytest.fixture
def schedules(tmp_path: Path) -> tuple[str, str]:
    for name, policy in (("two", "{method: fora, interval: 2}"), ("full", "{method: full}")):
        text = f"cachegraph: 1\nsteps: 4\npolicy: {policy}\n"
        tmp_path.joinpath(f"{name}.yaml").write_text(text)
    return str(tmp_path / "two.yaml"), str(tmp_path / "full.yaml")


def test_command(schedules: tuple[str, str], tmp_path: Path) -> None:
    numbers, plot = tmp_path / "r.json", tmp_path / "r.png"
    first, second = schedules
    result = run(
        *(TINY, "-s", first, "-s", second, "--backend", "eager", "--input-size", "8"),
        *("--rounds", "2", "--batch", "4", "--threads", "1", "--hooks", "--whole"),
        *("--without", "hoist-known", "-o", str(numbers), "--plot", str(plot)),
    )
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(numbers.read_text())
    listed = [(one["name"], one["backend"]) for one in found["entries"]]
    ways = (("", "eager"), (" without hoist-known", "eager"), ("", "hooks"))
    caching = [(name + more, by) for name in ("two", "full") for more, by in ways]
    assert listed == [("uncached", "model"), *caching]
    assert found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    two, unhoisted = found["entries"][1:3]
    assert two["memory"]["known"]["predicted"] > 0
    assert unhoisted["memory"]["known"]["predicted"] == 0
    assert [kind["calls"] for kind in two["kinds"]] == [3, 1]
    assert len(two["steps"]) == 4
    assert two["steps"][1] == two["steps"][3] != two["steps"][2]
    assert 1 < two["limit"] < 2
    kind = two["kinds"][0]
    assert kind["bandwidth"] == kind["moved"] / kind["seconds"]["median"]
    assert "GB/s" in result.stdout
    assert "two                       eager" in result.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_quality_of_digits(schedules: tuple[str, str], tmp_path: Path) -> None:
    numbers, plot = tmp_path / "r.json", tmp_path / "r.png"
    result = run(
        *("digits", "-s", schedules[0], "-s", schedules[1], "--backend", "eager", "--quality"),
        *("--rounds", "1", "-o", str(numbers), "--plot", str(plot)),
    )
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    entries = json.loads(numbers.read_text())["entries"]
    uncached, two, full = (one["quality"] for one in entries)
    assert uncached == full  # computing everything is exact
    assert 5 < two["psnr"] < 60 < full["psnr"]
    assert 0 <= two["accuracy"] <= 1
    assert two["images"] == 20
    assert "PSNR dB" in result.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-s", "fora-n3", "-s", "fora-n3-250"], "error: schedules of different numbers of steps"),
        (["-s", "fora-n3", "-s", "fora-n3"], "error: --schedule: two schedules have one name"),
        (["-s", "fora-n3", "--backend", "induktor"], "did you mean 'inductor'?"),
        (["-s", "fora-n3", "-o", "nowhere/r.json"], "error: nowhere: there is no such folder"),
        (["-s", "fora-n3", "--plot", "plot.pdf"], "error: plot.pdf: plots are written as PNG"),
        (["-s", "fora-n3", "--without", "hoist"], "did you mean 'hoist-known'?"),
        (["-s", "fora-n3", "--quality"], f"error: {TINY}: --quality: only the model digits has"),
        (
            ["-s", "fora-n3", "--input", "x=2,4,8,8:f32", "--batch", "2"],
            "error: --batch: the inputs of this model come with their batch",
        ),
    ],
)
def test_refusals(args: list[str], message: str) -> None:
    result = run(TINY, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(2, 3, 4)


def test_long_times_are_plain_numbers() -> None:
    assert _spread(Spread(0.123456, 12, 1234.5)) == "12.0 [0.123-1234]"
    assert _brief(Spread(2.9, 3, 3.1)) == "3000 ±3.3%"
