"""Why FLOPs differ from published ones: scores, and what the published code projects anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.compiler.compile import Build, build
from cachegraph.model.trace import TracedModel, trace
from cachegraph.show.counted import notes, notes_data
from cachegraph.show.view import view_build
from tests.models import fora, tiny_flux

STEPS, FULL, PARTIAL = 9, 4, 5  # by counter: 0, 1, 2 and 6
TOCA = {"method": "toca", "rules": "flux", "fresh_ratio": 0.4}
PAGE = Path(__file__).parents[2] / "docs/toca-flux-opensora.md"


@pytest.fixture(scope="module")
def flux() -> tuple[Any, TracedModel]:
    """Of 1 + 1 blocks, 16 image tokens, 512 of text and width 32."""
    model = tiny_flux()
    vars(model)["latent_size"] = 8
    return model, trace(model, *model.example_inputs(2))


def built_of(flux: Any, policy: Any) -> Build:
    return build(flux[0], {"cachegraph": 1, "steps": STEPS, "policy": policy}, traced=flux[1])


@pytest.fixture(scope="module")
def built(flux: Any) -> Build:
    return built_of(flux, TOCA)


@pytest.mark.parametrize("batch", [None, 6])
def test_flux(built: Build, batch: int | None) -> None:
    view, rows = view_build(built, batch), batch or 2
    found = notes_data(view, batch)
    tokens, width = 16 + 512, 32
    assert found["score_flops"] == rows * FULL * 2 * (2 * tokens**2 * width)
    count = found["published_count"]
    assert count["projected_again_flops"] == rows * PARTIAL * 2 * tokens * width**2
    # All else that both do is the same, but for embeddings, which the published count leaves out.
    ours = view.cost.total_flops - found["score_flops"]
    theirs = count["total_flops"] - count["projected_again_flops"]
    rest = view.cost.full_flops - count["uncached_flops"] // STEPS
    assert theirs < ours <= theirs + STEPS * rest


def test_what_is_said(built: Build) -> None:
    (_, scores), (what, published) = notes(view_build(built), None)
    assert scores.startswith("285 M of them for scores: attention keeps no map")
    assert what == "published"
    assert published.endswith(
        "x, as ToCa's code counts; 10.8 M of them project kept attention anew"
    )


def test_nothing_is_said_of_scores_that_take_no_products(flux: Any) -> None:
    view = view_build(built_of(flux, {**TOCA, "score": "norm"}))
    [(what, _)] = notes(view, None)
    assert (what, notes_data(view, None)["score_flops"]) == ("published", 0)


def test_nothing_is_said_where_no_tokens_are_chosen(flux: Any) -> None:
    assert notes(view_build(built_of(flux, fora(STEPS, 3)["policy"])), None) == []


def test_models_without_a_published_count(built: Build) -> None:
    """Of blocks that are made like no other: published code counts its own models."""
    sites = tuple(replace(site, fused=False) for site in built.plan.sites)
    other = replace(built, plan=replace(built.plan, sites=sites))
    assert notes_data(view_build(other), None)["published_count"] == {}


def planned(model: str, schedule: str) -> Any:
    args = ["plan", model, "--schedule", schedule, "--json"]
    result = CliRunner().invoke(cli.app, args, env={"TERM": "dumb"})
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_full_size_flux_is_as_published() -> None:
    """3719.5 T uncached over 50 steps at 1024 px, and a ratio of 2.94; the page has our figures."""
    data = planned("FLUX", "toca-n4-flux")
    count, scores = data["published_count"], data["score_flops"]
    assert data["uncached_flops"] / 1e12 == pytest.approx(3719.5, rel=0.02)
    assert count["uncached_flops"] / count["total_flops"] == pytest.approx(2.94, rel=0.02)
    ours = data["total_flops"] - scores
    assert ours == pytest.approx(count["total_flops"] - count["projected_again_flops"], rel=2e-3)
    page = " ".join(PAGE.read_text().split())
    for figure in (
        f"{data['uncached_flops'] / 1e12:.1f} T uncached",
        f"{data['total_flops'] / 1e12:.1f} T",
        f"limit of {data['speed_up_limit']:.2f}",
        f"{scores / 1e12:.0f} T in 14 full steps",
        f"{count['projected_again_flops'] / 1e12:.0f} T",
        f"{count['total_flops'] / 1e12:.1f} T",
        f"{count['uncached_flops'] / count['total_flops']:.2f}x",
    ):
        assert figure in page, figure
