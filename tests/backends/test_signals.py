"""A compilation that is ended leaves no worker, no folder and no half of an artifact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCHEDULE = "cachegraph: 1\nsteps: 4\npolicy: {method: fora, interval: 2}\n"


def wait_for(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


def workers(cache: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(cache).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_ended_compilation_leaves_nothing_running(number: int, tmp_path: Path) -> None:
    for name in ("cache", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "fora.yaml").write_text(SCHEDULE)
    env = os.environ | {
        "CACHEGRAPH_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    # A shell's job in the background ignores Ctrl-C, and so does what it starts.
    command = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cachegraph.cli import main; sys.argv[0] = 'cachegraph'; main()"
    )
    options = ["compile", "digits", "-s", "fora.yaml", "-o", "out.cgraph", "--backend", "aoti"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: bool(workers(tmp_path / "cache")), 120), "no worker was started"
        process.send_signal(number)
        assert process.wait(timeout=30) == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number, -9)
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not workers(tmp_path / "cache"), 60), "a worker goes on"
    assert not (tmp_path / "out.cgraph").exists()
    if number != signal.SIGKILL:  # nobody can clean up after that
        assert not list((tmp_path / "cache" / "aoti").glob("compiling-*"))
        assert not list((tmp_path / "tmp").glob("cachegraph-*"))
