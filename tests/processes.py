"""Command lines in processes of their own: several as one, and killed ones."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(*words: str | Path, processes: int = 1) -> str:
    """What a command that works writes to stdout, under torchrun where there are several."""
    line = [sys.executable, "-m"]
    if processes > 1:  # torchrun would take --num for an option of its own but for the two dashes
        line += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        line += ["-m", "--"]
    line += ["cachegraph", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed_when(reached: Callable[[], bool], *words: str | Path) -> None:
    """Runs a command until something has happened, and gives it no time to clean up."""
    line = [sys.executable, "-m", "cachegraph", *map(str, words)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        try:
            while process.poll() is None and not reached():
                time.sleep(0.005)
            assert process.poll() is None, f"it ended by itself: {process.returncode}"
        finally:
            process.kill()
