"""``plan`` and ``inspect``: what they show, beside the whole pictures of ``test_cli``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.compiler.sources import FORMS
from cachegraph.show.picture import amount
from cachegraph.show.view import choices
from cachegraph.zoo import build_model
from tests.cli.test_cli import printed, run

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


def test_flops_of_variants_are_the_mean_of_their_steps() -> None:
    found = json.loads(printed("plan", *TINY, "-s", "toca.yaml", "--json"))
    flops = found["flops"]
    assert any(len({flops[step] for step in one["steps"]}) > 1 for one in found["variants"])
    total = sum(one["flops"] * len(one["steps"]) for one in found["variants"])
    assert total == pytest.approx(found["total_flops"], abs=found["steps"])


def test_sites_of_a_model_need_no_schedule() -> None:
    bare = printed("inspect", *TINY, "--sites").splitlines()
    assert [line.split()[0] for line in bare[1:]] == [
        f"blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn", "mlp")
    ]
    assert bare == printed("inspect", *TINY, "-s", "toca.yaml", "--sites").splitlines()


def test_variants_that_do_not_differ() -> None:
    line = ("inspect", *TINY, "-s", "toca.yaml", "--diff", "variant1")
    assert printed(*line, "variant1") == "variant1 and variant1 do not differ\n"
    assert printed(*line, "variant0").startswith("--- variant1\n+++ variant0\n")


@pytest.mark.parametrize("line", ["plan", "inspect --diff variant0 variant1", "inspect --sites"])
def test_nothing_is_wider_than_the_terminal(line: str) -> None:
    command, *rest = line.split()
    terminal = {"COLUMNS": "60", "TERM": "xterm", "FORCE_COLOR": "1"}
    args = [command, *TINY, "-s", "toca.yaml", *rest]
    shown = CliRunner().invoke(cli.app, args, env=terminal)
    assert shown.exit_code == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout).splitlines()
    assert 50 < max(map(len, lines)) <= 60


def test_small_totals_of_the_counter_can_be_read() -> None:
    said = printed("plan", *TINY, "-s", "toca.yaml", "--counter", "toca").splitlines()[1]
    found = re.fullmatch(r"0\.(\d{12}) T \((.*)\) of 0\.(\d{12}) T \((.*)\) uncached, .*x", said)
    assert found is not None, said
    exact, shown, uncached, shown_uncached = found.groups()
    assert (shown, shown_uncached) == (amount(int(exact)), amount(int(uncached)))


INSIDE = "goes with a model only; leave it out: what an artifact was made from is in it"
NO_MODEL = f"toca.yaml: the file holds no model; expected {FORMS}; a schedule goes with --schedule"
WRONG = {
    "inspect a.cgraph -s toca.yaml": f"a.cgraph: --schedule {INSIDE}",
    "inspect a.cgraph --disable-pass hoist-known": f"a.cgraph: --disable-pass {INSIDE}",
    "inspect toca.yaml": NO_MODEL,
    "plan toca.yaml -s toca.yaml": NO_MODEL,
    "inspect digits -s toca.yaml --tokens a.png --arch DiT-S/2": "digits: --arch does not go with "
    "--tokens",
    "inspect digits --variant variant0": "digits: a model needs --schedule, or give an artifact; "
    "only --sites does without",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_explained(line: str) -> None:
    found = run(*line.split())
    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"error: {WRONG[line]}\n")


def test_the_nearest_size_of_an_architecture() -> None:
    assert run("plan", "DiT-XL/3", "-s", "toca.yaml").stderr.endswith("mean 'DiT-XL/2'?\n")


def test_what_was_chosen_otherwise_than_usual_is_told(tmp_path: Path) -> None:
    """By plan and inspect for models, by compile and inspect for artifacts."""
    model, less = build_model("DiT(hidden_size=32, depth=1, num_heads=4)", 8), "hoist-known"
    torch.save(model.state_dict(), tmp_path / "w.pt")
    line = ["compile", str(tmp_path / "w.pt"), "--arch", "DiT(num_heads=4)", "-s", "toca.yaml"]
    line += ["--backend", "eager", "--disable-pass", less, "--varying", "y", "-o", "b.cgraph"]
    ending = f"varying y, without {less}"
    assert printed(*line).splitlines()[0] == f"w, toca, {ending}"
    assert printed("inspect", "b.cgraph").splitlines()[0] == f"b.cgraph, backend eager, {ending}"
    for command in ("plan", "inspect"):
        said = printed(command, *TINY, "-s", "toca.yaml", "--disable-pass", less)
        assert said.splitlines()[0].endswith(f", toca, without {less}")
    assert choices((), ()) == ""
