"""A save in which a system call fails or that is killed: the old artifact or the new one stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import fault_loop


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> fault_loop.Loop:
    if reason := fault_loop.available():
        pytest.skip(reason)
    return fault_loop.Loop(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("call", "number", "fault", "left"),
    [
        ("mkdir", 2, "error=ENOSPC", "old"),
        ("newfstatat", 2, "error=EIO", "old"),
        ("write", 3, "error=ENOSPC", "old"),
        ("write", 9, "signal=KILL", "old"),
        ("fsync", 2, "error=EIO", "old"),
        ("renameat2", 1, "error=EIO", "new"),  # the exchange is done without it
        ("renameat2", 1, "signal=KILL", "old"),
        ("rmdir", 1, "signal=KILL", "new"),
    ],
)
def test_a_fault_leaves_a_whole_artifact(
    loop: fault_loop.Loop, call: str, number: int, fault: str, left: str
) -> None:
    assert loop.fault(call, number, fault) == left


@pytest.mark.slow
def test_every_fault(loop: fault_loop.Loop) -> None:
    found = [loop.fault(*one) for one in loop.faults([])]
    assert set(found) == {"old", "new"}
    assert len(found) > 500


WRITER = """
import sys, time
from cachegraph.artifact.load import load_artifact
both, end = [load_artifact(path) for path in sys.argv[1:3]], time.monotonic() + 60
while time.monotonic() < end:
    for one in both:
        one.save(sys.argv[3])
"""


@pytest.mark.slow
def test_a_reader_beside_a_writer_for_a_minute(tmp_path: Path) -> None:
    """No mixture: what was read is one of the two, to the last weight."""
    from cachegraph.artifact.load import load_artifact

    old, new = fault_loop.two_artifacts()
    paths = [old.save(tmp_path / "a"), new.save(tmp_path / "b"), old.save(tmp_path / "place")]
    known = {
        load_artifact(path).saved[path]: {k: w.tolist() for k, w in one.weights.items()}
        for path, one in zip(paths, (old, new), strict=False)
    }
    writer = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, paths)])
    reads, began = 0, time.monotonic()
    try:
        while writer.poll() is None:
            found = load_artifact(paths[2])
            weights = {name: weight.tolist() for name, weight in found.weights.items()}
            assert weights == known[found.saved[paths[2]]]
            reads += 1
    finally:
        writer.kill()
        writer.wait()
    assert writer.returncode == 0
    assert reads > 100
    print(f"{reads} reads in {time.monotonic() - began:.0f} s")
