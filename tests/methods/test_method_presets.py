"""The presets of published settings of learned, corrected and forecasting methods."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachegraph.methods.router import Router
from cachegraph.methods.router_file import read_router
from cachegraph.methods.smoothcache import SmoothCache
from cachegraph.model.site import Site, SiteKind
from cachegraph.plan.action import Compute
from cachegraph.plan.plan import make_plan
from cachegraph.schedule.rows import make_rows
from cachegraph.schedule.schedule import Schedule, load_schedule, presets

SITES = [
    Site(f"blocks.{b}.{kind}", kind, values=(), module=None, anchors=())
    for b in range(28)
    for kind in (SiteKind.ATTN, SiteKind.MLP)
]
# What can be computed without the files of others: steps that are computed as a whole.
COMPUTED = {
    "goc-fora-25": 15,
    "goc-fora-50": 10,
    "taylorseer-n3": 18,
    "taylorseer-n4": 14,
    "taylorseer-n5": 11,
    "taylorseer-n6-flux": 10,
    "taylorseer-n6-o2-flux": 10,
    "taylorseer-n3-o2-flux": 18,
    "taylorseer-n5-hunyuan": 10,
}
FILES = {
    "l2c-20": "DDIM20_router.pt",
    "l2c-50": "DDIM50_router.pt",
    "l2c-50-512": "router.pt",
    "l2c-20-uvit": "dpm20_router.pth",
    "l2c-50-uvit": "dpm50_router.pth",
    "harmonica-10": "router.pt",
    "goc-l2c-20": "DDIM20_router.pt",
    "smoothcache-08": "50-N-3-threshold-0.08.json",
    "smoothcache-18": "50-N-3-threshold-0.18.json",
    "smoothcache-22": "50-N-3-threshold-0.22.json",
    "smoothcache-35-30": "30-N-3-threshold-0.35.json",
    "smoothcache-08-70": "70-N-3-threshold-0.08.json",
    "smoothcache-diffusers": "diffuser_schedule.json",
}


def test_every_preset_of_these_methods_is_listed_here() -> None:
    mine = ("l2c", "harmonica", "goc", "taylorseer", "smoothcache")
    assert {n for n in presets() if n.startswith(mine)} == {*COMPUTED, *FILES}


@pytest.mark.parametrize(("name", "computed"), COMPUTED.items())
def test_presets_compute_as_many_steps_as_they_say(name: str, computed: int) -> None:
    schedule = load_schedule(name)
    plan = make_plan(SITES, make_rows(schedule, SITES))
    assert plan.full_steps() == computed
    text = presets()[name].read_text(encoding="utf-8")
    said = {"goc-fora-25": "a quarter of the steps", "goc-fora-50": "half of the steps"}
    assert said.get(name, f"computes {computed} of them") in text


@pytest.mark.parametrize(("name", "file"), FILES.items())
def test_presets_name_the_published_file(name: str, file: str) -> None:
    policy = load_schedule(name).policy
    assert isinstance(policy, Router | SmoothCache)
    assert policy.file == file
    comment = presets()[name].read_text(encoding="utf-8").partition("cachegraph:")[0]
    folder = "smoothcache_schedules of Roblox/SmoothCache" if "smooth" in name else file
    assert folder in comment.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("name", "runs"), [("l2c-20", 872), ("l2c-50", 2136), ("smoothcache-18", 24 * 56)]
)
def test_presets_with_the_published_files(
    shared: Any, monkeypatch: pytest.MonkeyPatch, name: str, runs: int
) -> None:
    monkeypatch.chdir(shared / ("routers" if name.startswith("l2c") else "smoothcache"))
    rows = make_rows(load_schedule(name), SITES)
    assert sum(isinstance(a, Compute) for row in rows for a in row) == runs


def test_goc_on_the_published_router(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At steps 13, 15 and 19 of the published list the router reuses no block as a whole."""
    monkeypatch.chdir(shared / "routers")
    plain, corrected = (make_rows(load_schedule(n), SITES) for n in ("l2c-20", "goc-l2c-20"))
    pairs = zip(plain, corrected, strict=True)
    assert [s for s, (a, b) in enumerate(pairs) if a != b] == [3, 5, 7, 9, 11]
    mask = read_router(shared / "routers/DDIM20_router.pt", 0.1, "l2c")
    for step in range(1, 20, 2):
        whole = [b for b in range(28) if not (mask.attn[step][b] or mask.mlp[step][b])]
        changed = [i for i in range(56) if plain[step][i] != corrected[step][i]]
        assert changed == [i for b in whole for i in (2 * b, 2 * b + 1) if 3 <= step <= 15]
    assert set(plain[19]) == {Compute()}


# --- round trips of their keys

STEPS = 6
BITS = st.lists(st.integers(0, 1), min_size=STEPS - 1, max_size=STEPS - 1).map(lambda b: (1, *b))
NUMBERS = st.floats(0, 1e6)
POLICIES = st.one_of(
    st.fixed_dictionaries(
        {"method": st.just("router"), "file": st.text(min_size=1, max_size=8)},
        optional={
            "threshold": st.floats(0, 1),
            "semantics": st.sampled_from(["l2c", "harmonica", "uvit"]),
        },
    ),
    st.fixed_dictionaries({"method": st.just("smoothcache"), "file": st.text(min_size=1)}),
    st.fixed_dictionaries(
        {
            "method": st.just("smoothcache"),
            "lists": st.dictionaries(
                st.sampled_from(["attn", "mlp-3", "on", "1"]), BITS, min_size=1
            ),
        }
    ),
)
CURVES = st.tuples(*(st.lists(NUMBERS, min_size=n, max_size=n) for n in (STEPS - 1, STEPS - 2)))
KEYS = st.fixed_dictionaries(
    {"cachegraph": st.just(1), "steps": st.just(STEPS), "policy": POLICIES},
    optional={
        "correction": st.fixed_dictionaries(
            {
                "method": st.just("goc"),
                "weight": st.floats(-1e6, 1e6),
                "steps": st.sets(st.integers(2, STEPS - 1), min_size=1).map(sorted),
            },
            optional={"both_modules": st.booleans()},
        ),
        "calibration": st.fixed_dictionaries(
            {
                "trajectories": st.integers(1),
                "errors": st.dictionaries(st.sampled_from(["attn", "mlp"]), CURVES, min_size=1),
            },
            optional={"bound": NUMBERS, "model": st.text(min_size=1, max_size=8)},
        ),
    },
)


@given(keys=KEYS)
def test_yaml_round_trip(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    schedule = load_schedule(keys)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(schedule.to_yaml(), encoding="utf-8")
    again = load_schedule(path)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.digest() == schedule.digest()
    assert load_schedule(schedule.model_dump(exclude_none=True)) == schedule


def test_every_section_says_what_is_expected() -> None:
    for key in ("correction", "calibration"):
        annotation = Schedule.model_fields[key].annotation
        model = next(m for m in annotation.__args__ if hasattr(m, "model_fields"))
        for name, info in model.model_fields.items():
            assert info.description or name == "method", f"{key}.{name}"
        assert model.model_config["extra"] == "forbid"
