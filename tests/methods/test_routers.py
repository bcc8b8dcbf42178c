"""Router checkpoints, the masks that they stand for, and masks as text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cachegraph.errors import CachegraphError, InputError
from cachegraph.methods.router_file import (
    Mask,
    import_router,
    mask_to_yaml,
    masked_steps,
    read_router,
    runs_text,
)
from cachegraph.model.site import Site, SiteKind
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule

SEMANTICS = ("l2c", "harmonica", "uvit")
DEPTH = 3
MASK = """steps: 2
depth: 3
rows:
  - {attn: "111", mlp: "111"}
  - {attn: "010", mlp: "001"}
"""


def scores(steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(2 * DEPTH, generator=generator) for _ in range(steps)]


def save(path: Path, probabilities: list[Tensor], *, bare: bool = False) -> Path:
    """A checkpoint as published: the command line's Namespace stands beside the scores."""
    routers = {f"{i}.prob": one for i, one in enumerate(probabilities)}
    content = {"routers": routers, "opt": {"state": {}}, "args": argparse.Namespace(lr=0.01)}
    torch.save(routers if bare else content, path)
    return path


def sites(depth: int) -> list[Site]:
    kinds = (SiteKind.ATTN, SiteKind.MLP)
    return [
        Site(f"blocks.{block}.{kind}", kind, values=(), module=None, anchors=())
        for block in range(depth)
        for kind in kinds
    ]


def fails(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


# --- checkpoints


def published_l2c(probabilities: list[Tensor], threshold: float) -> list[list[list[bool]]]:
    """As ``dynamic_models.py`` runs: an index that counts down, features dropped at odd ones."""
    rank = {
        i: {j for j, p in enumerate(prob) if torch.sigmoid(p) > threshold}
        for i, prob in enumerate(probabilities)
        if i % 2 == 0
    }
    rows = []
    for index in range(len(probabilities) - 1, -1, -1):
        dropped = index % 2 == 1
        runs = [dropped or j in rank[index] for j in range(2 * DEPTH)]
        rows.append([runs[0::2], runs[1::2]])
    return rows


def published_harmonica(probabilities: list[Tensor], threshold: float) -> list[list[list[bool]]]:
    """As ``dynamic_models.py`` runs: at the first call there is no cache to ask the router for."""
    rows, cached = [], False
    for prob in reversed(probabilities):
        runs = [bool(torch.sigmoid(p) > threshold) or not cached for p in prob]
        rows.append([runs[0::2], runs[1::2]])
        cached = True
    return rows


def published_uvit(probabilities: list[Tensor], threshold: float) -> list[list[list[bool]]]:
    """As ``uvit_dynamic.py`` runs: a counter of calls, two a step for cond and uncond."""
    rows, cached = [], False
    for call in range(0, 2 * len(probabilities), 2):
        if call % 4 == 2:
            cached = False
        router = call // 4  # position of the solver's step in its map of timesteps
        runs = [bool(torch.sigmoid(p) > threshold) or not cached for p in probabilities[router]]
        rows.append([runs[0::2], runs[1::2]])
        cached = True
    return rows


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("semantics", "published"),
    [("l2c", published_l2c), ("harmonica", published_harmonica), ("uvit", published_uvit)],
)
@pytest.mark.parametrize("bare", [False, True])
def test_masks_are_those_of_the_published_code(
    tmp_path: Path,
    threshold: float,
    semantics: str,
    published: Callable[[list[Tensor], float], list[list[list[bool]]]],
    bare: bool,
) -> None:
    probabilities = scores(8)
    mask = read_router(save(tmp_path / "r.pt", probabilities, bare=bare), threshold, semantics)
    rows = [[list(a), list(m)] for a, m in zip(mask.attn, mask.mlp, strict=True)]
    assert rows == published(probabilities, threshold)
    assert (mask.steps, mask.depth) == (8, DEPTH)
    ruled = masked_steps(semantics, 8)
    assert 0 < sum(mask.runs(ruled)) < 2 * DEPTH * len(ruled)


def test_the_threshold_itself_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pth", [torch.zeros(2), torch.zeros(2)])
    assert read_router(path, 0.5, "harmonica").runs([1]) == (0, 0)
    assert read_router(path, 0.49, "harmonica").runs([1]) == (1, 1)


def test_masked_steps() -> None:
    assert masked_steps("l2c", 6) == [1, 3, 5]
    assert masked_steps("harmonica", 6) == [1, 2, 3, 4, 5]
    assert masked_steps("uvit", 6) == [2, 4]


class Foreign:
    """A class that a weights-only load must not make."""


def test_files_that_are_no_routers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    start = f"{path}: not a router; expected tensors '0.prob', '1.prob', ... of one even length, "
    start += "one a step; found "
    for content, found in (
        ({"routers": {"0.prob": torch.zeros(3)}}, "['0.prob']"),
        ({"0.prob": torch.zeros(4), "2.prob": torch.zeros(4)}, "['0.prob', '2.prob']"),
        ({"0.prob": torch.zeros(4), "1.prob": torch.zeros(2)}, "['0.prob', '1.prob']"),
        ({"0.prob": torch.zeros(0)}, "['0.prob']"),
        ({"weight": torch.zeros(4)}, "['weight']"),
        ({"routers": torch.zeros(4)}, "Tensor"),
        ([torch.zeros(4)], "[]"),
    ):
        torch.save(content, path)
        assert fails(read_router, path, 0.1, "l2c") == start + found

    torch.save({"routers": {"0.prob": torch.zeros(2)}, "args": Foreign()}, path)
    assert fails(read_router, path, 0.1, "l2c") == (
        f"{path}: the router cannot be read; expected a checkpoint with tensors only; "
        f"found the class {Foreign.__module__}.Foreign"
    )


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pt", scores(4)).read_bytes()
    start = "the router cannot be read; expected a checkpoint with tensors only; found "
    path = tmp_path / "r.pt"
    for damaged in (b"", b"nothing", whole[: len(whole) // 2], whole[:100] + whole[140:]):
        path.write_bytes(damaged)
        assert fails(read_router, path, 0.1, "l2c").startswith(f"{path}: {start}")
    absent = tmp_path / "absent.pt"
    assert fails(read_router, absent, 0.1, "l2c") == f"{absent}: there is no such file"


# --- masks as text


def test_mask_as_yaml_and_json(tmp_path: Path) -> None:
    whole, partly = (True, True, True), (False, True, False)
    expected = Mask((whole, partly), (whole, (False, False, True)))
    path = tmp_path / "mask.yaml"
    path.write_text(MASK, encoding="utf-8")
    assert read_router(path, 0.1, "l2c") == expected
    assert mask_to_yaml(expected, "What it is.\nFrom where.").splitlines()[:3] == [
        "# What it is.",
        "# From where.",
        "steps: 2",
    ]
    path.write_text(mask_to_yaml(expected, "What it is."), encoding="utf-8")
    assert read_router(path, 0.1, "l2c") == expected
    rows = [{"attn": [1, 1, 1], "mlp": "111"}, {"attn": "010", "mlp": [0, 0, 1]}]
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert read_router(path, 0.1, "l2c") == expected


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("depth", "dept", ":2: unknown key 'dept' in the mask; expected one of depth, rows, steps; "
         "did you mean 'depth'?"),
        ("steps: 2", "steps: 3", ":1: 'steps' does not fit the rows; expected 2; found 3"),
        ("depth: 3", "depth: 28", ":2: 'depth' does not fit the rows; expected 3; found 28"),
        ('"010"', '"01"', ":5: rows of different lengths; expected 3 blocks, as in the first row; "
         "found 2"),
        ('"010"', "010", ":5: the row has no list of 0 and 1 for 'attn'; expected such as {attn: "
         "'0110', mlp: '1011'}, a digit a block; found {'attn': 10, 'mlp': '001'}"),
        ('"010"', '"012"', ":5: the row has no list of 0 and 1 for 'attn'; expected such as {attn: "
         "'0110', mlp: '1011'}, a digit a block; found {'attn': '012', 'mlp': '001'}"),
        ('mlp: "001"', 'ff: "001"', ":5: unknown key 'ff' in a row; expected such as {attn: "
         "'0110', mlp: '1011'}, a digit a block"),
        (MASK, "rows: 3", ":1: 'rows' is no list; expected such as {attn: '0110', mlp: '1011'}, a "
         "digit a block"),
        (MASK, "rows: []", ":1: not a mask; expected rows, one a step"),
        (MASK, "- 1", ":1: not a mask; expected rows, one a step"),
    ],
)  # fmt: skip
def test_masks_are_refused_with_the_line(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = tmp_path / "mask.yaml"
    path.write_text(MASK.replace(before, after), encoding="utf-8")
    assert fails(read_router, path, 0.1, "l2c") == f"{path}{message}"


def test_json_masks_are_refused_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    path.write_text('{"rows": [{"attn": "1", "mlp": "1"}, {"attn": "1"}]}', encoding="utf-8")
    assert fails(read_router, path, 0.1, "l2c") == (
        f"{path}: rows[1]: the row has no list of 0 and 1 for 'mlp'; expected such as {{attn: "
        "'0110', mlp: '1011'}, a digit a block; found {'attn': '1'}"
    )
    path.write_text("{", encoding="utf-8")
    assert fails(read_router, path, 0.1, "l2c").startswith(f"{path}: not a JSON file; found")


# --- import


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_an_imported_mask_stands_for_its_checkpoint(tmp_path: Path, semantics: str) -> None:
    save(tmp_path / "router.pt", scores(8))
    mask = import_router(tmp_path / "router.pt", tmp_path / "mask.yaml", 0.5, semantics)
    assert read_router(tmp_path / "mask.yaml", 0.5, semantics) == mask
    rows = []
    for file in ("router.pt", "mask.yaml"):
        (tmp_path / "schedule.yaml").write_text(
            "cachegraph: 1\nsteps: 8\npolicy:\n"
            f"  {{method: router, file: {file}, threshold: 0.5, semantics: {semantics}}}\n",
            encoding="utf-8",
        )
        rows.append(make_rows(load_schedule(tmp_path / "schedule.yaml"), sites(DEPTH)))
    assert rows[0] == rows[1]
    comment = (tmp_path / "mask.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert comment == [
        f"# The router router.pt at threshold 0.5, semantics {semantics}.",
        f"# {runs_text(mask, semantics)}.",
    ]


def test_import_refuses_what_it_cannot_read_or_write(tmp_path: Path) -> None:
    path = save(tmp_path / "router.pt", scores(4))
    mask = tmp_path / "mask.yaml"
    mask.write_text(MASK, encoding="utf-8")
    assert fails(import_router, mask, tmp_path / "out.yaml") == (
        f"{mask}: not a router checkpoint; expected one of .pt, .pth, .ckpt, .bin"
    )
    assert fails(import_router, path, tmp_path / "out.pt") == (
        f"{tmp_path}/out.pt: masks are written as YAML; expected a .yaml file"
    )
    assert fails(import_router, path, tmp_path / "no/out.yaml") == (
        f"{tmp_path}/no/out.yaml: cannot be written; found No such file or directory; "
        "free some space, or choose another path"
    )


# --- as policy


def rows_of(tmp_path: Path, steps: int, depth: int, **keys: Any) -> str:
    path = tmp_path / "schedule.yaml"
    text = "".join(f"  {key}: {value}\n" for key, value in keys.items())
    path.write_text(f"cachegraph: 1\nsteps: {steps}\npolicy:\n  method: router\n{text}", "utf-8")
    schedule = load_schedule(path)
    with pytest.raises(CachegraphError) as caught:
        make_rows(schedule, sites(depth))
    return str(caught.value).replace(str(tmp_path), ".")


def test_routers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "router.pt", scores(8))
    assert rows_of(tmp_path, 20, DEPTH, file="router.pt") == (
        "./schedule.yaml:5: 'file: router.pt' is a router of 8 steps; expected 20 steps, as "
        "the schedule has; set steps: 8, or use the router of 20 steps"
    )
    assert rows_of(tmp_path, 8, 2, file="router.pt") == (
        "./schedule.yaml:5: 'file: router.pt' is a router of 3 blocks; expected 2 attn sites, as "
        "the model has (4 sites: blocks.0.attn (attn), blocks.0.mlp (mlp), blocks.1.attn (attn), "
        "blocks.1.mlp (mlp)); use the router that was trained for this model"
    )
    (tmp_path / "mask.yaml").write_text(MASK.replace('"111"', '"110"', 1), encoding="utf-8")
    assert rows_of(tmp_path, 2, DEPTH, file="mask.yaml") == (
        "./schedule.yaml:5: 'file: mask.yaml' reuses at step 0, before anything was computed; "
        "expected a router whose first step runs everything; check 'threshold' and 'semantics'"
    )
    assert rows_of(tmp_path, 2, DEPTH, file="absent.pt") == (
        "./schedule.yaml:5: no file 'absent.pt'; expected ./absent.pt or absent.pt; "
        "put the published file there, or give its path"
    )


def test_a_preset_says_that_its_file_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        make_rows(load_schedule("l2c-20"), sites(28))
    assert str(caught.value).rpartition("l2c-20.yaml:")[2] == (
        "6: the router policy reads 'DDIM20_router.pt', which presets come without; expected that "
        "file in the current folder; the preset says: DDIM20_router.pt is in DiT/ckpt of "
        "horseee/learning-to-cache"
    )
    save(tmp_path / "DDIM20_router.pt", [torch.zeros(56)] * 20)
    assert len(make_rows(load_schedule("l2c-20"), sites(28))) == 20


# --- the published routers


@pytest.mark.parametrize(
    ("name", "total", "attn", "mlp"),
    [("DDIM20_router.pt", 560, 157, 155), ("DDIM50_router.pt", 1400, 371, 365)],
)
def test_published_routers(shared: Path, name: str, total: int, attn: int, mlp: int) -> None:
    mask = read_router(shared / "routers" / name, 0.1, "l2c")
    ruled = masked_steps("l2c", mask.steps)
    assert mask.runs(ruled) == (attn, mlp)
    assert runs_text(mask, "l2c") == (
        f"{attn + mlp} of the {total} modules of {mask.steps // 2} masked steps are run: "
        f"{attn} attn, {mlp} mlp"
    )


def test_published_router_as_smoothcache_lists(shared: Path) -> None:
    mask = read_router(shared / "routers/DDIM50_router.pt", 0.1, "l2c")
    text = (shared / "smoothcache/50-N-2-l2c.json").read_text(encoding="utf-8")
    lists = json.loads(text)
    found = {
        f"{kind}-{block}": [int(row[block]) for row in rows]
        for block in range(mask.depth)
        for kind, rows in (("attn", mask.attn), ("mlp", mask.mlp))
    }
    assert len(found) == 56
    assert found == lists
