"""The commands that make schedules, calibrate and import-router, and what they call."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegraph.calibrate.measure import run_calibrate
from cachegraph.errors import InputError
from cachegraph.plan.action import Forecast
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule, presets
from tests.calibrate.test_calibrate import SITES
from tests.cli.test_cli import printed, run
from tests.models import one_thread  # noqa: F401
from tests.tiny import STEPS

DRIFT = ("tests.tiny:tiny", "--sampler", "tests.tiny:drift", "--steps", "6", "--trajectories", "1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def router(path: Path) -> None:
    """A checkpoint of 8 steps and 2 blocks, as published; at odd steps the first attention runs."""
    scores = {f"{i}.prob": torch.tensor([3.0, -3, -3, -3]) for i in range(8)}
    torch.save({"routers": scores, "opt": {}, "args": argparse.Namespace(lr=0.1)}, path)


def fails(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# --- calibrate


def test_calibrate_says_what_it_wrote(here: Path) -> None:
    said = printed("calibrate", *DRIFT, "--bound", "0.4", "-o", "s.yaml", "--plot", "s.png")
    assert said == (
        "s.yaml, s.png: 4 sites over 1 trajectory of 6 steps\n"
        "cachegraph plan tests.tiny:tiny --schedule s.yaml shows what it computes\n"
    )
    assert sorted(path.name for path in here.iterdir()) == ["s.png", "s.yaml"]
    assert load_schedule("s.yaml").correction is None


def test_corrected_schedules_compile(here: Path) -> None:
    table = "cachegraph: 1\nsteps: 6\npolicy: {method: table, reuse_steps: [2, 4, 5]}\n"
    (here / "host.yaml").write_text(table)
    printed("calibrate", *DRIFT, "--schedule", "host.yaml", "--goc", "0.5", "-o", "s.yaml")
    line = ("compile", "tests.tiny:tiny", "-s", "s.yaml", "--backend", "eager", "-o", "s.cgraph")
    printed(*line, "--input", "x=2,4,8:f32", "--input", "t=2:f32")
    assert "forecast" in printed("inspect", "s.cgraph")


TOCA = presets()["toca-n3"]
WRONG = {
    "calibrate tests.tiny:tiny -o s.yaml": "tests.tiny:tiny: only the model digits has a sampler "
    "here; give --sampler module:function, a function of the model and a seed that samples one "
    "trajectory",
    "calibrate digits -o s.json": "s.json: schedules are written as YAML; expected a .yaml file",
    "calibrate digits -o s.yaml --steps 3": "max_distance is too large; expected less than 3 "
    "steps; found 3",
    "calibrate digits -o s.yaml -s fora-n3": "fora-n3: a schedule to correct needs a weight; give "
    "--goc",
    f"calibrate digits -o s.yaml -s {TOCA} --goc 0.5": f"{TOCA}:8: a correction of the toca "
    "policy; expected a policy that reuses: fora, router, smoothcache, table; found toca",
    "calibrate tests.tiny:tiny --sampler tests.tiny:drift --steps 5 -o s.yaml": "the sampler does "
    "not call the model once a step; expected 5 calls, one a step; found more; set the number of "
    "steps to that of the sampler; where guidance makes calls of its own, put each into "
    'model.cache_context("cond") or ("uncond")',
    "import-router mask.yaml -o m.yaml": "mask.yaml: not a router checkpoint; expected one of .pt, "
    ".pth, .ckpt, .bin",
    "import-router r.pt -o m.txt": "m.txt: masks are written as YAML; expected a .yaml file",
    "import-router odd.pt -o m.yaml": "odd.pt: not a router; expected tensors '0.prob', '1.prob', "
    "... of one even length, one a step; found ['weight']",
    "import-router none.pt -o m.yaml": "none.pt: there is no such file",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_explained(here: Path, line: str) -> None:
    router(here / "r.pt")
    torch.save({"weight": torch.zeros(2)}, here / "odd.pt")
    found = run(*line.split())
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1] == f"error: {WRONG[line]}"
    assert sorted(path.name for path in here.iterdir()) == ["odd.pt", "r.pt"]


def test_a_sampler_that_fails_is_no_wrong_input(here: Path) -> None:
    (here / "broken_sampler.py").write_text(
        "def run(model, seed):\n    raise ValueError('no luck')\n"
    )
    line = ("calibrate", "tests.tiny:tiny", "--sampler", "broken_sampler:run", "-o", "s.yaml")
    found = run(*line)
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-2:] == [
        "error: ValueError: no luck",
        "add --debug to see where it happened",
    ]


def test_usage_errors_are_typer_s() -> None:
    for line in (
        ["calibrate", "digits"],
        ["calibrate", "digits", "-o", "s.yaml", "--steps", "1"],
        ["calibrate", "digits", "-o", "s.yaml", "--bound", "-1"],
        ["import-router", "r.pt"],
        ["import-router", "r.pt", "-o", "m.yaml", "--threshold", "1.5"],
        ["import-router", "r.pt", "-o", "m.yaml", "--semantics", "l2d"],
    ):
        found = run(*line)
        assert (found.exit_code, found.stdout) == (2, "")
        assert f"Usage: cachegraph {line[0]}" in found.stderr


# --- import-router


@pytest.mark.parametrize(
    ("semantics", "counts"),
    [
        ("l2c", "4 of the 16 modules of 4 masked steps are run: 4 attn, 0 mlp"),
        ("harmonica", "7 of the 28 modules of 7 masked steps are run: 7 attn, 0 mlp"),
        ("uvit", "3 of the 12 modules of 3 masked steps are run: 3 attn, 0 mlp"),
    ],
)
def test_import_router_says_what_remains(here: Path, semantics: str, counts: str) -> None:
    router(here / "r.pt")
    said = printed("import-router", "r.pt", "-o", "mask.yaml", "--semantics", semantics)
    assert " ".join(said.split()) == f"mask.yaml: 8 steps, 2 blocks; {counts}"
    assert (here / "mask.yaml").read_text().splitlines()[:2] == [
        f"# The router r.pt at threshold 0.1, semantics {semantics}.",
        f"# {counts}.",
    ]


def test_import_router_takes_a_threshold(here: Path) -> None:
    router(here / "r.pt")
    for threshold, runs in (("0.96", 0), ("0.04", 16)):  # sigmoid(3) is 0.9526
        said = printed("import-router", "r.pt", "-o", "mask.yaml", "--threshold", threshold)
        assert f"; {runs} of the 16 modules" in said


# --- what calibrate calls


def test_run_writes_schedule_and_plot(tmp_path: Path) -> None:
    out, plot = tmp_path / "s.yaml", tmp_path / "s.png"
    told: list[tuple[str, int, int]] = []
    schedule, measured = run_calibrate(
        "digits",
        out,
        steps=4,
        bound=0.9,
        trajectories=1,
        max_distance=2,
        plot=plot,
        progress=lambda *one: told.append(one),
    )
    assert load_schedule(out) == schedule
    text = out.read_text(encoding="utf-8")
    assert text.splitlines()[0] == (
        "# SmoothCache at bound 0.9, calibrated on digits over 1 trajectory of 4 steps"
    )
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert told[-1] == ("trajectory 1 of 1", 4, 4)
    assert len(measured.sites) == 24
    assert schedule.correction is None


def test_run_adds_a_correction(tmp_path: Path) -> None:
    keys = {"sampler": "tests.tiny:drift", "steps": STEPS, "trajectories": 1}
    out = tmp_path / "s.yaml"
    schedule, measured = run_calibrate("tests.tiny:tiny", out, bound=0.4, goc_weight=0.5, **keys)
    assert load_schedule(out) == schedule
    assert schedule.correction is not None
    assert schedule.correction.weight == 0.5
    rows = make_rows(schedule, measured.sites)
    corrected = {s for s, row in enumerate(rows) if any(isinstance(a, Forecast) for a in row)}
    assert corrected == set(schedule.correction.steps)
    assert corrected


def test_run_corrects_a_host(tmp_path: Path) -> None:
    host, out = tmp_path / "hosts/host.yaml", tmp_path / "s.yaml"
    host.parent.mkdir()
    router(host.parent / "r.pt")
    host.write_text("cachegraph: 1\nsteps: 8\npolicy: {method: router, file: r.pt}\n")
    schedule, measured = run_calibrate(
        "tests.tiny:tiny",
        out,
        sampler="tests.tiny:long_drift",
        trajectories=1,
        host=str(host),
        goc_weight=0.8,
    )
    assert schedule.to_yaml() == load_schedule(out).to_yaml()
    plain, rows = (make_rows(load_schedule(path), measured.sites) for path in (host, out))
    changed = [s for s, (a, b) in enumerate(zip(plain, rows, strict=True)) if a != b]
    assert schedule.correction is not None
    assert list(schedule.correction.steps) == changed
    # Of block 0 the router runs attention, so only block 1 is corrected.
    assert {i for s in changed for i, a in enumerate(rows[s]) if isinstance(a, Forecast)} == {2, 3}
    comment = "# host with GOC of weight 0.8, calibrated on tiny over 1 trajectory of 8 steps\n"
    assert out.read_text(encoding="utf-8").startswith(comment)


def test_run_refuses_hosts_that_take_no_correction(tmp_path: Path) -> None:
    def refused(preset: str, **keys: Any) -> str:
        message = fails(run_calibrate, "digits", tmp_path / "s.yaml", host=preset, **keys)
        return message.rpartition("schedules/")[2]

    assert refused("fora-n3") == ("fora-n3: a schedule to correct needs a weight; give --goc")
    assert refused("fora-n3", goc_weight=0.5, bound=0.1) == (
        "fora-n3: a schedule to correct has no bound; leave out --bound, or --schedule for "
        "SmoothCache lists"
    )
    message = refused("fora-n3", goc_weight=0.5, steps=20)
    assert re.fullmatch(
        r"fora-n3.yaml:\d+: the number of steps does not fit the schedule; expected 50 steps; "
        "found 20; leave out --steps",
        message,
    )
    message = refused("goc-fora-25", goc_weight=0.5)
    assert re.fullmatch(
        r"goc-fora-25.yaml:\d+: the schedule has a correction already; take it out, or start from "
        "the schedule without it",
        message,
    )
    assert refused("taylorseer-n3", goc_weight=0.5) == (
        "taylorseer-n3.yaml:6: a correction of the taylorseer policy; expected a policy that "
        "reuses: fora, router, smoothcache, table; found taylorseer"
    )


def test_run_takes_any_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_calibrate.py").write_text(
        "from tests.tiny import drift, tiny\ndef build(): return tiny()\n"
    )
    schedule, measured = run_calibrate(
        "mine_to_calibrate:build",
        Path("s.yaml"),
        sampler="mine_to_calibrate:drift",
        steps=STEPS,
        bound=5.0,
        trajectories=1,
    )
    assert schedule.steps == measured.steps == STEPS
    assert [site.name for site in measured.sites] == list(SITES)


def test_run_refuses_what_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.yaml"
    assert fails(run_calibrate, "tests.tiny:tiny", out) == (
        "tests.tiny:tiny: only the model digits has a sampler here; give --sampler "
        "module:function, a function of the model and a seed that samples one trajectory"
    )
    assert fails(run_calibrate, "digits", tmp_path / "s.json") == (
        f"{tmp_path}/s.json: schedules are written as YAML; expected a .yaml file"
    )
    assert fails(run_calibrate, "digits", tmp_path / "no/s.yaml") == (
        f"{tmp_path}/no: there is no such folder"
    )
    assert fails(run_calibrate, "digits", out, plot=tmp_path / "s.jpg") == (
        f"{tmp_path}/s.jpg: plots are written as PNG; expected a .png file"
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert fails(run_calibrate, "digits", out, plot=tmp_path / "s.png") == (
        "a plot needs matplotlib; pip install 'cachegraph[eval]', or leave out --plot"
    )
    assert not list(tmp_path.iterdir())


def test_run_says_when_a_bound_is_too_low(tmp_path: Path) -> None:
    keys = {"sampler": "tests.tiny:drift", "steps": STEPS, "trajectories": 1}
    message = fails(run_calibrate, "tests.tiny:tiny", tmp_path / "s.yaml", bound=1e-6, **keys)
    start, _, rest = message.partition("; expected a bound of at least ")
    assert start == "at bound 1e-06 no step can reuse anything"
    least, _, end = rest.partition(", ")
    assert end == "the smallest change that was measured; raise --bound or take more steps"
    run_calibrate("tests.tiny:tiny", tmp_path / "s.yaml", bound=1.05 * float(least), **keys)
