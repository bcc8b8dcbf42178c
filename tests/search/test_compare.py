"""Schedules side by side: quality against time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cachegraph.cli import app
from cachegraph.errors import InputError
from cachegraph.schedule.schedule import load_schedule
from cachegraph.search.compare import _ssim, compare
from cachegraph.search.images import Reference

MODEL, SAMPLER = "tests.tiny:tiny", "tests.tiny:long_drift"


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, full in {"some": [0, 4], "most": [0, 1, 2, 3, 4, 5, 6], "all": [*range(8)]}.items():
        policy: dict[str, Any] = {"method": "forecast", "basis": "lagrange", "full_steps": full}
        keys = {"cachegraph": 1, "steps": 8, "policy": policy | {"order": 1}}
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(load_schedule(keys).to_yaml())
    return paths


def test_the_command(written: dict[str, Path], tmp_path: Path) -> None:
    out, plot = tmp_path / "numbers.json", tmp_path / "front.png"
    options = [word for path in written.values() for word in ("-s", str(path))]
    given = ["compare", MODEL, "--sampler", SAMPLER, *options, "--backend", "eager"]
    given += ["--seeds", "2", "--rounds", "1", "-o", str(out), "--plot", str(plot)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = {one["name"]: one for one in json.loads(out.read_text())["compared"]}
    assert list(found) == ["uncached", "some", "most", "all"]
    assert found["uncached"]["psnr"] is None
    assert found["some"]["psnr"] < found["most"]["psnr"] < found["all"]["psnr"]
    assert [found[name]["full_steps"] for name in written] == [2, 7, 8]
    assert found["all"]["front"]
    assert all(one["seconds"] > 0 for one in found.values())


def test_schedules_that_cannot_be_compared(written: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("cachegraph: 1\nsteps: 9\npolicy: {method: full}\n")
    given: dict[str, Any] = {"sampler": SAMPLER, "progress": lambda *_: None}
    with pytest.raises(InputError, match="different numbers of steps"):
        compare(MODEL, [str(written["some"]), str(other)], **given)
    with pytest.raises(InputError, match="two schedules have one name"):
        compare(MODEL, [str(other), str(other)], **given)


def test_similarity_of_pictures() -> None:
    picture = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = Reference.of({0: picture})
    assert _ssim({0: picture}, reference) == pytest.approx(1)
    assert _ssim({0: 1 - picture}, reference) < 0.5
    assert _ssim({0: picture.movedim(1, -1)}, Reference.of({0: picture.movedim(1, -1)})) == 1
    assert _ssim({0: picture[0, 0]}, reference) is None
