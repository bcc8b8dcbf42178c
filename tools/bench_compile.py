"""What compiling ahead of time costs on this machine (Linux), beside the limits it must keep.

Random weights of an architecture are compiled in an empty cache, again, loaded and run, each
in a process of its own; then a narrow model of 28 blocks and one of 56. Memory is the sum over a
process and all that it starts, pages that several of them share counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = "DiT(hidden_size=256, num_heads=4, depth={})"  # the code to compile has no width
MODEL = """
import sys, torch
from cachegraph.zoo import build_model
torch.save(build_model(sys.argv[1]).state_dict(), sys.argv[2])
"""
LOAD = """
import json, sys, time
import torch
from cachegraph import load
from cachegraph.artifact.load import load_artifact
from cachegraph.backends.named import named_graphs
def resident():  # bytes of the weights' file, mapped however often, and of no file
    found, name = {True: 0, False: 0}, ""
    for line in open("/proc/self/smaps"):
        words = line.split()
        if not words[0].endswith(":"):
            name = words[-1]
        elif words[0] == "Pss:" and name.endswith("weights.safetensors"):
            found[True] += int(words[1]) * 1024
        elif words[0] == "Anonymous:":
            found[False] += int(words[1]) * 1024
    return found[True] + found[False]
before, wall, cpu = resident(), time.perf_counter(), time.process_time()
run = load(sys.argv[1])
out = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
artifact = load_artifact(sys.argv[1])
graphs = list(named_graphs(artifact.program, artifact.graphs).values())
inputs = [[torch.zeros(s.sizes(g.example_sizes()), dtype=s.dtype) for s in g.inputs.values()]
          for g in graphs]
def call(functions):
    for function, tensors in zip(functions, inputs):
        with torch.no_grad():
            function(*tensors)
    return resident() - before
call(run.functions[:1])  # what threads and kernels need besides weights is there now
out["memory"] = [call(run.functions[:1]), call(run.functions), call(artifact.functions())]
out["variants"] = len(graphs)
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Cost:
    """Of a process and all that it started: seconds, and bytes at the peak."""

    wall: float
    cpu: float
    peak: int
    output: str

    def __str__(self) -> str:
        return f"{self.wall:.1f} s, {self.cpu:.1f} s of CPU"


def family(root: int) -> Iterator[int]:
    """The process and its descendants, as far as they live."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def resident(pid: int) -> int:
    """Bytes in memory; a page of n processes counts 1/n."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def cost_of(arguments: list[str], cache: Path) -> Cost:
    """Run ``python ...`` to its end and measure it; its failure is ours."""
    env = os.environ | {"CACHEGRAPH_CACHE": str(cache), "PYTHONWARNINGS": "ignore"}
    before, started, peak = used(), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=out)
        while process.poll() is None:
            total = 0
            try:
                for pid in family(process.pid):
                    total += resident(pid)
            except OSError:  # one of them ended just now
                continue
            peak = max(peak, total)
            time.sleep(0.5)
        wall = time.perf_counter() - started
        out.seek(0)
        if process.returncode:
            sys.exit(process.returncode)
        return Cost(wall, used() - before, peak, out.read())


def used() -> float:
    """Seconds of CPU that children took, as far as they ended, and theirs."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def compile_cost(arch: str, schedule: str, folder: Path) -> tuple[Cost, list[str]]:
    """The cost of compiling random weights in an empty cache, and the command again."""
    folder.mkdir()
    cost_of(["-c", MODEL, arch, str(folder / "model.pt")], folder / "cache")
    command = ["-m", "cachegraph", "compile", str(folder / "model.pt"), "-s", schedule]
    command += ["--arch", arch, "--backend", "aoti", "-o", str(folder / "out.cgraph")]
    return cost_of(command, folder / "cache"), command


def rows(arch: str, schedule: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    """What was measured, and the limit."""
    first, command = compile_cost(arch, schedule, folder / "whole")
    artifact = folder / "whole" / "out.cgraph"
    weights = (artifact / "weights.safetensors").stat().st_size
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    again = cost_of(command, folder / "whole" / "cache")
    loaded = json.loads(cost_of(["-c", LOAD, str(artifact)], folder / "cache").output)
    one, every, two = (f"{number / 1e9:.2f} GB" for number in loaded["memory"])
    yield "compile", str(first), "480 s on 2 cores"
    yield "  memory at the peak", f"{first.peak / 1e9:.2f} GB", f"{2 * weights / 1e9:.2f} GB"
    state = "up to date" if "up to date" in again.output else "compiled anew"
    yield "compile again, unchanged", f"{again}; {state}", "10 s"
    yield "load", f"{loaded['wall']:.1f} s, {loaded['cpu']:.1f} s of CPU", "3 s"
    yield "artifact besides weights", f"{(size - weights) / 1e6:.1f} MB", "30 MB"
    yield "memory with 1 variant", one, ""
    yield f"  with all {loaded['variants']}", every, "as with 1"
    yield "  with two runners of all", two, "as with 1"
    few, _ = compile_cost(BLOCKS.format(28), schedule, folder / "28")
    many, _ = compile_cost(BLOCKS.format(56), schedule, folder / "56")
    yield "28 blocks, narrow", str(few), ""
    yield "56 blocks, narrow", str(many), ""
    yield "  ratio", f"{many.wall / few.wall:.2f}x, {many.cpu / few.cpu:.2f}x of CPU", "2.3x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="DiT-XL/2")
    parser.add_argument("--schedule", default="fora-n3")
    parser.add_argument("--folder", type=Path, help="for temporary files, twice the weights")
    asked = parser.parse_args()
    table = Table("", "measured", "limit", title=f"{asked.arch}, {asked.schedule}, aoti")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for row in rows(asked.arch, asked.schedule, Path(folder)):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
