"""Several processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachegraph.errors import InputError
from cachegraph.world import World

ROOT = Path(__file__).parents[2]
ASKED = (
    *("train-router", "tests.train.small:make_small", "--steps", "4", "--max-steps", "68"),
    *("--lambda-c", "20", "--global-batch-size", "4", "--num-classes", "10", "--lr", "0.05"),
)


def command(*words: str, processes: int) -> str:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--"]
    line = [sys.executable, "-m", *(launch if processes > 1 else []), "cachegraph", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_are_one(tmp_path: Path) -> None:
    routers = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        said = command(*ASKED, "-o", str(out), processes=processes)
        assert " ".join(said.split()).count("runs of sites remain, 68 training steps") == 1
        content = torch.load(out / "router.pt", weights_only=False)["routers"]
        routers.append(torch.stack(list(content.values())))
    assert len((tmp_path / "2" / "log.jsonl").read_text().splitlines()) == 51
    assert (routers[0] - routers[1]).abs().max() < 1e-5
    assert (routers[0][:-1].abs() < 5).any()


def test_rows_are_shared_evenly_or_not_at_all() -> None:
    assert World(1, 2).share(4, "rows") == slice(2, 4)
    with pytest.raises(InputError, match="rows cannot be shared by 3 processes"):
        World(0, 3).share(4, "rows")
