"""Odd and large files: what they are told, and how long that takes."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from cachegraph.errors import ScheduleError
from cachegraph.schedule.schedule import load_schedule


def refusal(path: Path) -> str:
    with pytest.raises(ScheduleError) as caught:
        load_schedule(path)
    return str(caught.value)


def test_odd_characters(tmp_path: Path) -> None:
    def message(text: str) -> str:
        path = tmp_path / "s.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return refusal(path).removeprefix(f"{path}:")

    good = "cachegraph: 1\nsteps: 4\npolicy: {method: full}\n"
    assert message(good.replace("steps: ", "steps:\xa0")) == (
        "3: not YAML at column 1: could not find expected ':'; "
        "line 2 holds U+00A0 (NO-BREAK SPACE): type a plain one"
    )
    assert "U+FF1A (FULLWIDTH COLON)" in message(good.replace("steps:", "steps\uff1a"))
    assert message(good + "\0") == (
        "4: not YAML at column 1: special characters are not allowed; found U+0000"
    )
    assert message(good + 'x: "\\ud83d"\n').startswith("4: ")
    assert message(good + "x: \ud83d\n") == (
        "4: the file is not UTF-8 text; found byte 0xed; save it as UTF-8"
    )
    assert message("a: &a {method: full}\npolicy:\n  <<: *a\n") == (
        "3: merge keys ('<<') are no part of YAML 1.2; expected each key written out; "
        "one value may stand for another by an alias (*name)"
    )


def test_a_pointer_in_place_of_a_schedule(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n")
    assert refusal(path).endswith(
        "s.yaml: the file holds no YAML; found a git-lfs pointer, which stands for the file; "
        "fetch the file itself: git lfs pull"
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"  - [1{', 0' * 99}]\n" * 3000, ""),
        ("  - [reuse, compute]\n" * 50_000, "... and at least 490 more"),
        ("".join(f"{i}x: 1\n" for i in range(100_000)), "... and at least 490 more"),
        ("  - [reuse, compute]\n" * 50_000 + "]", "not YAML at column 1"),
        ("  - {a: *b}\n" * 90_000, "found undefined alias 'b'"),
        ("  - " + "[" * 1_000_000, "nested too deeply"),
    ],
)
def test_a_megabyte_is_read_in_a_moment(lines: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    rows = "policy:\n  method: table\n  rows:\n  - compute\n"
    path.write_text(f"cachegraph: 1\nsteps: 3001\n{rows}{lines}")
    gc.freeze()  # what other tests left in this process is not walked on the reader's account
    try:
        spent = []
        while len(spent) < 3 and min(spent, default=2) >= 2:  # a busy machine inflates CPU time too
            began = time.process_time()
            if message:
                assert message in refusal(path)
            else:
                assert len(load_schedule(path).policy.rows) == 3001
            spent.append(time.process_time() - began)
    finally:
        gc.unfreeze()
    assert min(spent) < 2
