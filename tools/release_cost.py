"""What ``release=True`` saves on this machine (Linux), and that it costs no time and no bit.

    python -m tools.release_cost [--arch DiT-XL/2] [--schedule fora-n3] [--steps 24] [--keep FILE]

Random weights are compiled ahead of time and loaded twice in one process, plainly and with
``release=True``. Both take every step in turn; the bytes in memory of each one's own mapping of the
weights are the system's count after the last step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import cachegraph as cg
from cachegraph.zoo import build_model
from tests.runtime.test_release import resident

SPAN = 1000  # timesteps of training


def main() -> None:
    """Compile, run both in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="DiT-XL/2")
    parser.add_argument("--schedule", default="fora-n3")
    parser.add_argument("--steps", type=int, default=24, help="of the trajectory to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="an artifact to make, or made before")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, label = torch.randn(2, 4, 32, 32), torch.tensor([1, 1000])
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder, "a.cgraph")
        if not path.exists():
            model = build_model(options.arch).eval()
            example = (x, torch.zeros(2, dtype=torch.long), label)
            cg.compile(model, options.schedule, example, backend="aoti", out=path)
        compare(path, x, label, options.steps)


def compare(path: Path, x: torch.Tensor, label: torch.Tensor, count: int) -> None:
    """Run every step plainly and released, and print how they differ."""
    program = cg.load(path).program
    times = [
        float(SPAN * (len(program.steps) - 1 - i) // len(program.steps))
        for i in range(len(program.steps))
    ]
    runs = {
        name: cg.load(path, timesteps=times, release=name == "released")
        for name in ("plain", "released")
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    equal = True
    for step in range(count):
        made = []
        for name, run in runs.items():
            began = time.perf_counter()
            made.append(run(x, torch.full((2,), int(times[step])), label))
            taken[name].append(time.perf_counter() - began)
        equal &= torch.equal(*made)
    print(f"{count} steps, bit for bit equal: {equal}")
    held = {name: resident(tuple(run.parameters())[:1]) for name, run in runs.items()}
    for name, size in held.items():
        print(f"{name}: {size / 2**30:.2f} GiB of weights in memory")
    print(f"released: {1 - held['released'] / held['plain']:.1%} less")
    variants = [step.variant for step in program.steps[:count]]
    for variant in sorted(set(variants)):
        steps = [s for s in range(1, count) if variants[s] == variant]
        if steps:
            ratio = statistics.median(taken["released"][s] / taken["plain"][s] for s in steps)
            plain = statistics.median(taken["plain"][s] for s in steps)
            print(f"variant{variant}, {len(steps)} steps of {plain:.4f} s: {ratio:.3f} of the time")


if __name__ == "__main__":
    main()
