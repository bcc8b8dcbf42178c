"""Compiles one graph in a process of its own: ``python -m ... JOB.json OUT.pt2``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from cachegraph.serialise import graph_from_json, weights_module
from cachegraph.spec import TensorSpec

from .export import export_graph

_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    # The number of threads is that of the machine which runs it.
    "cpp.dynamic_threads": True,
}


def main() -> None:
    """Compile the job to the file."""
    source, target = map(Path, sys.argv[1:])
    job = json.loads(source.read_text())
    device = torch.device(job["built_for"]["device"])
    graph = graph_from_json(job["nodes"], device)
    weights: dict[str, Tensor] = {}
    for name, text in job["weights"].items():
        spec = TensorSpec.parse(text)
        if name in job["values"]:  # small: the compiler may write its numbers into the code
            weights[name] = torch.tensor(job["values"][name], dtype=spec.dtype, device=device)
        else:  # never written to, so on the CPU it takes no memory; inductor would copy a buffer
            empty = torch.empty(spec.sizes({}), dtype=spec.dtype, device=device)
            weights[name] = nn.Parameter(empty, requires_grad=False)
    module = fx.GraphModule(weights_module(weights), graph)
    inputs = [TensorSpec.parse(text) for text in job["inputs"]]
    program = export_graph(module, inputs, job["sizes"], device)
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(target), inductor_configs=_OPTIONS
    )


if __name__ == "__main__":
    main()
