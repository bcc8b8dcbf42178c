"""Plans: what is refused, liveness against a simulation, variants, step constants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, SiteValue
from cachegraph.plan.action import (
    Action,
    Compute,
    Forecast,
    Reuse,
    Row,
    makes_value,
    sources,
    structure,
)
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.spec import TensorSpec

C = Compute()


def site(name: str, *widths: int) -> Site:
    values = tuple(
        SiteValue(f"{name}_{i}", TensorSpec(("s0", 2, width), torch.float32), None)
        for i, width in enumerate(widths)
    )
    return Site(name, SiteKind.ATTN, values, None, ())


SITES = (site("a", 3), site("b", 5, 7))  # 24 and 96 bytes a sample


def planned(*rows: Row, **kwargs: object) -> Plan:
    return make_plan(SITES, rows, **kwargs)  # type: ignore[arg-type]


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ((C, C), (C,)),
            "x.yaml:3: the row of step 1 does not fit the model; "
            "expected 2 actions, one a site; found 1",
        ),
        (
            ((C, Reuse(0)),),
            "x.yaml:3: step 0 uses a value of b that does not exist yet; "
            "expected compute at step 0; found nothing was computed before the first step",
        ),
        (
            ((C, C), (Reuse(1), C)),
            "x.yaml:3: step 1 uses a value of a that does not exist yet; "
            "expected a value made at a step before 1; found step 1",
        ),
        (
            ((C, C), (C, Reuse(-1))),
            "x.yaml:3: step 1 uses a value of b that does not exist yet; "
            "expected a value made at a step before 1; found step -1",
        ),
        (
            ((C, C), (C, C), (Forecast((1, 2), (1.0, 1.0)), C)),
            "x.yaml:3: step 2 uses a value of a that does not exist yet; "
            "expected a value made at a step before 2; found step 2",
        ),
        (
            ((C, C), (Reuse(0), C), (Reuse(1), C)),
            "x.yaml:3: step 2 uses the value that step 1 makes of a; "
            "expected a step that computes the site; found reuse of step 0",
        ),
        (
            ((C, C), (C, C), (Forecast((1, 0), (2.0, -1.0)), C), (Reuse(2), C)),
            "x.yaml:3: step 3 uses the value that step 2 makes of a; "
            "expected a step that computes the site; found forecast from steps 1, 0",
        ),
        (
            ((C, C), (C, Forecast((0,), (1.0, 2.0)))),
            "x.yaml:3: the forecast of b at step 1 cannot be computed; expected one finite "
            "coefficient for each of at least one distinct step; "
            "found steps (0,), coefficients (1.0, 2.0)",
        ),
        (((C, C), (Forecast((), ()), C)), "found steps (), coefficients ()"),
        (
            ((C, C), (Forecast((0, 0), (1.0, 1.0)), C)),
            "found steps (0, 0), coefficients (1.0, 1.0)",
        ),
        (((C, C), (Forecast((0,), (math.nan,)), C)), "coefficients (nan,)"),
        (((C, C), (Forecast((0,), (math.inf,)), C)), "coefficients (inf,)"),
    ],
)
def test_rows_that_cannot_work(rows: tuple[Row, ...], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(*rows, place="x.yaml:3")
    assert str(caught.value).endswith(message)


def test_a_kept_forecast_may_be_used() -> None:
    kept = Forecast((1, 0), (2.0, -1.0), keeps=True)
    made = planned((C, C), (C, C), (kept, C), (Reuse(2), C))
    assert made.is_kept(0, 2)
    assert made.variants[made.variant_of[2]].writes == (True, False)


def test_too_many_variants() -> None:
    rows = ((C, C), (Reuse(0), C), (C, Reuse(0)), *[(Reuse(0), Reuse(0))] * 8)
    assert len(planned(*rows, max_variants=4).variants) == 4
    with pytest.raises(PlanError) as caught:
        planned(*rows, max_variants=3, place="x.yaml:9")
    assert str(caught.value) == (
        "x.yaml:9: the schedule needs 4 variants; expected at most 3 (max_variants); "
        "found steps 0: 2 compute; steps 1: 1 reuse, 1 compute; steps 2: 1 compute, 1 reuse; "
        "steps 3, 4, 5, 6, 7, 8, ...: 2 reuse; raise max_variants or make rows alike"
    )


# --- variants


def test_steps_of_one_structure_share_a_variant() -> None:
    made = planned((C, C), (Reuse(0), C), (C, C), (Reuse(2), C), (Reuse(0), Reuse(3)))
    assert [v.name for v in made.variants] == ["variant0", "variant1", "variant2"]
    assert [v.steps for v in made.variants] == [(0, 2), (1, 3), (4,)]
    assert made.variant_of == (0, 1, 0, 1, 2)
    assert made.variants[1].row == (Reuse(0), C)
    assert (made.steps, made.full_steps()) == (5, 2)


def test_a_write_that_only_some_steps_need_does_not_split_a_variant() -> None:
    made = planned((C, C), (Reuse(0), C), (C, C), (C, Reuse(2)))
    assert made.variants[0].steps == (0, 2)
    assert made.variants[0].writes == (True, True)
    assert [made.is_kept(0, s) for s in (0, 2)] == [True, False]
    assert [made.is_kept(1, s) for s in (0, 2)] == [False, True]


def test_nothing_is_written_that_nobody_reads() -> None:
    assert planned((C, C), (C, C)).variants[0].writes == (False, False)


def test_sites_with_equal_coefficients_share_a_step_constant() -> None:
    rows: list[Row] = [(C, C), (C, C)]
    rows += [(Forecast((1, 0), n), Forecast((1, 0), n)) for n in ((2.0, -1.0), (3.0, -2.0))]
    [_, forecast] = planned(*rows).variants
    [constant] = forecast.constants
    assert (constant.name, constant.sites) == ("forecast0", ("a", "b"))
    assert constant.values == {2: (2.0, -1.0), 3: (3.0, -2.0)}


def test_sites_that_differ_in_one_step_have_constants_of_their_own() -> None:
    one, two = (1.0, 0.5), (1.0, 0.25)
    made = planned(
        (C, C),
        (C, C),
        (Forecast((1, 0), one), Forecast((1, 0), one)),
        (Forecast((1, 0), one), Forecast((1, 0), two)),
    )
    found = {c.name: (c.sites, c.values) for c in made.variants[1].constants}
    assert found == {
        "forecast0": (("a",), {2: one, 3: one}),
        "forecast1": (("b",), {2: one, 3: two}),
    }


# --- liveness


def simulated(rows: tuple[Row, ...], batch: int) -> tuple[list[int], list[set[tuple[int, int]]]]:
    """Bytes kept and values let go after each step, by keeping all and looking at what follows."""
    size = [batch * 2 * 4 * 3, batch * 2 * 4 * (5 + 7)]
    held: set[tuple[int, int]] = set()
    kept, freed = [], []
    for step, row in enumerate(rows):
        held |= {(i, step) for i, action in enumerate(row) if makes_value(action)}
        coming = {
            (i, source)
            for later in rows[step + 1 :]
            for i, action in enumerate(later)
            for source in sources(action)
        }
        used_now = {(i, source) for i, action in enumerate(row) for source in sources(action)}
        assert used_now <= held
        gone = held - coming
        freed.append(gone & used_now)  # what is made and never used is not kept at all
        held -= gone
        kept.append(sum(size[i] for i, _ in held))
    return kept, freed


@st.composite
def actions(draw: st.DrawFn, made: list[int]) -> Action:
    kind = draw(st.sampled_from(["compute", "reuse", "forecast"])) if made else "compute"
    if kind == "compute":
        return C
    if kind == "reuse":
        return Reuse(draw(st.sampled_from(made)))
    chosen = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    numbers = tuple(draw(st.sampled_from([0.0, 1.0, -2.0])) for _ in chosen)
    return Forecast(tuple(chosen), numbers, keeps=draw(st.booleans()))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Row, ...]:
    made: tuple[list[int], ...] = ([], [])
    rows = []
    for step in range(draw(st.integers(1, 9))):
        row = tuple(draw(actions(steps)) for steps in made)
        for steps, action in zip(made, row, strict=True):
            if makes_value(action):
                steps.append(step)
        rows.append(row)
    return tuple(rows)


@given(tables(), st.integers(1, 4))
def test_liveness_is_that_of_a_simulation(rows: tuple[Row, ...], batch: int) -> None:
    made = planned(*rows)
    kept, freed = simulated(rows, batch)
    assert list(made.cache_bytes({"s0": batch})) == kept
    assert [{kept[:2] for kept in freed} for freed in made.freed_after] == freed
    assert kept[-1] == 0


def test_what_liveness_saves() -> None:
    made = planned((C, C), (C, C), (Forecast((1, 0), (2.0, -1.0)), Reuse(1)), (C, C), (Reuse(3), C))
    a, b = 24, 96
    # Of a, the values of steps 0 and 1 wait for step 2 and that of 3 for step 4; of b, that of 1
    # waits for step 2. Else both would keep two values from step 1 on.
    assert made.history_depths() == (2, 1)
    assert made.cache_bytes({"s0": 1}) == (a, 2 * a + b, 0, a, 0)
    assert made.unfreed_bytes({"s0": 1}) == (a + b, *[2 * (a + b)] * 4)
    assert planned((C, C), (C, C)).unfreed_bytes({"s0": 3}) == (0, 0)


@given(tables())
def test_liveness_never_keeps_more(rows: tuple[Row, ...]) -> None:
    made = planned(*rows)
    unfreed = made.unfreed_bytes({"s0": 2})
    pairs = zip(made.cache_bytes({"s0": 2}), unfreed, strict=True)
    assert all(kept <= without for kept, without in pairs)
    assert list(unfreed) == sorted(unfreed)


@given(tables())
def test_variants_cover_the_steps_and_differ(rows: tuple[Row, ...]) -> None:
    made = planned(*rows)
    assert sorted(s for v in made.variants for s in v.steps) == list(range(len(rows)))
    shapes = [tuple(structure(a) for a in v.row) for v in made.variants]
    assert len(set(shapes)) == len(shapes)
    for step, row in enumerate(rows):
        variant = made.variants[made.variant_of[step]]
        assert step in variant.steps
        assert tuple(structure(a) for a in row) == tuple(structure(a) for a in variant.row)
        for i, action in enumerate(row):
            assert made.is_kept(i, step) <= variant.writes[i]
            if isinstance(action, Forecast):
                [numbers] = [c.values[step] for c in variant.constants if SITES[i].name in c.sites]
                assert numbers == action.coefficients
