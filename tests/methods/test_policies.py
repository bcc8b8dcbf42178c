"""Policies whose rows need no file: full, FORA and the table; globs; rows that reuse the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cachegraph.errors import PlanError, SiteError
from cachegraph.methods.fora import Fora
from cachegraph.methods.method import resolve
from cachegraph.model.site import Site, SiteKind, SiteValue
from cachegraph.plan.action import Compute, Reuse, Row
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import load_schedule
from cachegraph.spec import TensorSpec

C = Compute()
SPEC = TensorSpec(("s0", 2, 3), torch.float32)


def sites(blocks: int = 2, kinds: tuple[SiteKind, ...] = (SiteKind.ATTN, SiteKind.MLP)) -> tuple:
    names = [(f"blocks.{block}.{kind}", kind) for block in range(blocks) for kind in kinds]
    return tuple(Site(n, kind, (SiteValue(n, SPEC, None),), None, ()) for n, kind in names)


def rows(steps: int, policy: dict[str, Any], **keys: Any) -> tuple[Row, ...]:
    schedule = {"cachegraph": 1, "steps": steps, "policy": policy, **keys}
    return make_rows(load_schedule(schedule), sites())


def computed(made: tuple[Row, ...]) -> list[list[int]]:
    return [[int(isinstance(action, Compute)) for action in row] for row in made]


# --- FORA


@pytest.mark.parametrize(
    ("steps", "interval", "count"),
    [(250, 3, 84), (250, 5, 51), (250, 7, 37), (50, 2, 26), (50, 3, 18), (50, 5, 11)],
)
def test_fora_computes_as_often_as_the_published_code(
    steps: int, interval: int, count: int
) -> None:
    full = Fora(method="fora", interval=interval).full_steps(steps)
    # The published loop, counted down: i = T - 1 first.
    wanted = {
        steps - 1 - i for i in range(steps - 1, -1, -1) if i == steps - 1 or i % interval == 0
    }
    assert len(full) == count
    assert full == wanted
    assert {0, steps - 1} <= full


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [
        # i = 49 and 48, then 46, 44, ...: doubled at the start
        (2, [0, *range(1, 50, 2)]),
        (3, [0, *range(1, 50, 3)]),
        (5, [0, *range(4, 50, 5)]),
    ],
)
def test_positions_of_the_full_steps(interval: int, wanted: list[int]) -> None:
    made = rows(50, {"method": "fora", "interval": interval})
    assert [step for step, row in enumerate(made) if row == (C,) * 4] == wanted


def test_counting_up() -> None:
    made = rows(7, {"method": "fora", "interval": 3, "count": "up"})
    assert [row[0] for row in made] == [C, Reuse(0), Reuse(0), C, Reuse(3), Reuse(3), C]


@pytest.mark.parametrize("count", ["up", "down"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_interval_of_one_is_no_caching(steps: int, count: str) -> None:
    assert rows(steps, {"method": "fora", "interval": 1, "count": count}) == ((C,) * 4,) * steps
    assert rows(steps, {"method": "full"}) == ((C,) * 4,) * steps


def test_an_interval_longer_than_the_trajectory() -> None:
    down = rows(4, {"method": "fora", "interval": 98})
    assert [row[0] for row in down] == [C, Reuse(0), Reuse(0), C]
    up = rows(4, {"method": "fora", "interval": 98, "count": "up"})
    assert [row[0] for row in up] == [C, Reuse(0), Reuse(0), Reuse(0)]


# --- table


def test_table_of_steps() -> None:
    made = rows(5, {"method": "table", "reuse_steps": [1, 2, 4]})
    assert made == tuple((action,) * 4 for action in (C, Reuse(0), Reuse(0), C, Reuse(3)))


def test_table_of_rows() -> None:
    table = ["compute", [0, 1, 1, 0], "reuse", [1, 0, 0, 1]]
    made = rows(4, {"method": "table", "rows": table})
    assert made == (
        (C, C, C, C),
        (Reuse(0), C, C, Reuse(0)),
        (Reuse(0), Reuse(1), Reuse(1), Reuse(0)),
        (C, Reuse(1), Reuse(1), C),
    )


TABLE = """\
cachegraph: 1
steps: 3
policy:
  method: table
  rows:
    - compute
    - reuse
    - [0, 1, 1]
"""


def test_row_that_does_not_fit_the_model_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(TABLE)
    with pytest.raises(PlanError) as caught:
        make_rows(load_schedule(path), sites())
    assert str(caught.value) == (
        f"{path}:8: row 2 of the table does not fit the model; "
        "expected 4 numbers, one a site (4 sites: blocks.0.attn (attn), blocks.0.mlp (mlp), "
        "blocks.1.attn (attn), blocks.1.mlp (mlp)); found 3"
    )
    three = (SiteKind.ATTN, SiteKind.CROSS_ATTN, SiteKind.MLP)
    assert len(make_rows(load_schedule(path), sites(1, three))) == 3


# --- which sites the policy rules


FORA = {"method": "fora", "interval": 3}


@pytest.mark.parametrize(
    ("chosen", "second_row"),
    [
        ({}, [0, 0, 0, 0]),
        ({"kinds": ["mlp"]}, [1, 0, 1, 0]),
        ({"include": ["blocks.1.*"]}, [1, 1, 0, 0]),
        ({"include": ["blocks.0.attn", "*.mlp"]}, [0, 0, 1, 0]),
        ({"exclude": ["blocks.0.*"]}, [1, 1, 0, 0]),
        ({"kinds": ["attn"], "include": ["blocks.*"], "exclude": ["*.1.*"]}, [0, 1, 1, 1]),
    ],
)
def test_globs(chosen: dict[str, Any], second_row: list[int]) -> None:
    made = computed(rows(5, FORA, sites=chosen))
    assert made[0] == [1, 1, 1, 1]
    assert made[2] == second_row


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"include": ["block.*"]},
            "schedule: sites: glob 'block.*' matches no site; expected 4 sites: blocks.0.attn ",
        ),
        ({"exclude": ["*.cross"]}, "schedule: sites: glob '*.cross' matches no site; expected 4"),
        (
            {"kinds": ["cross_attn"]},
            "schedule: sites: the model has no site of kind cross_attn; expected 4 sites: ",
        ),
        ({"exclude": ["*"]}, "schedule: sites: the schedule selects no site; expected 4 sites: "),
    ],
)
def test_globs_that_match_nothing(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError) as caught:
        rows(5, FORA, sites=chosen)
    assert str(caught.value).startswith(message)


def test_a_long_list_of_sites_is_cut() -> None:
    schedule = load_schedule(
        {"cachegraph": 1, "steps": 4, "policy": FORA, "sites": {"include": ["blocks.28.atn"]}}
    )
    with pytest.raises(SiteError) as caught:
        make_rows(schedule, sites(28))
    assert "56 sites: blocks.0.attn (attn), " in str(caught.value)
    assert str(caught.value).count("blocks.") < 10
    assert "did you mean 'blocks." in str(caught.value)


# --- reuse takes the newest value


def test_reuse_takes_the_newest_value_of_each_site() -> None:
    made = resolve([[True, True], [False, True], [False, False], [True, False], [False, False]])
    assert made == (
        (C, C),
        (Reuse(0), C),
        (Reuse(0), Reuse(1)),
        (C, Reuse(1)),
        (Reuse(3), Reuse(1)),
    )
