"""The schedules that come with cachegraph, how they are found, and their README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cachegraph.config.yaml_lines import read_yaml
from cachegraph.errors import ScheduleError
from cachegraph.methods.fora import Fora
from cachegraph.schedule.schedule import load_schedule, presets

BASE = {"cachegraph": 1, "policy": {"method": "full"}}
README = presets()["full-50"].parent / "README.md"
COMPUTED = {
    "fora-n2": 26,
    "fora-n3": 18,
    "fora-n5": 11,
    "fora-n2-30": 16,
    "fora-n2-70": 36,
    "fora-n3-250": 84,
    "fora-n5-250": 51,
    "fora-n7-250": 37,
    "fora-n3-flux": 17,
    "fora-n3-pixart": 7,
}


def test_presets_load_and_say_where_they_are_from() -> None:
    assert {"fora-n2", "fora-n3", "fora-n5", "full-50"} <= set(presets())
    assert {"fora-n3-250", "fora-n5-250", "fora-n7-250"} <= set(presets())
    for name, path in presets().items():
        schedule = load_schedule(name)
        assert schedule == load_schedule(path) == load_schedule(str(path))
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), f"{path} does not say what it is"


def test_presets_say_where_their_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reading = re.compile(
        r"\bin \S+ of [\w-]+/[\w-]+|\bwith \S+ of [\w-]+/[\w-]+ and name it router"
    )
    checked = 0
    for schedule in map(load_schedule, presets()):
        if getattr(schedule.policy, "file", None) is not None:
            with pytest.raises(ScheduleError) as caught:
                schedule.policy.files()
            assert len(reading.findall(caught.value.remedy)) == 1, caught.value
            assert ". " not in caught.value.remedy  # one sentence, not the whole comment
            checked += 1
    assert checked > 10


@pytest.mark.parametrize(("name", "computed"), COMPUTED.items())
def test_presets_compute_as_many_steps_as_their_comment_says(name: str, computed: int) -> None:
    schedule = load_schedule(name)
    assert isinstance(schedule.policy, Fora)
    interval, last = schedule.policy.interval, schedule.steps - 1
    counts = range(last, -1, -1) if schedule.policy.count == "down" else range(schedule.steps)
    assert sum(step == 0 or at % interval == 0 for step, at in enumerate(counts)) == computed
    assert f"computes {computed} of them" in presets()[name].read_text(encoding="utf-8")


def test_every_fora_preset_is_counted_above() -> None:
    assert set(COMPUTED) == {name for name in presets() if name.startswith("fora-")}


def test_a_file_may_have_the_name_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fora-n2").write_text("cachegraph: 1\nsteps: 7\npolicy: {method: full}\n")
    (tmp_path / "fora-n3").mkdir()  # a folder is no schedule, so it hides no preset
    assert load_schedule("fora-n2").steps == 7
    assert load_schedule("fora-n3").steps == 50
    assert load_schedule(Path("fora-n3")).steps == 50


def test_examples_of_the_readme(tmp_path: Path) -> None:
    readme = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    for block in blocks:
        lines = block.splitlines(keepends=True)
        alternatives = [line for line in lines if line.startswith("policy: {")] or [block]
        for text in alternatives:
            path = tmp_path / "example.yaml"
            path.write_text(text, encoding="utf-8")
            keys, _ = read_yaml(path)
            assert isinstance(keys, dict)
            steps = len(keys.get("timesteps", range(50)))
            load_schedule({**BASE, "steps": steps, **keys})


def test_readme_lists_the_presets() -> None:
    readme = README.read_text(encoding="utf-8")
    assert {name for name in presets() if f"`{name}`" not in readme} == set()
