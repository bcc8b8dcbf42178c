"""Compiles one graph in a process of its own: ``python -m ... JOB.json OUT.pt2 PARENT``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachegraph.backends.export import export_graph
from cachegraph.graph.serialise import graph_from_json, weights_module
from cachegraph.spec import TensorSpec


def _tensor(numbers: Any, spec: TensorSpec) -> Tensor:
    sizes = spec.sizes({})  # lists do not tell them where there are no numbers
    if spec.dtype.is_complex:
        pairs = torch.tensor(numbers, dtype=spec.dtype.to_real())
        return torch.view_as_complex(pairs.reshape(*sizes, 2))
    return torch.tensor(numbers, dtype=spec.dtype).reshape(sizes)


def _end_with(parent: int) -> None:
    """End this process, and the compiler that it started, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Compile the job to the file."""
    source, target = map(Path, sys.argv[1:3])
    parent = sys.argv[3]  # said, for it may be gone by now
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    job = json.loads(source.read_text())
    device = torch.device(job["built_for"]["device"])
    graph = graph_from_json(job["nodes"], device)
    weights: dict[str, Tensor] = {}
    for name, text in job["weights"].items():
        spec = TensorSpec.parse(text)
        if name in job["values"]:  # small: the compiler may write its numbers into the code
            weights[name] = _tensor(job["values"][name], spec).to(device)
        else:  # never written to, so on the CPU it takes no memory; inductor would copy a buffer
            empty = torch.empty(spec.sizes({}), dtype=spec.dtype, device=device)
            weights[name] = nn.Parameter(empty, requires_grad=False)
    module = fx.GraphModule(weights_module(weights), graph)
    inputs = [TensorSpec.parse(text) for text in job["inputs"]]
    program = export_graph(module, inputs, job["sizes"], device)
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(target), inductor_configs=job["options"]
    )


if __name__ == "__main__":
    main()
