"""Pictures and tables of plans, compared as text."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console, RenderableType
from rich.text import Text

from cachegraph.compiler.cost import PlanCost
from cachegraph.model.site import Site, SiteKind, SiteValue
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Score, Selection
from cachegraph.show.picture import (
    PictureRow,
    amount,
    overview,
    picture,
    picture_rows,
    ranges,
    size,
    steps_text,
    token_picture,
    variants_table,
)
from cachegraph.spec import TensorSpec
from tests.fake_sites import make_sites

ACTIONS: dict[str, Action] = {"C": Compute(), "R": Reuse(0), "F": Forecast((0,), (1.0,))}


def site(name: str) -> Site:
    kind = SiteKind.ATTN if name.endswith("attn") else SiteKind.MLP
    value = SiteValue("node", TensorSpec(("s0", 4), torch.float32), name)
    return Site(name, kind, (value,), name, ())


def plan_of(**cells: str) -> Plan:
    """A plan from one string a site; ``b0_attn`` names the site ``blocks.0.attn``."""
    names = [name.replace("b", "blocks.").replace("_", ".") for name in cells]
    rows = [tuple(ACTIONS[cell] for cell in column) for column in zip(*cells.values(), strict=True)]
    return make_plan([site(name) for name in names], rows)


MIXED = {"b0_attn": "CRRC", "b0_mlp": "CFRC", "b1_attn": "CRRC", "b1_mlp": "CCRF"}


def text(part: RenderableType, width: int = 80, **options: bool) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **options).print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_sites_that_do_the_same_share_a_row() -> None:
    assert picture_rows(plan_of(**MIXED)) == [
        PictureRow("blocks.0-1.attn", 2, "CRRC"),
        PictureRow("blocks.0.mlp", 1, "CFRC"),
        PictureRow("blocks.1.mlp", 1, "CCRF"),
    ]


def test_sites_of_one_name_share_a_row_where_room_is_scarce() -> None:
    # a digit: tenths of the sites that compute; 0 where they differ and none does
    plan = plan_of(b0_mlp="CFCC", b1_mlp="CRRC", b2_mlp="CRRR", b0_attn="CRRR")
    assert len(picture_rows(plan, most=4)) == 4
    assert picture_rows(plan, most=3) == [
        PictureRow("blocks.0-2.mlp", 3, "C037"),
        PictureRow("blocks.0.attn", 1, "CRRR"),
    ]


def test_digits_never_look_like_all_or_nothing() -> None:
    cells = {f"b{i}_mlp": "C" + "CR"[i > 0] + "CR"[i == 0] for i in range(40)}
    [row] = picture_rows(plan_of(**cells), most=1)
    assert row.cells == "C19"


def test_names_of_many_blocks_stay_short() -> None:
    cells = {f"b{i}_mlp": "CR" if i in (0, 2, 4, 5, 6, 9, 11) else "CC" for i in range(12)}
    labels = [row.label for row in picture_rows(plan_of(**cells))]
    assert labels == ["blocks.0,2,..,11.mlp", "blocks.1,3,7-8,10.mlp"]


def test_picture_is_letters_with_a_scale_and_a_legend() -> None:
    assert text(picture(plan_of(**MIXED), width=80)) == (
        "                    0\n"
        "blocks.0-1.attn  2  CRRC\n"
        "blocks.0.mlp     1  CFRC\n"
        "blocks.1.mlp     1  CCRF\n"
        "\n"
        "C compute   R reuse   F forecast"
    )
    assert text(picture(plan_of(**MIXED), width=80, most=2)).endswith(
        "blocks.0-1.mlp   2  C5R5\n\nC compute   R reuse   0-9 tenths of these sites compute"
    )


def test_steps_that_do_not_fit_are_drawn_below() -> None:
    plan = plan_of(b0_mlp="C" + "R" * 44)
    assert text(picture(plan, width=38)) == (
        "                 0         10\n"
        "blocks.0.mlp  1  CRRRRRRRRRRRRRRRRRRR\n"
        "\n"
        "                 20        30\n"
        "blocks.0.mlp  1  RRRRRRRRRRRRRRRRRRRR\n"
        "\n"
        "                 40\n"
        "blocks.0.mlp  1  RRRRR\n"
        "\n"
        "C compute   R reuse"
    )


def test_endless_steps_are_cut() -> None:
    drawn = text(picture(plan_of(b0_mlp="C" + "R" * 299), width=38))
    assert drawn.count("blocks.0.mlp") == 12
    assert drawn.endswith("\n... and 60 further steps\n\nC compute   R reuse")


def test_colours_change_no_letter() -> None:
    plan = plan_of(**MIXED)
    plain = text(picture(plan, width=80))
    coloured = text(picture(plan, width=80), force_terminal=True, color_system="standard")
    assert "\x1b[30;42mC\x1b[0m" in coloured
    assert "\x1b[" not in plain
    assert "\n".join(Text.from_ansi(line).plain for line in coloured.splitlines()) == plain


def test_overview() -> None:
    flops, kept, known = (10**9, 2 * 10**8, 10**8, 10**9), (96, 128, 32, 0), (3072, 512, 0, 0)
    cost = PlanCost({"s0": 2}, flops, 10**9, kept, known, 4096)
    plan = plan_of(**MIXED)
    assert text(overview("tiny, mixed", plan, cost, "batch 2", 80, None)) == (
        "tiny, mixed\n"
        "\n"
        "steps     4, 1 of them full\n"
        "sites     4\n"
        "FLOPs     2.30 G of 4.00 G uncached, batch 2\n"
        "speed-up  at most 1.74x, going by FLOPs\n"
        "cache     at most 128 B, first after step 1\n"
        "history   attn 1, mlp 1: the most values kept of a site\n"
        "liveness  saves 64 B of 128 B on average, 0 B of 128 B at the peak\n"
        "prologue  at most 3.00 KiB known before a step runs\n"
        "weights   4.00 KiB, shared by 4 variants\n"
        "\n"
        "                    0\n"
        "blocks.0-1.attn  2  CRRC\n"
        "blocks.0.mlp     1  CFRC\n"
        "blocks.1.mlp     1  CCRF\n"
        "\n"
        "C compute   R reuse   F forecast\n"
        "\n"
        "variant   calls  steps  attn  mlp      FLOPs a call  of full\n"
        "variant0      1  0      2 C   2 C            1.00 G   100.0%\n"
        "variant1      1  1      2 R   1 C 1 F         200 M    20.0%\n"
        "variant2      1  2      2 R   2 R             100 M    10.0%\n"
        "variant3      1  3      2 C   1 C 1 F        1.00 G   100.0%"
    )


def test_variants_cost_the_mean_of_their_steps() -> None:
    plan = plan_of(b0_mlp="CRRRC")
    cost = PlanCost({"s0": 2}, (900, 100, 200, 600, 700), 1000, (0,) * 5, (0,) * 5, 0)
    lines = text(variants_table(plan, cost)).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [["800", "80.0%"], ["300", "30.0%"]]


@pytest.mark.parametrize(
    ("count", "decimal", "binary"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.00 k", "1000 B"),
        (1024, "1.02 k", "1.00 KiB"),
        (8_571_639_693_312, "8.57 T", "7.80 TiB"),
        (99_999_999, "100 M", "95.4 MiB"),
        (999_999, "1.00 M", "977 KiB"),
    ],
)
def test_numbers_have_three_digits(count: int, decimal: str, binary: str) -> None:
    assert (amount(count), size(count)) == (decimal, binary)


def test_steps_as_text() -> None:
    assert ranges([0, 1, 4, 5, 6, 9]) == ["0", "1", "4-6", "9"]
    assert ranges([0, 1, 4], least=2) == ["0-1", "4"]
    assert steps_text([0, 2, 4, 6, 8, 10, 12]) == "0 2 4 6 8 10 12"
    assert steps_text(range(0, 16, 2)) == "0 2 4 6 8 ... 14"
    assert steps_text(range(1000, 9999, 7)) == "1000 ... 9995"


def test_tokens_are_drawn_as_tenths_of_each_site() -> None:
    sites = make_sites(depth=4, tokens=20, channels=8)
    row = [Compute(), Refresh(0, 3, 0, 0), Reuse(0), Refresh(0, 1, 0, 0)] * 2
    later = [Reuse(0), Refresh(1, 19, 0, 1), Reuse(0), Reuse(1)] * 2
    selection = Selection(Score.NORM, 0.1, 0.0, 1, (4, 5))
    rows = (tuple([Compute()] * 8), tuple(row), tuple(later))
    plan = make_plan(sites, rows, selection=selection)
    drawn = token_picture(plan, 80)
    assert drawn is not None
    lines = drawn.plain.splitlines()
    assert lines[1:5] == [
        "blocks.0.mlp  1  C19",
        "blocks.1.mlp  1  C0.",
        "blocks.2.mlp  1  C19",
        "blocks.3.mlp  1  C0.",
    ]
    assert lines[-1] == ". no token   0-9 tenths of the tokens are recomputed   C all"
    many = make_sites(("mlp",), depth=16, tokens=20, channels=8)
    made = make_plan(many, ((Compute(),) * 16, (Refresh(0, 5, 0, 0),) * 16), selection=selection)
    folded = token_picture(made, 80)
    assert folded is not None
    assert folded.plain.splitlines()[1] == "blocks.0-2.mlp    3  C2"
    assert len([line for line in folded.plain.splitlines() if "mlp" in line]) == 6


def test_without_choices_there_is_no_picture_of_tokens() -> None:
    sites = make_sites(depth=1)
    assert token_picture(make_plan(sites, ((Compute(),) * 2,)), 80) is None
