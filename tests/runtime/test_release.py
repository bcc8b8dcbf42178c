"""Weights that only prologues use, given back while steps run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.errors import InputError
from cachegraph.model.trace import trace
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.release import Released, only_before
from cachegraph.runtime.runner import Runner
from tests.models import compile_traced, dit_steps, tiny_dit

STEPS = 5
KEYS = {
    "cachegraph": 1,
    "steps": STEPS,
    "policy": {"method": "fora", "interval": 2},
    "sites": {"kinds": ["stack"]},
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> cg.Artifact:
    model = tiny_dit(hidden_size=128)
    path = tmp_path_factory.mktemp("release") / "a.cgraph"
    compile_traced(model, trace(model, dit_steps(1)[0]), KEYS, out=path)
    return load_artifact(path)


def released(artifact: cg.Artifact) -> tuple[set[str], Released]:
    modules = [*artifact.prologues.values()]
    names = only_before([m.graph for m in artifact.graphs], [m.graph for m in modules])
    return names, Released([artifact.weights[name] for name in sorted(names)])


def resident(tensors: tuple[Tensor, ...]) -> int:
    """Bytes in memory of the mappings that hold the tensors, by the system's own count."""
    total = 0
    text = Path("/proc/self/smaps").read_text()
    starts = [t.data_ptr() for t in tensors]
    for area in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", area)
        if bounds and any(int(bounds[1], 16) <= s < int(bounds[2], 16) for s in starts):
            total += 1024 * int(re.search(r"Rss: +(\d+) kB", area)[1])
    return total


def run(artifact: cg.Artifact, given: Released | None) -> tuple[list[Tensor], list[int]]:
    """Outputs of a trajectory whose timesteps are known, and bytes in memory after each step."""
    before = Prologues.of(artifact.program, artifact.prologues, batched=True)
    before = replace(before, released=given)
    times = [float(kwargs_or_args[1][0]) for kwargs_or_args in dit_steps(STEPS)]
    functions = list(artifact.graphs)
    runner = Runner(
        artifact.program, functions, artifact.weights, prologues=before, timesteps=times
    )
    _, holder = released(artifact)
    outputs, held = [], []
    session = runner.session()
    for args in dit_steps(STEPS):
        outputs.append(session(*args))
        held.append(resident(holder.weights))
    return outputs, held


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc to ask for memory")
def test_weights_leave_and_nothing_changes(artifact: cg.Artifact) -> None:
    names, given = released(artifact)
    assert any("adaLN" in name for name in names)
    assert not any("mlp.fc1" in name for name in names)
    wanted, before = run(artifact, None)
    for _ in range(2):  # what was given back is there again for the next trajectory
        found, after = run(artifact, given)
        assert all(map(torch.equal, found, wanted))
        assert max(before) - after[-1] >= 0.8 * given.nbytes > 0


def test_the_plan_says_how_much(artifact: cg.Artifact) -> None:
    names, given = released(artifact)
    cost = artifact.program.cost
    assert cost.prologue_bytes == sum(artifact.weights[name].nbytes for name in names)
    assert given.nbytes <= cost.prologue_bytes < cost.weight_bytes


def test_where_it_cannot_be(artifact: cg.Artifact) -> None:
    with pytest.raises(InputError, match="the eager backend computes known values at every step"):
        artifact.runner(release=True)
    alone = replace(artifact, saved={})
    with pytest.raises(InputError, match="in memory alone"):
        alone.runner(release=True, backend="inductor")


def test_a_runner_releases(artifact: cg.Artifact) -> None:
    runner = artifact.runner(release=True, backend="inductor")
    assert runner._prologues.released is not None
    assert runner._prologues.released.nbytes == released(artifact)[1].nbytes
