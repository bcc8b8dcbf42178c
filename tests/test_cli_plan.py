"""``plan`` and ``inspect``: what they show, beside the whole pictures of ``test_cli``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cachegraph import cli

TINY = ("DiT(hidden_size=32, depth=2, num_heads=4)", "--input-size", "8")
TOCA = """cachegraph: 1
steps: 8
policy: {method: toca, interval: 4, fresh_ratio: 0.3, ratio_schedule: linear}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a schedule."""
    monkeypatch.chdir(tmp_path)
    Path("toca.yaml").write_text(TOCA)
    return tmp_path


def run(*args: str) -> Result:
    """Runs a command line in this process."""
    env = {"COLUMNS": "80", "TERM": "dumb"}
    return CliRunner().invoke(cli.app, args, env=env, prog_name="cachegraph")


def printed(*args: str) -> str:
    """What a command that works writes to stdout."""
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def test_flops_of_variants_are_the_mean_of_their_steps() -> None:
    found = json.loads(printed("plan", *TINY, "-s", "toca.yaml", "--json"))
    flops = found["flops"]
    assert any(len({flops[step] for step in one["steps"]}) > 1 for one in found["variants"])
    total = sum(one["flops"] * len(one["steps"]) for one in found["variants"])
    assert total == pytest.approx(found["total_flops"], abs=found["steps"])
