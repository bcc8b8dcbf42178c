"""The data of a report: complete, consistent with plan and costs, safe to put into a page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.compiler.compile import build
from cachegraph.errors import ArtifactError, InputError
from cachegraph.plan.action import sources
from cachegraph.report.data import SCHEMA, Extras, report_data
from cachegraph.report.figures import read_figures
from cachegraph.report.page import page
from cachegraph.show.view import view_artifact, view_build
from tests.cli.test_cli import printed, run
from tests.models import dit_steps, signed, tiny_dit
from tests.show.test_fold import TOCA, view


@cache
def data() -> dict[str, Any]:
    return report_data(view(), "a model", Extras())


def test_cells_add_up_to_the_cost_of_a_step() -> None:
    """What sites do not account for is what every step does outside of them."""
    plan = data()["plan"]
    found = [sum(plan["cells"][cell]["flops"] for cell in row) for row in plan["rows"]]
    rest = [total - sites for total, sites in zip(data()["cost"]["flops"], found, strict=True)]
    assert all(0 <= one < 0.2 * data()["cost"]["full_flops"] for one in rest)
    by_variant: dict[int, set[int]] = {}
    for step, variant in list(enumerate(plan["variant_of"]))[1:]:
        by_variant.setdefault(variant, set()).add(rest[step])
    assert all(len(numbers) == 1 for numbers in by_variant.values())


def test_what_is_kept_adds_up_to_the_cache() -> None:
    plan, kept = data()["plan"], [0] * TOCA["steps"]
    for one in plan["kept"]:
        for step in range(one["made"], one["last"]):
            kept[step] += one["bytes"]
    assert kept == data()["cost"]["cache_bytes"]
    assert {one["what"] for one in plan["kept"]} == {"value", "order"}


def test_every_cell_says_what_its_action_says() -> None:
    plan = data()["plan"]
    for step, row in enumerate(view().plan.rows):
        for site, action in enumerate(row):
            cell = plan["cells"][plan["rows"][step][site]]
            assert cell["action"] == type(action).__name__.lower()
            assert cell.get("tokens") == getattr(action, "tokens", None)
            assert cell.get("from", []) == list(sources(action))
    assert sorted(i for group in plan["groups"] for i in group["sites"]) == list(range(8))


def test_inputs_say_what_they_are_for() -> None:
    why = {one["label"]: one["why"] for one in data()["variants"][2]["inputs"]}
    assert "How many tokens blocks.0-3.mlp recompute" in why["tokens0"]
    assert "5 at step 4, 6 at step 5" in why["tokens0"]
    assert why["slot_blocks_0-3_mlp_order"].startswith("Made by an earlier step and kept since")
    assert why["x"] == "The model's own."
    outputs = {one["label"]: one["why"] for one in data()["variants"][0]["outputs"]}
    assert "which of its tokens to recompute" in outputs["write_blocks_0-3_mlp_order"]
    assert all(one["why"] for variant in data()["variants"] for one in variant["inputs"])


def keys_of(found: Any) -> set[str]:
    """Every key of the data, but those that are names of the model."""
    if isinstance(found, list):
        return set().union(*map(keys_of, found))
    if isinstance(found, dict):
        inner = {key: value for key, value in found.items() if key not in ("sizes", "prologues")}
        return set(found) | keys_of(list(inner.values()))
    return set()


def test_every_key_is_documented() -> None:
    text = Path("docs/report.md").read_text()
    said = set(re.findall(r"[`.](\w+)(?=[`.\[])", text))
    assert keys_of(data()) <= said


def test_marks_of_nodes() -> None:
    nodes = [n for s in data()["variants"][2]["sections"] for n in s["nodes"]]
    marks = {n["name"]: n.get("marks", "") for n in nodes}
    assert "r" in marks["mul_3"]  # the gate of a slot
    assert "t" in marks["linear_5_picked"]
    written = {n for n, found in marks.items() if "w" in found}
    assert written == {"scatter_blocks_0_mlp_2"}  # of the block that stands for all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report") / "a.cgraph"
    cg.compile(tiny_dit(depth=2), {**TOCA, "steps": 4}, dit_steps(1)[0], backend="eager", out=made)
    return made


def test_report_of_an_artifact_is_that_of_its_model(folder: Path) -> None:
    built = view_build(build(tiny_dit(depth=2), {**TOCA, "steps": 4}, dit_steps(1)[0]))
    read = view_artifact(load_artifact(folder))
    first, second = (report_data(one, "t", Extras()) for one in (built, read))
    assert first == second
    assert first["schema"] == SCHEMA


def test_artifact_without_provenance_is_still_shown(folder: Path) -> None:
    read = view_artifact(replace(load_artifact(folder), provenance_text=""))
    found = report_data(read, "t", Extras())
    assert [one["passes"] for one in found["variants"]] == [[]] * len(found["variants"])
    assert [s["label"] for s in found["variants"][0]["sections"]] == ["model"]


@pytest.mark.parametrize("text", ["[]", "{", '{"modules": {}}', '{"modules": 3}'])
def test_edited_provenance_is_an_error(folder: Path, tmp_path: Path, text: str) -> None:
    copy = tmp_path / "b.cgraph"
    shutil.copytree(folder, copy)
    (copy / "provenance.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(copy)
    signed(copy)
    with pytest.raises(ArtifactError, match=r"provenance\.json of the artifact is wrong"):
        _ = load_artifact(copy).provenance


HOSTILE = "</script><script>alert(1)</script><!--\u2028 & \"'"


def test_no_name_can_leave_the_data() -> None:
    text = page({**data(), "title": HOSTILE, "schedule": "/*SCRIPT*/"})
    assert text.count("</script>") == 2
    assert "<!--" not in text
    [found] = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(found)["title"] == HOSTILE
    assert json.loads(found)["schedule"] == "/*SCRIPT*/"


def test_page_asks_for_nothing_from_outside() -> None:
    text = page(data())
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}


def bench_file(path: Path, **changes: Any) -> Path:
    spread = {"low": 1.0, "median": 2.0, "high": 3.0}
    kind = {"variant": "variant0", "flops": 5.0, "seconds": {**spread, "median": 0.5}}
    entry = {"name": "uncached", "backend": "aoti", "trajectory": {**spread, "median": 6.0}}
    quick = {"name": "fast", "backend": "aoti", "trajectory": spread, "steps": [0.5]}
    quality = {"psnr": 30.0, "accuracy": 1.0, "images": 4}
    found = {
        "model": "m",
        "machine": {"device": "cpu", "threads": 2, "processor": "p", "torch": "2"},
        "entries": [
            {**entry, "steps": [1.0], "kinds": [kind], "quality": None},
            {**quick, "kinds": [kind], "quality": quality},
            {**quick, "name": "slow", "kinds": [kind], "quality": {**quality, "psnr": 29.0}},
        ],
    }
    path.write_text(json.dumps(found | changes))
    return path


def test_figures_of_a_bench(tmp_path: Path) -> None:
    measured, quality = read_figures(bench_file(tmp_path / "b.json"), "fast")
    assert measured is not None
    assert quality is not None
    assert measured["speed_up"] == 3.0
    assert measured["variants"] == [{"name": "variant0", "seconds": 0.5, "flops": 5.0}]
    assert [(p["name"], p["front"]) for p in quality["points"]] == [
        ("fast, aoti", True),
        ("slow, aoti", False),  # as quick, and further away
    ]


def test_figures_of_compare_and_search(tmp_path: Path) -> None:
    path, one = tmp_path / "c.json", {"full_steps": 5, "seconds": 2.0, "psnr": 30.0}
    rows = [
        {**one, "name": "uncached", "psnr": None},
        {**one, "name": "fast"},
        {**one, "name": "far", "psnr": 20.0, "seconds": 3.0},
    ]
    path.write_text(json.dumps({"model": "m", "backend": "eager", "compared": rows}))
    _, compared = read_figures(path, "any")
    assert compared is not None
    assert [(p["name"], p["x"], p["front"]) for p in compared["points"]] == [
        ("fast", 2.0, True),
        ("far", 3.0, False),
    ]
    path.write_text(json.dumps({"model": "m", "checked": rows[1:]}))
    _, searched = read_figures(path, "any")
    assert searched is not None
    assert (searched["x"], searched["points"][1]["x"]) == ("full steps", 5.0)


def test_figures_that_are_none(tmp_path: Path) -> None:
    path = bench_file(tmp_path / "b.json", entries=[])
    with pytest.raises(InputError, match="no figures of other; expected an entry of that name"):
        read_figures(path, "other")
    path.write_text("[1]")
    with pytest.raises(InputError, match="not a file of figures; expected JSON that bench"):
        read_figures(path, "fast")
    with pytest.raises(InputError, match="cannot be read"):
        read_figures(tmp_path / "none.json", "fast")


TINY = ("DiT(hidden_size=32, depth=2, num_heads=4)", "--input-size", "8")
ERRORS = {
    "report DiT-S/2 -s fora-n3 -o page.pdf": "a report is a page; expected a name with .html",
    "report DiT-S/2 -s fora-n3 -o page.html --json": "--json and --out exclude each other",
    "report DiT-S/2": "a model needs --schedule",
    "inspect DiT-S/2 -s fora-n3 --html a.html --sites": "exclude each other",
}


@pytest.mark.parametrize("line", ERRORS)
def test_wrong_command_lines(line: str) -> None:
    result = run(*line.split())
    assert result.exit_code != 0
    assert ERRORS[line] in " ".join(result.output.split())


def test_command_writes_a_page_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = printed("report", *TINY, "-s", "fora-n3", "-o", "deep/r.html")
    assert said.startswith("deep/r.html: open it in a browser; 0.")
    [found] = re.findall(r'id="data">(.*?)</script>', Path("deep/r.html").read_text(), re.DOTALL)
    assert json.loads(found) == json.loads(printed("report", *TINY, "-s", "fora-n3", "--json"))
    printed("inspect", *TINY, "-s", "fora-n3", "--html", "i.html")
    assert Path("i.html").read_text() == Path("deep/r.html").read_text()
