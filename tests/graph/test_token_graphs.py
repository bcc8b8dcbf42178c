"""What must hold of the compiled steps of ToCa and DuCa, and errors from one end to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.compiler.compile import Build, build
from cachegraph.graph.step_graph import SLOT
from cachegraph.plan.action import Compute, Refresh
from cachegraph.plan.plan import make_plan
from cachegraph.schedule.rows import make_rows, make_selection
from cachegraph.schedule.schedule import load_schedule
from cachegraph.show.token_map import token_shares
from cachegraph.zoo import load_digits_model
from tests.fake_sites import make_sites
from tests.models import one_thread, shared_dit, tiny_pixart  # noqa: F401

SORTS = ("sort", "topk", "argsort", "kthvalue")


@pytest.mark.parametrize("name", ["toca-n3", "toca-n4", "toca-n4-250", "duca-n3"])
def test_dit_needs_at_most_six_variants(name: str) -> None:
    schedule, sites = load_schedule(name), make_sites(stack=name.startswith("duca"))
    plan = make_plan(sites, make_rows(schedule, sites), selection=make_selection(schedule, sites))
    assert 3 <= len(plan.variants) <= 6


@pytest.fixture(scope="module", params=["attention", "kv-norm"])
def dit(request: pytest.FixtureRequest) -> Build:
    policy = {"method": "toca", "interval": 3, "score": request.param}
    model, traced = shared_dit()
    return build(model, {"cachegraph": 1, "steps": 50, "policy": policy}, traced=traced)


def test_no_sort_over_tokens_is_left_in_a_partial_step_of_dit(dit: Build) -> None:
    partial = [g for g in dit.graphs if any(isinstance(a, Refresh) for a in g.variant.row)]
    assert partial
    for graph in partial:
        if any(isinstance(action, Compute) for action in graph.variant.row[1::2]):
            continue  # a mixed step: its first block makes an order for the steps behind it
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert any("gather" in target for target in targets)
        assert not [t for t in targets if any(word in t for word in SORTS)]
    made = [str(n.target) for n in dit.graphs[0].graph.nodes]
    assert any("sort" in target for target in made)


def test_no_slot_holds_a_map_of_tokens_times_tokens(dit: Build) -> None:
    pixart = build(tiny_pixart(), {"cachegraph": 1, "steps": 6, "policy": PIXART})
    for graph in (*dit.graphs, *pixart.graphs):
        for node in graph.inputs:
            if SLOT in node.meta:
                shape = [d for d in node.meta["val"].shape if isinstance(d, int)]
                assert shape.count(16) <= 1, node.name


PIXART = {"method": "toca", "interval": 3, "fresh_ratio": 0.3, "rules": "pixart"}


# --- errors, from a schedule file to what is told


def compiled(tmp_path: Path, model: str, policy: str, *more: str) -> Any:
    file = tmp_path / "mine.yaml"
    file.write_text("cachegraph: 1\nsteps: 6\npolicy:\n  method: toca\n  interval: 3\n" + policy)
    args = ["compile", model, "-s", str(file), "-o", str(tmp_path / "x.cgraph"), *more]
    return CliRunner().invoke(cli.app, args, env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.mark.parametrize(
    ("policy", "line", "message"),
    [
        (
            "  bonus: {cell: 3}\n",
            6,
            "8 x 8 tokens do not divide into cells of 3 x 3; expected a cell that divides 8 and 8; "
            "found 3; choose another cell, or 'bonus: {weight: 0}' for no bonus",
        ),
        (
            "  score: cross-attention\n",
            6,
            "no score 'cross-attention': the model has no cross_attn site; expected a score that "
            "the model can give (24 sites: ",
        ),
        ("  fresh_ratio: 1.01\n", 6, "found 1.01"),
        ("  grid: [4, 4]\n", 6, "a grid of 4 x 4 does not hold 64 tokens; expected two numbers"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(
    policy: str, line: int, message: str, tmp_path: Path
) -> None:
    result = compiled(tmp_path, "digits", policy)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"mine.yaml:{line}: " in result.stderr
    assert message in result.stderr


# --- the picture of tokens


def test_the_picture_shows_the_tokens_of_the_plan() -> None:
    policy = {"method": "toca", "interval": 4, "fresh_ratio": 0.2, "ratio_schedule": "constant"}
    schedule = {"cachegraph": 1, "steps": 6, "policy": policy}
    image, shares, plan = token_shares(load_digits_model(), schedule, 3, 0)
    assert image.shape == (16, 16)
    assert shares.shape == (6, 8, 8)
    for row, share in zip(plan.rows, shares, strict=True):
        tokens = [64 if a == Compute() else getattr(a, "tokens", 0) for a in row[1::2]]
        assert share.sum().item() * 12 == pytest.approx(sum(tokens))
    assert 0 < shares[1].mean() < 1


def test_the_picture_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("cachegraph: 1\nsteps: 4\npolicy: {method: toca, interval: 3}\n")
    drawn = tmp_path / "t.png"
    args = ["inspect", "digits", "-s", str(file), "--tokens"]
    pen = pytest.importorskip("PIL.ImageDraw").ImageDraw
    with mock.patch.object(pen, "text", autospec=True, side_effect=pen.text) as written:
        found = CliRunner().invoke(cli.app, [*args, str(drawn)])
    assert found.exit_code == 0, found.output
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    caption, *steps = (call.args[2] for call in written.call_args_list)
    assert caption.startswith("Digit 3, seed 0: ")
    assert steps == ["0", "1", "2", "3"]
    for wrong, message in (
        (["inspect", "DiT-S/2", "-s", "toca-n3", "--tokens", "a.png"], "only digits has here"),
        (["inspect", "digits", "-s", "fora-n3", "--tokens", "a.png"], "chooses no tokens"),
        ([*args, "a.pdf"], "images are written as PNG"),
    ):
        result = CliRunner().invoke(cli.app, wrong)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
