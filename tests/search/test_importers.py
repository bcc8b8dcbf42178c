"""Step lists, masks and tables that others published, as schedules."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cachegraph.cli import app
from cachegraph.errors import InputError
from cachegraph.schedule.schedule import load_schedule
from cachegraph.search.importers import SCM, cem_steps, import_schedule, scm_steps


def full_steps(source: Path | str, **options: object) -> list[int]:
    schedule, _ = import_schedule(str(source), **options)
    return list(schedule.policy.full_steps)


# --- lists and masks


def test_step_lists(tmp_path: Path) -> None:
    """MeanCache's list for Qwen-Image at 10 of 50 steps, as text and as JSON."""
    wanted = [0, 1, 3, 7, 14, 21, 28, 35, 42, 49]
    text, listed = tmp_path / "list.txt", tmp_path / "list.json"
    text.write_text("0, 1, 3, 7, 14,\n21 28 35 42 49\n")
    listed.write_text(json.dumps(wanted))
    assert full_steps(text, steps=50) == full_steps(listed, steps=50) == wanted
    with pytest.raises(InputError, match="does not say how many"):
        import_schedule(str(listed))


def test_masks(tmp_path: Path) -> None:
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps([1, 1, 0, 1, 0, 0, 1]))
    schedule, comment = import_schedule(str(mask), order=2, kinds=("attn", "mlp"))
    assert schedule.steps == 7
    assert schedule.policy.full_steps == (0, 1, 3, 6)
    assert schedule.policy.order == 2
    assert schedule.sites.kinds == ("attn", "mlp")
    assert "4 of 7 steps full" in comment
    with pytest.raises(InputError, match="another number of steps"):
        import_schedule(str(mask), steps=8)


@pytest.mark.parametrize(
    ("name", "count"), [("slow", 18), ("medium", 15), ("fast", 11), ("ultra", 8)]
)
def test_step_masks_of_cache_dit(name: str, count: int) -> None:
    assert sum(SCM[name]) == 28
    listed, _ = scm_steps(name, 28)
    assert len(listed) == count
    assert {0, 27} <= set(listed)
    shorter, _ = scm_steps(name, 20)
    assert shorter == sorted({*(step for step in listed if step < 20), 19})
    assert full_steps(f"scm:{name}") == listed
    with pytest.raises(InputError, match="is for 28 steps"):
        scm_steps(name, 29)


def test_smoothcache_lists(tmp_path: Path) -> None:
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"attn": [1, 0, 1], "mlp": [1, 1, 0]}))
    schedule, _ = import_schedule(str(lists))
    assert schedule.steps == 3
    assert schedule.policy.method == "smoothcache"


# --- CEM


def random_table(steps: int, seed: int, counted_down: bool) -> dict[str, torch.Tensor]:
    numbers = np.random.default_rng(seed).uniform(0.1, 1, (9, steps)).astype(np.float32)
    for skipped in range(1, 10):
        numbers[skipped - 1, :skipped] = 0
    rows = numbers[:, ::-1] if counted_down else numbers
    return {f"C={n + 1}": torch.from_numpy(row.copy()) for n, row in enumerate(rows)}


@pytest.mark.parametrize("weight", ["none", "linear", "quadratic"])
@pytest.mark.parametrize("counted_down", [True, False])
def test_the_path_of_least_error(weight: str, counted_down: bool) -> None:
    """Of all paths, by trying them."""
    steps, full, spread = 13, 5, 1
    table = random_table(steps, 3, counted_down)
    up = random_table(steps, 3, False)
    gaps = range(round(steps / full) - spread, round(steps / full) + spread + 1)

    def price(gap: int, end: int) -> float:
        if gap == 1:
            return 0.0
        total = float(up[f"C={gap - 1}"].numpy()[: end + 1].sum())
        factor = {"none": 1, "linear": gap - 1, "quadratic": (gap - 1) ** 2}[weight]
        return total * factor or float("inf")

    costs = {}
    for apart in product(gaps, repeat=full - 1):
        path = np.cumsum([0, *apart]).tolist()
        if path[-1] == steps - 1:
            costs[tuple(path)] = sum(map(price, apart, path[1:]))
    found, count = cem_steps(table, full, spread, weight)
    assert count == steps
    assert tuple(found) == min(costs, key=lambda path: costs[path])


@pytest.mark.parametrize("name", ["dit", "flux", "wan21"])
def test_published_tables(shared: Path, name: str) -> None:
    path = shared / "imports" / f"cem-priors-{name}.pt"
    for full in (18, 14, 12) if name == "dit" else (25, 15):
        listed = full_steps(path, full=full)
        assert (listed[0], listed[-1], len(listed)) == (0, 49, full)
        assert max(np.diff(listed)) <= round(50 / full) + 1


@pytest.mark.parametrize(
    ("table", "full", "message"),
    [
        ({"C=1": torch.ones(5)}, 9, "expected 2 to 5"),
        ({"C=2": torch.ones(5)}, 3, "not a table of CEM"),
        ([1, 2], 3, "not a table of CEM"),
        (random_table(50, 0, True), 3, "no path has 3 full steps"),
    ],
)
def test_tables_that_do_not_fit(table: object, full: int, message: str) -> None:
    with pytest.raises(InputError, match=r"full steps|table") as caught:
        cem_steps(table, full, 1, "quadratic")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["steps: all", "[]", "[0, 1.5]", '"text"'])
def test_what_is_no_list(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match="not a list"):
        import_schedule(str(tmp_path / "list.json"), steps=5)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "medium.yaml"
    done = CliRunner().invoke(
        app, ["import-schedule", "scm:medium", "-o", str(out), "--order", "1"]
    )
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("# From scm:medium: 15 of 28 steps full")
    assert load_schedule(out).policy.order == 1
    refused = CliRunner().invoke(app, ["import-schedule", "scm:quick", "-o", str(out)])
    assert "no mask 'quick'" in refused.output
