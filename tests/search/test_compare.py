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
from cachegraph.search.compare import _flip, _pictures, _ssim, compare
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

    def similar(one: torch.Tensor, other: torch.Tensor) -> tuple[float | None, float | None]:
        pair = _pictures({0: one}, Reference.of({0: other}))
        assert pair is not None
        return _ssim(*pair), _flip(*pair)

    assert similar(picture, picture) == (pytest.approx(1), 0)
    ssim, flip = similar(1 - picture, picture)
    assert ssim is not None
    assert flip is not None
    assert ssim < 0.5
    assert flip > 0.3
    # the same in another range, channels last, and outside of both ranges
    assert similar(1 - 2 * picture, 2 * picture - 1) == (pytest.approx(ssim), pytest.approx(flip))
    last = similar(1 - picture.movedim(1, -1), picture.movedim(1, -1))
    assert last == (pytest.approx(ssim), pytest.approx(flip))
    assert _pictures({0: picture[0, 0]}, Reference.of({0: picture[0, 0]})) is None


def test_flip_of_black_and_white() -> None:
    """The largest change there is, at the distance from the screen that FLIP assumes."""
    black = torch.zeros(1, 3, 16, 16)
    assert _flip(black + 1, black) == pytest.approx(0.967, abs=1e-3)
    assert _flip(black + 1, black + 2) == 0  # nothing is whiter than white
