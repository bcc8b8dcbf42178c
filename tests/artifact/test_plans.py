"""Several plans in one artifact: each runs as the artifact that has it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.cli import app
from cachegraph.compiler.compile import assemble, build
from cachegraph.compiler.join import join
from cachegraph.errors import ArtifactError, ScheduleError, SessionError
from cachegraph.model.trace import trace
from cachegraph.oracle.trial import compare, reference_of
from tests.models import dit_steps, play, tiny_dit

STEPS = 6


def asked(full: list[int], **sites: Any) -> dict[str, Any]:
    policy = {"method": "forecast", "basis": "lagrange", "order": 1, "full_steps": full}
    return {
        "cachegraph": 1,
        "steps": STEPS,
        "policy": policy,
        "sites": {"kinds": ["stack"]} | sites,
    }


FAST, GOOD = asked([0, 1, 4]), asked([0, 1, 3, 5])
OTHER = asked([0, 2], kinds=["attn"])


@pytest.fixture(scope="module")
def singles() -> dict[str, cg.Artifact]:
    model, calls = tiny_dit(), dit_steps(STEPS)
    traced = trace(model, calls[0])
    named = {"fast": FAST, "good": GOOD, "other": OTHER}
    return {
        name: assemble(build(model, keys, traced=traced), "eager") for name, keys in named.items()
    }


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_plans_equal_their_single_artifacts(
    singles: dict[str, cg.Artifact], backend: str, tmp_path: Path
) -> None:
    names = list(singles) if backend == "eager" else ["fast", "other"]
    made = {name: singles[name] for name in names}
    runner = cg.load(join(made).save(tmp_path / "plans.cgraph"), backend=backend)
    calls = dit_steps(STEPS)
    for name, single in made.items():
        wanted = play(single.runner(backend=backend), calls)
        for got, one in zip(play(runner.session(plan=name), calls), wanted, strict=True):
            assert torch.equal(got, one), name
    first = play(runner, calls)
    assert all(map(torch.equal, first, play(runner.session(plan=names[0]), calls)))
    assert not torch.equal(first[-1], play(runner.session(plan=names[-1]), calls)[-1])


def test_equal_graphs_are_there_once(singles: dict[str, cg.Artifact], tmp_path: Path) -> None:
    """Full steps that keep the stack and forecasts from two of them are in both plans."""
    two = join({name: singles[name] for name in ("fast", "good")})
    assert [len(singles[name].graphs) for name in ("fast", "good")] == [2, 2]
    assert len(two.graphs) == 2
    three = join(singles)
    assert len(three.graphs) == 2 + len(singles["other"].graphs)
    found = load_artifact(three.save(tmp_path / "plans.cgraph"))
    assert list(found.plans) == ["fast", "good", "other"]
    for name, single in singles.items():
        alone = found.plan(name)
        assert len(alone.graphs) == len(single.graphs)
        assert alone.schedule == single.schedule
        assert alone.program.cost == single.program.cost
        assert alone.program.rows == single.program.rows
        reference = reference_of(alone, tiny_dit(), 0)
        errors = compare(alone.runner(), reference, STEPS, 0, lambda *_: None)
        assert max(one.error for one in errors) <= 1e-5


def test_plans_that_are_not_there(singles: dict[str, cg.Artifact]) -> None:
    two = join({name: singles[name] for name in ("fast", "good")})
    with pytest.raises(SessionError, match="there is no plan 'gut'; expected fast, good"):
        two.runner().session(plan="gut")
    with pytest.raises(SessionError, match="the artifact has one plan"):
        singles["fast"].runner().session(plan="fast")
    with pytest.raises(ArtifactError, match="the artifact has no plan 'gut'"):
        two.plan("gut")
    with pytest.raises(ScheduleError, match="not a name of a plan"):
        join({"a/b": singles["fast"], "c": singles["good"]})
    assert join({"only": singles["fast"]}) is singles["fast"]


def test_a_changed_plan_is_refused(singles: dict[str, cg.Artifact], tmp_path: Path) -> None:
    target = join({name: singles[name] for name in ("fast", "good")}).save(tmp_path / "a.cgraph")
    (target / "schedule-good.yaml").write_text("steps: 3\n")
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(target)


def test_the_command_and_its_size(tmp_path: Path) -> None:
    """Two plans take hardly more room than the larger one alone."""
    paths = []
    for name, full in (("fast", [0, 1, 20, 40]), ("good", [*range(0, 50, 5)])):
        schedule = cg.load_schedule({**asked(full), "steps": 50})
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(schedule.to_yaml())
    sizes = {}
    for given in ([paths[0]], [paths[1]], paths):
        out = tmp_path / f"{len(sizes)}.cgraph"
        options = [word for path in given for word in ("--schedule", str(path))]
        command = ["compile", "digits", *options, "--backend", "eager", "-o", str(out)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        sizes[out] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    first, second, both = sizes.values()
    assert both <= 1.05 * max(first, second)
    assert "plan fast" in done.output
    assert "plan good" in done.output
    again = CliRunner().invoke(app, command)
    assert "up to date" in again.output
