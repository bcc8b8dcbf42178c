"""Let every system call of a save fail once, and kill the save at every one of them.

    python -m tools.fault_loop                  # all; minutes
    python -m tools.fault_loop --only fsync,renameat2

Linux with strace. Whatever happens, the old artifact or the new one lies whole at the destination,
and the next writer leaves nothing else beside it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.load import load_artifact
from cachegraph.errors import CachegraphError
from tests.models import compile_traced
from tests.tiny import tiny, traced

TABLE = ["compute", [0, 1, 1, 0], [1, 0, 1, 1], "reuse"]
SCHEDULE = {"cachegraph": 1, "steps": len(TABLE), "policy": {"method": "table", "rows": TABLE}}
FAULTS = ("error=ENOSPC", "error=EIO", "signal=KILL")
CALLS = "%file,%desc"
HANG, HUNG = 60, 4  # seconds; how such a save ends
_NAMED = re.compile(r"^(?:\d+ +)?(\w+)\(")


def available() -> str:
    """Why this cannot run here; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "strace may not trace here"


def two_artifacts() -> tuple[Artifact, Artifact]:
    """Two that differ in their weights."""
    old = compile_traced(tiny(), traced(), SCHEDULE)
    with torch.no_grad():
        weights = {name: tensor + 1 for name, tensor in old.weights.items()}
    return old, replace(old, weights=weights)


def save_under(artifact: Artifact, place: Path, log: Path, options: Sequence[str]) -> int:
    """Save in a child that strace watches from its first call on; how it ended."""
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        try:
            with suppress(
                OSError
            ):  # this call is none of the save's, and may be the one that fails
                os.read(ready, 1)  # until the watcher is there
            artifact.save(place)
        except CachegraphError:
            os._exit(2)
        except BaseException:  # noqa: BLE001 - a raw error is what is looked for
            os._exit(3)
        os._exit(0)
    os.close(ready)
    command = ["strace", "-f", "-q", "-o", str(log), *options, "-p", str(child)]
    watcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.005)
    os.write(go, b".")
    os.close(go)
    end = time.monotonic() + HANG
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.002)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    watcher.wait()
    return HUNG if time.monotonic() >= end else os.waitstatus_to_exitcode(ended[1])


def calls_of(artifact: Artifact, place: Path, log: Path) -> Counter[str]:
    """How often a save makes each system call."""
    save_under(artifact, place, log, ["-e", f"trace={CALLS}"])
    found = (_NAMED.match(line) for line in log.read_text().splitlines())
    return Counter(match[1] for match in found if match)


class Loop:
    """Saves a new artifact over an old one, again and again.

    Args:
        folder: to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.old, self.new = two_artifacts()
        self.place, self._log = folder / "out" / "tiny.cgraph", folder / "strace.log"
        self.place.parent.mkdir(parents=True)
        self.digests = {}
        for name, artifact in (("old", self.old), ("new", self.new)):
            artifact.save(self.place)
            self.digests[load_artifact(self.place).saved[self.place]] = name
        self.old.save(self.place)

    def count(self) -> Counter[str]:
        found = calls_of(self.new, self.place, self._log)
        self.old.save(self.place)
        return found

    def fault(self, call: str, number: int, fault: str) -> str:
        """One save with one fault: what lies there afterwards, or ``FOUND ...``."""
        inject = f"inject={call}:{fault}:when={number}"
        ended = save_under(self.new, self.place, self._log, ["-e", f"trace={call}", "-e", inject])
        try:
            found = self.digests[load_artifact(self.place).saved[self.place]]
        except (CachegraphError, OSError, KeyError) as error:
            found = f"FOUND {type(error).__name__}: {error}"
        if ended in (3, HUNG):
            found = f"FOUND {'a hang' if ended == HUNG else 'a raw error'}, {found}"
        self.old.save(self.place)
        beside = [path.name for path in self.place.parent.iterdir() if path != self.place]
        return f"FOUND {beside} left" if beside else found

    def faults(self, only: Sequence[str]) -> Iterator[tuple[str, int, str]]:
        for call, count in sorted(self.count().items()):
            if not only or call in only:
                for number in range(1, count + 1):
                    for fault in FAULTS:
                        yield call, number, fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="system calls, with commas between them")
    only = [name for name in parser.parse_args().only.split(",") if name]
    if reason := available():
        print(reason)
        return 2
    torch.set_num_threads(1)
    logging.getLogger("cachegraph.folders").setLevel(logging.ERROR)  # what is swept, every time
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="cachegraph-faults-") as folder:
        loop = Loop(Path(folder))
        for call, number, fault in loop.faults(only):
            result = loop.fault(call, number, fault)
            counts["FOUND" if "FOUND" in result else f"{fault}: {result}"] += 1
            if "FOUND" in result:
                print(f"{call} {number} {fault}: {result}", flush=True)
    print(f"{counts.total()} faults: {dict(sorted(counts.items()))}")
    return 1 if counts["FOUND"] else 0


if __name__ == "__main__":
    sys.exit(main())
