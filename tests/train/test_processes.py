"""Several processes train as one does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cachegraph.errors import InputError
from cachegraph.world import World
from tests.processes import command, killed_when

ASKED = (
    *("train-router", "tests.train.small:make_small", "--steps", "4", "--max-steps", "68"),
    *("--lambda-c", "20", "--global-batch-size", "4", "--num-classes", "10", "--lr", "0.05"),
)


def test_two_processes_are_one(tmp_path: Path) -> None:
    routers = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        said = command(*ASKED, "-o", out, processes=processes)
        assert " ".join(said.split()).count("runs of sites remain, 68 training steps") == 1
        content = torch.load(out / "router.pt", weights_only=False)["routers"]
        routers.append(torch.stack(list(content.values())))
    assert len((tmp_path / "2" / "log.jsonl").read_text().splitlines()) == 51
    assert (routers[0] - routers[1]).abs().max() < 1e-5
    assert (routers[0][:-1].abs() < 5).any()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_unbroken(tmp_path: Path) -> None:
    asked = (*ASKED, "--ckpt-every", "7", "-o")
    command(*asked, tmp_path / "whole")
    log = tmp_path / "broken" / "log.jsonl"
    for steps in sorted(random.Random(0).sample(range(1, 50), 5)):
        killed_when(lambda steps=steps: log.exists() and lines(log) >= steps, *asked, log.parent)
    command(*asked, log.parent)
    for name in ("log.jsonl", "schedule.yaml"):
        assert (log.parent / name).read_text() == (tmp_path / "whole" / name).read_text()
    found = [
        torch.load(tmp_path / name / "router.pt", weights_only=False)
        for name in ("whole", "broken")
    ]
    for i, scores in found[0]["routers"].items():
        assert torch.equal(found[1]["routers"][i], scores)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_rows_are_shared_evenly_or_not_at_all() -> None:
    assert World(1, 2).share(4, "rows") == slice(2, 4)
    with pytest.raises(InputError, match="rows cannot be shared by 3 processes"):
        World(0, 3).share(4, "rows")
