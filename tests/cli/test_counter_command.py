"""``plan --counter toca`` gives the totals that the published code prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cachegraph import cli

TOCA = "cachegraph: 1\nsteps: {steps}\npolicy: {{method: toca, {keys}}}\n"


def plan(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *args, "--counter", "toca"], env={"TERM": "dumb"})


@pytest.mark.parametrize(
    ("steps", "keys", "total"),
    [
        (250, "interval: 4, fresh_ratio: 0.07, ratio_schedule: ddpm250", "43.420574210048"),
        (250, "interval: 1, fresh_ratio: 0.07, ratio_schedule: ddpm250", "103.549585270784"),
        (50, "interval: 3, fresh_ratio: 0.07, ratio_schedule: ddim50", "10.232809588736"),
    ],
)
def test_published_totals(steps: int, keys: str, total: str, tmp_path: Path) -> None:
    file = tmp_path / "toca.yaml"
    file.write_text(TOCA.format(steps=steps, keys=keys))
    result = plan("DiT-XL/2", "-s", str(file))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert result.stdout.splitlines()[1].startswith(f"{total} T of ")
    doubled = json.loads(plan("DiT-XL/2", "-s", str(file), "--batch", "4", "--json").stdout)
    assert doubled["total_flops"] == 2 * int(total.replace(".", ""))
    assert len(doubled["flops"]) == steps


def test_another_model_is_refused() -> None:
    result = plan("PixArt(depth=1)", "-s", "full-50")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the counter of ToCa does not fit the model" in result.stderr
