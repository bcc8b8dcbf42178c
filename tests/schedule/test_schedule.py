"""Schedules: what is refused and how it is said, and what a good one holds.

Each file of ``bad_schedules`` begins with the message that it must give, a comment line a line of
the message, with the file's name as its path and METHODS for the names of all methods. So a new
refusal is one new file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from cachegraph.config.yaml_lines import write_yaml
from cachegraph.errors import InputError, ScheduleError
from cachegraph.methods import METHODS
from cachegraph.methods.fora import Fora
from cachegraph.methods.full import Full
from cachegraph.methods.table import Table
from cachegraph.schedule.schedule import Schedule, SiteFilter, load_schedule, presets

BAD = sorted((Path(__file__).parents[1] / "bad_schedules").iterdir())
MARK = "# expect: "


def load_text(folder: Path, text: str) -> Schedule:
    path = folder / "schedule.yaml"
    path.write_text(text, encoding="utf-8")
    return load_schedule(path)


def fails(source: Any) -> str:
    with pytest.raises(ScheduleError) as caught:
        load_schedule(source)
    return str(caught.value)


def make(**keys: Any) -> dict[str, Any]:
    return {"cachegraph": 1, "steps": 4, "policy": {"method": "full"}, **keys}


# What is refused.


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_schedule_is_refused_as_its_first_lines_say(path: Path) -> None:
    assert path.suffix == ".yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    listed = ", ".join(sorted(method.name() for method in METHODS))
    marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    expected = [line.replace("METHODS", listed) for line in marked]
    assert expected, f"{path} does not say what to expect"
    assert fails(path).replace(str(path), path.name).splitlines() == expected


def test_bad_schedules_are_found() -> None:
    assert len(BAD) >= 22


def test_errors_are_input_errors() -> None:
    with pytest.raises(InputError) as caught:
        load_schedule(make(steps=0))
    assert caught.value.exit_code == 2
    assert caught.value.place == "schedule: steps"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"policy": {"method": "fora", "interval": 0}},
            "schedule: policy.interval: 'interval' is too small; expected a whole number, at "
            "least 1: one step in so many is computed; found 0",
        ),
        (
            {"policy": {"method": "table", "rows": ["compute", [0, 1], [0, 2], "reuse"]}},
            "schedule: policy.rows[2][1]: 'rows[2][1]' is neither 0 nor 1; "
            "expected 0 (reuse) or 1 (compute); found 2",
        ),
        (
            {"policy": {"method": "fora"}},
            "schedule: policy: missing key 'interval' in fora policy; expected a whole number, "
            "at least 1: one step in so many is computed",
        ),
        (
            {"policy": {"method": "full", 3: 3}},
            "schedule: policy[3]: a key of full policy is not text; expected only method; found 3",
        ),
        (
            {"policy": {"method": "table", "reuse_steps": {1, 3}}},
            "schedule: policy.reuse_steps: 'reuse_steps' has the wrong type; "
            "expected a list of steps; found a value of type set",
        ),
        (
            {"steps": 1, "policy": {"method": "table", "reuse_steps": [1]}},
            "schedule: policy.reuse_steps[0]: 'reuse_steps[0]' is out of range; "
            "expected no step, as there is only one; found 1",
        ),
        (
            {"cachegraph": 2},
            "schedule: cachegraph: written for a newer cachegraph; "
            "expected format 1; found format 2; update cachegraph",
        ),
    ],
)
def test_dict_is_refused_with_the_key(keys: dict[str, Any], message: str) -> None:
    assert fails(make(**keys)) == message


def test_what_is_no_schedule_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.yaml").write_bytes(b"#" * (10 * 1024 * 1024 + 1))
    (tmp_path / "latin.yaml").write_bytes("steps: 4\n# é".encode("latin-1"))
    (tmp_path / "bell.yaml").write_text("steps: 4\nnote: \a\n")
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    (tmp_path / "digits.yaml").write_text("steps: " + "9" * 5000)
    names = ", ".join(presets())
    anything = "expected a path, a preset, a mapping or a Schedule"
    assert fails("fora-n33") == (
        "unknown preset 'fora-n33'; expected the path of a file or a preset such as fora-n3, "
        "fora-n2, fora-n5, fora-n2-30; did you mean 'fora-n3'?"
    )
    for name in ("", "zzz"):
        message = f"unknown preset {name!r}; expected the path of a file or one of {names}"
        assert fails(name) == message
    assert fails("fora-n3.yaml") == "fora-n3.yaml: no such file; did you mean 'fora-n3'?"
    assert fails("deap.yaml") == "deap.yaml: no such file; did you mean 'deep.yaml'?"
    assert fails("x/fora-n3") == "x/fora-n3: no such file; did you mean 'fora-n3'?"
    assert fails("x\0/y.yaml").endswith("no such file")
    assert fails("x" * 5000 + ".yaml").endswith("no such file")
    assert fails("folder") == "folder: this is a folder; expected a schedule file"
    assert fails("folder/") == "folder: this is a folder; expected a schedule file"
    assert fails("large.yaml") == (
        "large.yaml: the file is too large for a schedule; expected at most 10 MiB"
    )
    assert fails("latin.yaml") == (
        "latin.yaml:2: the file is not UTF-8 text; found byte 0xe9; save it as UTF-8"
    )
    assert fails("bell.yaml") == (
        "bell.yaml:2: not YAML at column 7: special characters are not allowed; found U+0007"
    )
    assert fails("deep.yaml") == ("deep.yaml: nested too deeply, or an alias that contains itself")
    assert fails("digits.yaml") == f"digits.yaml:1: cannot be read as int; found {'9' * 60}"
    assert fails("cachegraph: 1\nsteps: 4\n") == (
        "the text of a schedule instead of its path; expected a path, a preset or a mapping"
    )
    assert fails(3) == f"not a schedule; {anything}; found 3"
    assert fails(["compute"]) == f"not a schedule; {anything}; found a list of 1"


def test_aliases_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    text = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True):
        text += f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    with pytest.raises(ScheduleError, match="more than 1000000 values"):
        load_text(tmp_path, text)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "closed.yaml"
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # permission bits would not stop root
    assert fails(path) == f"{path}: the file cannot be read: Permission denied"


def test_the_class_itself_refuses_too() -> None:
    with pytest.raises(ValidationError, match="step 0 cannot reuse"):
        Schedule(cachegraph=1, steps=4, policy=Table(method="table", reuse_steps=(0,)))
    with pytest.raises(ValidationError, match="frozen"):
        load_schedule("fora-n3").steps = 3


# What is accepted.


def test_defaults(tmp_path: Path) -> None:
    schedule = load_text(tmp_path, "cachegraph: 1\nsteps: 4\npolicy: {method: fora, interval: 2}\n")
    assert schedule.policy == Fora(method="fora", interval=2, count="down")
    assert schedule.sites == SiteFilter(
        kinds=("attn", "cross_attn", "mlp"), include=("*",), exclude=()
    )
    assert schedule.timesteps is None
    assert schedule.order == "descending"
    assert schedule.max_variants is None


def test_all_keys() -> None:
    schedule = load_schedule(
        make(
            policy={"method": "table", "rows": ["compute", [0, 1], (1, 0), "reuse"]},
            sites={"kinds": ["mlp"], "include": ["blocks.*"], "exclude": ["blocks.0.*"]},
            timesteps=[0, 0.25, 0.5, 0.75],
            order="ascending",
            max_variants=3,
        )
    )
    assert schedule.policy == Table(method="table", rows=("compute", (0, 1), (1, 0), "reuse"))
    assert schedule.sites == SiteFilter(
        kinds=("mlp",), include=("blocks.*",), exclude=("blocks.0.*",)
    )
    assert schedule.timesteps == (0.0, 0.25, 0.5, 0.75)
    assert schedule.order == "ascending"
    assert schedule.max_variants == 3


def test_reuse_steps_may_be_any_steps_but_the_first() -> None:
    policy = load_schedule(make(policy={"method": "table", "reuse_steps": [1, 3]})).policy
    assert policy == Table(method="table", reuse_steps=(1, 3))
    policy = load_schedule(make(policy={"method": "table", "reuse_steps": []})).policy
    assert policy == Table(method="table", reuse_steps=())


def test_file_dict_and_schedule_are_equal(tmp_path: Path) -> None:
    keys = make(timesteps=[981, 961, 941.5, 1], sites={"kinds": ["attn"]})
    from_dict, from_file = load_schedule(keys), load_text(tmp_path, write_yaml(keys))
    assert from_dict == from_file
    assert hash(from_dict) == hash(from_file)
    assert from_dict.digest() == from_file.digest()
    assert load_schedule(from_dict) is from_dict
    assert from_dict != load_schedule(make())
    assert from_dict.digest() != load_schedule(make()).digest()
    copy = pickle.loads(pickle.dumps(from_file))
    assert copy == from_file
    assert copy.where("steps") == from_file.where("steps")


def test_digest_is_the_same_everywhere() -> None:
    assert load_schedule("fora-n3").digest() == (
        "5635e4b087307763d6ed082d027c4296e06fb7271ff11578a9cb880c1be07d34"
    )


def test_yaml_1_2_words(tmp_path: Path) -> None:
    schedule = load_text(
        tmp_path,
        "\ufeffcachegraph: 1\nsteps: 04\npolicy: {method: full}\n"
        "timesteps: [1e3, 1e-3, -2., -.5E+1]\nsites: {include: [on, no, 12:30, 1_0, 2024-01-01]}\n",
    )
    assert schedule.steps == 4
    assert schedule.timesteps == (1000.0, 0.001, -2.0, -5.0)
    assert schedule.sites.include == ("on", "no", "12:30", "1_0", "2024-01-01")


def test_anchors_and_aliases(tmp_path: Path) -> None:
    schedule = load_text(
        tmp_path,
        "cachegraph: 1\nsteps: 4\npolicy:\n  method: table\n"
        "  rows: [compute, &half [0, 1], *half, reuse]\n",
    )
    assert schedule.policy == Table(method="table", rows=("compute", (0, 1), (0, 1), "reuse"))


# Where things stand.


def test_where_in_a_file(tmp_path: Path) -> None:
    schedule = load_text(
        tmp_path,
        "# a comment\n"  # 1
        "cachegraph: 1\n"
        "steps: 4\n"
        "policy:\n"
        "  method: table\n"
        "  rows:\n"  # 6
        "    - compute\n"
        "    - [0,\n"
        "       1]\n"
        "\n"
        "    - reuse\n"  # 11
        "    - compute\n"
        "timesteps: [3, 2,\n"
        "  1, 0]\n",
    )
    path = tmp_path / "schedule.yaml"
    lines = {
        (): 2,
        ("steps",): 3,
        ("policy",): 4,
        ("policy", "method"): 5,
        ("policy", "rows"): 6,
        ("policy", "rows", 0): 7,
        ("policy", "rows", 1): 8,
        ("policy", "rows", 1, 1): 9,
        ("policy", "rows", 2): 11,
        ("timesteps", 1): 13,
        ("timesteps", 2): 14,
        ("max_variants",): 2,  # not in the file: the mapping that it would be in
        ("policy", "interval"): 4,
        ("sites", "kinds", 0): 2,
    }
    assert {keys: schedule.where(*keys) for keys in lines} == {
        keys: f"{path}:{line}" for keys, line in lines.items()
    }


def test_where_without_a_file() -> None:
    schedule = load_schedule(make())
    assert schedule.where() == "schedule"
    assert schedule.where("steps") == "schedule: steps"
    assert schedule.where("policy", "rows", 3) == "schedule: policy.rows[3]"
    assert schedule.where("policy", "rows", 3, 0) == "schedule: policy.rows[3][0]"
    built = Schedule(cachegraph=1, steps=4, policy=Full(method="full"))
    assert built.where("steps") == "schedule: steps"


# Round trips.

WORDS = st.text(min_size=1, max_size=8) | st.sampled_from(["on", "1e3", "~", "010", "*", "#a"])
GLOBS = st.lists(WORDS, min_size=1, max_size=3)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(1, 6))
    bits = st.lists(st.integers(0, 1), min_size=3, max_size=3)
    rows = st.lists(st.sampled_from(["compute", "reuse"]) | bits, min_size=steps, max_size=steps)
    policies = (
        st.just({"method": "full"})
        | st.builds(
            lambda interval, count: {"method": "fora", "interval": interval, "count": count},
            st.integers(1),
            st.sampled_from(["down", "up"]),
        )
        | rows.map(lambda drawn: {"method": "table", "rows": ["compute", *drawn[1:]]})
        | st.sets(st.integers(1, steps)).map(
            lambda drawn: {"method": "table", "reuse_steps": sorted(drawn - {steps})}
        )
    )
    kinds = st.permutations(["attn", "cross_attn", "mlp"])
    times = st.lists(NUMBERS, min_size=steps, max_size=steps, unique=True)
    optional = {
        "sites": st.fixed_dictionaries(
            {}, optional={"kinds": kinds, "include": GLOBS, "exclude": GLOBS}
        ),
        "timesteps": times.map(lambda drawn: sorted(drawn, reverse=True)),
        "max_variants": st.integers(1),
    }
    keys = draw(st.fixed_dictionaries({}, optional=optional))
    return {"cachegraph": 1, "steps": steps, "policy": draw(policies), **keys}


@given(keys=schedules())
def test_yaml_round_trip(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    schedule = load_schedule(keys)
    again = load_text(tmp_path_factory.getbasetemp(), schedule.to_yaml())
    assert again == schedule
    assert again.digest() == schedule.digest()


# The classes.


def test_kinds_are_those_of_sites() -> None:
    from cachegraph.model.site import SiteKind

    assert SiteFilter().kinds == tuple(kind for kind in SiteKind if kind is not SiteKind.STACK)


@pytest.mark.parametrize("model", [Schedule, SiteFilter, *METHODS])
def test_every_key_says_what_is_expected(model: type[BaseModel]) -> None:
    for name, info in model.model_fields.items():
        assert info.description or name == "method", f"{model.__name__}.{name}"
    assert model.model_config["extra"] == "forbid"
