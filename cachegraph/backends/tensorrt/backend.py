"""Build one TensorRT engine a graph from the ONNX files, and run them on a GPU.

An engine holds no weights: they are put into it from the artifact's own when it is opened.
Written after the documentation of TensorRT 10; README.md says where it has been run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from cachegraph.backends import AheadOfTime, Graphs, Progress, Weights
from cachegraph.backends.onnx.backend import Onnx, require
from cachegraph.errors import BackendError
from cachegraph.folders import is_as_recorded, own_cache, record_content
from cachegraph.graph.weights import WEIGHTS_FILE, distinct, save_weights
from cachegraph.runtime.runner import StepFunction

from .bindings import binding_plan

if TYPE_CHECKING:
    import onnx

_RECORD = "engines.json"


@dataclass(frozen=True)
class Machine:
    """What an engine is bound to.

    Attributes:
        tensorrt: version.
        gpu: name and compute capability, ``NVIDIA H200 sm_90``.
    """

    tensorrt: str
    gpu: str


class TensorRT(AheadOfTime):
    """One engine a graph; sizes that vary are profiles of the same engine."""

    name = "tensorrt"

    def check(self, graph: fx.Graph) -> list[str]:
        """Operations that cannot be said in ONNX; :meth:`emit` checks what they became."""
        this_machine()
        return Onnx().check(graph)

    def emit(self, graphs: Graphs, weights: Weights, folder: Path, progress: Progress) -> None:
        """``NAME.onnx``, ``NAME.engine`` and the bindings of each graph."""
        machine = this_machine()
        from cachegraph.backends.onnx.convert import to_onnx

        from .operators import in_single_precision

        models = {}
        for name, graph in graphs.items():
            progress(f"converting {name} to ONNX")
            models[name] = in_single_precision(to_onnx(name, graph, weights))
        refuse_unsupported(models)
        from .engine import build_engine

        plans = {name: binding_plan(graph) for name, graph in graphs.items()}
        content = _content_of(weights)
        known = f"tensorrt-{machine.tensorrt}-{machine.gpu.replace(' ', '-')}"
        with tempfile.TemporaryDirectory(prefix="cachegraph-") as beside:
            save_weights(distinct(weights)[0], Path(beside) / WEIGHTS_FILE)
            for name, model in models.items():
                serialized = model.SerializeToString()
                (folder / f"{name}.onnx").write_bytes(serialized)
                source = Path(beside) / f"{name}.onnx"
                source.write_bytes(serialized)
                key = _digest(serialized, content, json.dumps(list(map(asdict, plans[name]))))
                kept = own_cache(known) / f"{key}.engine"
                if not is_as_recorded(kept):
                    engine = build_engine(source, model, plans[name], kept.parent, progress)
                    _write_whole(kept, engine)
                (folder / f"{name}.engine").write_bytes(kept.read_bytes())
        record = {
            "machine": asdict(machine),
            "bindings": {name: list(map(asdict, plan)) for name, plan in plans.items()},
        }
        (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def open(
        self, graphs: Graphs, weights: Weights, folder: Path, device: torch.device
    ) -> list[StepFunction]:
        """An engine with the artifact's weights for each graph."""
        machine = this_machine()
        if device.type != "cuda":
            raise BackendError(
                "TensorRT runs on a GPU only",
                found=str(device),
                remedy='load it there: cachegraph.load(path, device="cuda")',
            )
        record = json.loads((folder / _RECORD).read_text())
        refuse_other_machine(Machine(**record["machine"]), machine)
        from .engine import open_engine

        return [
            open_engine(folder / f"{name}.engine", folder / f"{name}.onnx", graph, weights, device)
            for name, graph in graphs.items()
        ]


def this_machine() -> Machine:
    """TensorRT and GPU of this machine.

    Raises:
        BackendError: one of them is missing.
    """
    require(("tensorrt",), "tensorrt", "cachegraph[tensorrt]")
    require(("onnx", "onnxscript"), "tensorrt", "cachegraph[tensorrt]")
    if not torch.cuda.is_available():
        raise BackendError(
            "backend tensorrt needs a GPU and a torch that can use it",
            found=f"torch {torch.__version__} without a CUDA device",
            remedy="install torch with CUDA, or compile for another backend",
        )
    import tensorrt

    major, minor = torch.cuda.get_device_capability()
    gpu = f"{torch.cuda.get_device_name()} sm_{major}{minor}"
    return Machine(tensorrt.__version__, gpu)


def refuse_other_machine(built: Machine, here: Machine) -> None:
    """Refuse engines that were built elsewhere.

    Args:
        built: where the engines come from.
        here: where they are to run.

    Raises:
        BackendError: another version of TensorRT, or another GPU.
    """
    remedy = (
        'compile again here, or load with another backend: cachegraph.load(..., backend="onnx")'
    )
    for what, expected, found in (
        ("by another version of TensorRT", here.tensorrt, built.tensorrt),
        ("for another GPU", here.gpu, built.gpu),
    ):
        if found != expected:
            what = f"the engines were built {what}"
            raise BackendError(what, expected=expected, found=found, remedy=remedy)


def refuse_unsupported(models: Mapping[str, onnx.ModelProto]) -> None:
    """Refuse what TensorRT's parser would, before anything is built.

    Args:
        models: by the names of their graphs.

    Raises:
        BackendError: lists every node of every graph, with the module that it comes from.
    """
    from .operators import refusals

    found = [f"{name}: {why}" for name, model in models.items() for why in refusals(model)]
    if found:
        raise BackendError("TensorRT cannot take these operators", found="; ".join(found))


def _content_of(weights: Weights) -> str:
    """Engines are chosen for the very numbers, though they do not hold them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def _digest(*parts: str | bytes) -> str:
    encoded = (part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in encoded)).hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    record_content(path)
