"""SmoothCache lists, in files as published and in schedules: keys, precedence, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cachegraph.errors import CachegraphError
from cachegraph.model.site import Site, SiteKind
from cachegraph.plan.action import Compute, Reuse
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule

ATTN, MLP, CROSS = SiteKind.ATTN, SiteKind.MLP, SiteKind.CROSS_ATTN
LISTS = {"attn": [1, 0, 1, 1], "mlp": [1, 1, 0, 1], "mlp-1": [1, 0, 0, 0]}


def site(name: str, kind: SiteKind) -> Site:
    return Site(name, kind, values=(), module=None, anchors=())


DIT = [site(f"blocks.{b}.{kind}", kind) for b in range(3) for kind in (ATTN, MLP)]
DIFFUSERS = [
    site(f"transformer_blocks.{b}.{name}", kind)
    for b in range(2)
    for name, kind in (("attn1", ATTN), ("attn2", CROSS), ("ff", MLP))
]


def computed(lists: dict[str, Any], model: list[Site], **keys: Any) -> list[str]:
    """The names of the computed sites of each step, in one text a step."""
    policy = {"method": "smoothcache", "lists": lists}
    schedule = load_schedule({"cachegraph": 1, "steps": 4, "policy": policy} | keys)
    rows = make_rows(schedule, model)
    return [
        " ".join(s.name for s, a in zip(model, row, strict=True) if isinstance(a, Compute))
        for row in rows
    ]


def test_a_block_goes_before_its_component() -> None:
    assert computed(LISTS, DIT)[1:] == [
        "blocks.0.mlp blocks.2.mlp",
        "blocks.0.attn blocks.1.attn blocks.2.attn",
        "blocks.0.attn blocks.0.mlp blocks.1.attn blocks.2.attn blocks.2.mlp",
    ]


def test_the_order_of_the_keys_does_not_matter() -> None:
    assert computed(dict(reversed(LISTS.items())), DIT) == computed(LISTS, DIT)


def test_sites_without_a_list_are_computed() -> None:
    assert computed({"mlp-2": [1, 0, 1, 1]}, DIT)[1] == " ".join(s.name for s in DIT[:-1])


def test_what_is_reused_is_the_newest_value() -> None:
    keys = {"cachegraph": 1, "steps": 4, "policy": {"method": "smoothcache", "lists": LISTS}}
    rows = make_rows(load_schedule(keys), DIT)
    assert rows[2][1] == Reuse(1)
    assert [row[3] for row in rows] == [Compute(), Reuse(0), Reuse(0), Reuse(0)]


def test_keys_are_components_or_kinds() -> None:
    assert computed({"attn1": [1, 0, 1, 1]}, DIFFUSERS)[1] == (
        "transformer_blocks.0.attn2 transformer_blocks.0.ff "
        "transformer_blocks.1.attn2 transformer_blocks.1.ff"
    )
    assert computed({"cross_attn": [1, 0, 1, 1], "ff-0": [1, 0, 1, 1]}, DIFFUSERS)[1] == (
        "transformer_blocks.0.attn1 transformer_blocks.1.attn1 transformer_blocks.1.ff"
    )
    lists = {"attn": [1, 0, 1, 1], "attn1-1": [1, 1, 1, 1], "mlp": [1, 0, 1, 1]}
    assert computed(lists, DIFFUSERS)[1] == (
        "transformer_blocks.0.attn2 transformer_blocks.1.attn1 transformer_blocks.1.attn2"
    )


def test_the_block_is_the_number_nearest_to_the_component() -> None:
    sites = [site("stages.0.blocks.7.attn", ATTN), site("stages.0.blocks.8:attn", ATTN)]
    assert computed({"attn-7": [1, 0, 1, 1]}, sites)[1] == "stages.0.blocks.8:attn"
    assert computed({"attn-8": [1, 0, 1, 1]}, sites)[1] == "stages.0.blocks.7.attn"


def test_sites_that_the_schedule_leaves_out_are_computed() -> None:
    found = computed(LISTS, DIT, sites={"exclude": ["blocks.1.*"]})
    assert found[1] == "blocks.0.mlp blocks.1.attn blocks.1.mlp blocks.2.mlp"


def refused(folder: Path, content: object) -> str:
    """The error of a file with this content; text is written as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "list.json").write_text(text, encoding="utf-8")
    path = folder / "s.yaml"
    path.write_text("cachegraph: 1\nsteps: 4\npolicy: {method: smoothcache, file: list.json}\n")
    schedule = load_schedule(path)
    with pytest.raises(CachegraphError) as caught:
        make_rows(schedule, DIT)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(folder), ".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attn": [1, 0, 1]}, "the list of 'attn' has the wrong length; expected 4 numbers, one a "
         "step; found 3; set steps: 3 in the schedule"),
        ({"attn": [1, 0, 2, 1]}, "the list of 'attn' holds something else than 0 and 1; expected 0 "
         "(reuse) or 1 (compute); found 2"),
        ({"attn": [1, False, 1, 1]}, "the list of 'attn' holds something else than 0 and 1; "
         "expected 0 (reuse) or 1 (compute); found false"),
        ({"attn": "1011"}, "'attn' is no list; expected a list of 0 (reuse) and 1 (compute); found "
         "text '1011'"),
        ({"attn": [0, 1, 1, 1]}, "the list of 'attn' reuses at step 0: nothing has been computed "
         "yet; expected 1 as the first number; found 0; let it begin with 1"),
        ({}, "there are no lists; expected such as {attn: [1, 0, 1], mlp: [1, 0, 1]}"),
        ([[1, 0, 1, 1]], "not a SmoothCache schedule; expected an object of lists of 0 and 1, such "
         "as {'attn': [1, 0, ...]}"),
        ({"attn1": [1, 0, 1, 1]}, "key 'attn1' matches no site; expected attn, attn-0, mlp, mlp-0, "
         "attn-1, mlp-1, attn-2, mlp-2; did you mean 'attn-1'?"),
        ({"mlp-3": [1, 0, 1, 1]}, "key 'mlp-3' matches no site; expected attn, attn-0, mlp, mlp-0, "
         "attn-1, mlp-1, attn-2, mlp-2; did you mean 'mlp-2'?"),
        ({"temporal": [1, 0, 1, 1]}, "key 'temporal' matches no site; expected attn, attn-0, mlp, "
         "mlp-0, attn-1, mlp-1, attn-2, mlp-2; take it out"),
        ("[", "not a JSON file; found Expecting value: line 1 column 2 (char 1)"),
    ],
)  # fmt: skip
def test_files_are_refused_with_key_and_remedy(tmp_path: Path, content: Any, message: str) -> None:
    assert refused(tmp_path, content) == f"./list.json: {message}"


def test_a_missing_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("cachegraph: 1\nsteps: 4\npolicy: {method: smoothcache, file: no.json}\n")
    with pytest.raises(CachegraphError) as caught:
        make_rows(load_schedule(path), DIT)
    assert str(caught.value) == (
        f"{path}:3: no file 'no.json'; expected {tmp_path}/no.json or no.json; "
        "put the published file there, or give its path"
    )


def test_a_key_of_the_schedule_itself_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "cachegraph: 1\nsteps: 2\npolicy:\n  method: smoothcache\n  lists:\n    atn: [1, 0]\n"
    )
    with pytest.raises(CachegraphError) as caught:
        make_rows(load_schedule(path), DIT[:2])
    assert str(caught.value) == (
        f"{path}:6: key 'atn' matches no site; expected attn, attn-0, mlp, mlp-0; "
        "did you mean 'attn'?"
    )


def test_files_stand_beside_the_schedule_or_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    text = "cachegraph: 1\nsteps: 2\npolicy: {method: smoothcache, file: list.json}\n"
    (there / "s.yaml").write_text(text)
    (here / "list.json").write_text('{"attn": [1, 0]}')
    schedule = load_schedule(there / "s.yaml")
    assert make_rows(schedule, DIT)[1][:2] == (Reuse(0), Compute())
    (there / "list.json").write_text('{"mlp": [1, 0]}')  # beside it goes first
    assert make_rows(schedule, DIT)[1][:2] == (Compute(), Reuse(0))
