"""``compile --dynamic``."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

import cachegraph as cg
from cachegraph import cli
from tests.model.test_dynamic import SIZES, worst

INPUTS = ("x=2,4,8,6:f32", "t=2:f32", "text=2,5,8:f32")


def test_compile_makes_sizes_vary_and_tells_which_costs_are_of(tmp_path: Path) -> None:
    schedule, out = tmp_path / "fora.yaml", tmp_path / "painter.cgraph"
    schedule.write_text("cachegraph: 1\nsteps: 5\npolicy: {method: fora, interval: 3}\n")
    arguments = ["compile", "tests.model.test_dynamic:painter", "-s", str(schedule)]
    arguments += ["--backend", "eager", "-o", str(out), "--dynamic", "height, width,text"]
    found = CliRunner().invoke(cli.app, [*arguments, *(f"--input={one}" for one in INPUTS)])
    assert found.exit_code == 0, found.output
    assert "batch 2, height 8 and width 6 and text 5 of many" in " ".join(found.output.split())
    assert worst(cg.load(out), **SIZES[1]) < 1e-6
