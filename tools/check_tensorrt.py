"""Compare a backend with recordings of published implementations, call by call, on tiny models.

python tools/check_tensorrt.py --recordings FOLDER [--backend onnx --device cpu] [--only CASE]

The folder holds the recordings and the weights of their models, as NAME.safetensors; the folders
routers and smoothcache lie beside it. Made for a machine with a GPU and TensorRT; runs with any
backend. Prints a table, and fails where a relative error exceeds the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import cachegraph as cg

LIMIT = 1e-4  # relative L2 error of a call, in float32
DUCA = {"method": "duca", "interval": 3, "fresh_ratio": 0.07, "score": "kv-norm"}
GOC = {"method": "goc", "weight": 1.2, "steps": [3, 5, 7, 9]}


@dataclass(frozen=True)
class Case:
    """A recording, the model that it is of, and its schedule."""

    model: str
    schedule: Any


def cases(folder: Path) -> dict[str, Case]:
    """What is checked, by the name of the recording."""
    beside = folder.parent
    table = {"method": "table", "reuse_steps": [1, 3, 5, 7, 9]}
    taylor = {"method": "taylorseer", "interval": 4, "order": 4, "warmup": 2}
    smooth = {"file": str(beside / "smoothcache/50-N-3-threshold-0.18.json")}
    router = {"file": str(beside / "routers/DDIM20_router.pt"), "threshold": 0.1}
    return {
        "plain_ddim20": Case("DiT", _schedule(20, {"method": "full"})),
        "fora3_ddpm50": Case("DiT", "fora-n3"),
        "toca_ddim50": Case("DiT", "toca-n3"),
        "duca_ddim50": Case("DiT", _schedule(50, DUCA)),
        "goc_fora_ddim20": Case("DiT", _schedule(20, table) | {"correction": GOC}),
        "l2c_router_ddim20": Case("DiT", _schedule(20, {"method": "router"} | router)),
        "taylorseer_dit_ddim50_n4_o4": Case("DiT", _schedule(50, taylor)),
        "smoothcache_dit_ddim50": Case("DiT", _schedule(50, {"method": "smoothcache"} | smooth)),
        "pixart_toca_n3_r30": Case("PixArt", "toca-n3-pixart"),
    }


def _schedule(steps: int, policy: dict[str, Any]) -> dict[str, Any]:
    return {"cachegraph": 1, "steps": steps, "policy": policy}


@torch.no_grad()
def check(folder: Path, name: str, case: Case, backend: str, device: str) -> tuple[Any, ...]:
    """Graphs, seconds of compiling, milliseconds a call and the largest relative error."""
    recording = {key: t.to(device) for key, t in load_file(folder / f"{name}.safetensors").items()}
    weights = folder / f"{case.model.lower()}_tiny.safetensors"
    model = cg.load_model(weights, arch=f"{case.model}(num_heads=4)", device=device)
    x, t, y, wanted = (recording[key] for key in ("x", "t", "y", "out"))
    started = time.perf_counter()
    artifact = cg.compile(model, case.schedule, (x[0], t[0], y), backend=backend)
    run = artifact.runner()
    compiled = time.perf_counter()
    found = [run(x[step], t[step], y) for step in range(len(wanted))]
    worst = max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))
    called = (time.perf_counter() - compiled) / len(wanted)
    return len(artifact.graphs), compiled - started, 1000 * called, worst


def main() -> int:
    """The number of cases that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", action="append")
    options = parser.parse_args()
    failed = 0
    print("| recording | graphs | compiling, s | a call, ms | largest relative error |  |")
    print("|---|---|---|---|---|---|")
    for name, case in cases(options.recordings.resolve()).items():
        if options.only and name not in options.only:
            continue
        try:
            graphs, compiling, call, error = check(
                options.recordings, name, case, options.backend, options.device
            )
        except cg.CachegraphError as refused:
            print(f"| {name} | | | | | {refused} |", flush=True)
            failed += 1
            continue
        said = "ok" if error <= LIMIT else f"above {LIMIT:g}"
        failed += error > LIMIT
        print(
            f"| {name} | {graphs} | {compiling:.0f} | {call:.1f} | {error:.1e} | {said} |",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
