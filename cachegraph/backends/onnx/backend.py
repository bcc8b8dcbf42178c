"""Convert the graphs to ONNX and run them with onnxruntime."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from cachegraph.backends import AheadOfTime, Graphs, Progress, Weights
from cachegraph.backends.named import NamedGraph
from cachegraph.errors import BackendError
from cachegraph.graph.weights import is_stored, stored_weight
from cachegraph.runtime.known import StepFunction

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_KINDS = {torch.bfloat16: 16}  # the number that ONNX gives it, as numpy has none
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Onnx(AheadOfTime):
    """One ONNX file a graph, all of them referring to the artifact's one file of weights."""

    name = "onnx"

    def check(self, graph: fx.Graph) -> list[str]:
        """Operations that cannot be said in ONNX."""
        require(_PACKAGES, "onnx", "cachegraph[onnx]")
        from .convert import untranslatable

        return untranslatable(graph)

    def emit(self, graphs: Graphs, weights: Weights, folder: Path, progress: Progress) -> None:
        """``NAME.onnx`` for each graph."""
        require(_PACKAGES, "onnx", "cachegraph[onnx]")
        from .convert import to_onnx

        for name, graph in graphs.items():
            progress(f"converting {name} to ONNX")
            model = to_onnx(name, graph, weights)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())

    def open(
        self, graphs: Graphs, weights: Weights, folder: Path, device: torch.device
    ) -> list[StepFunction]:
        """A session of onnxruntime for each graph; they share the weights in memory."""
        require(_PACKAGES, "onnx", "cachegraph[onnx]")
        import onnxruntime

        provider = _provider(onnxruntime.get_available_providers(), device)
        stored = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        return [
            _function(folder / f"{name}.onnx", graph, provider, stored, device)
            for name, graph in graphs.items()
        ]


def require(packages: Sequence[str], backend: str, extra: str) -> None:
    """Refuse to go on without packages.

    Raises:
        BackendError: names those that are missing, and how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = f"backend {backend} needs packages that are not installed"
        raise BackendError(what, found=f"no {', '.join(missing)}", remedy=f"pip install '{extra}'")


def _provider(available: Sequence[str], device: torch.device) -> str:
    provider = _PROVIDERS.get(device.type, device.type)
    if provider not in available:
        raise BackendError(
            f"this onnxruntime cannot run on {device}",
            expected=provider,
            found=", ".join(available),
            remedy="pip install onnxruntime-gpu" if device.type == "cuda" else "load it on the cpu",
        )
    return provider


def _function(
    path: Path, graph: NamedGraph, provider: str, weights: Weights, device: torch.device
) -> StepFunction:
    """A session as a function of flat tensors."""
    model, stored = _with_weights_as_inputs(path, weights)
    session = _session(path, model, provider, device.index or 0)
    found = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    if found != [*graph.inputs, *stored, *graph.outputs]:
        what = "the ONNX file has other inputs and outputs than the graph"
        raise BackendError(what, place=str(path), remedy="compile again")

    # What is bound is memory: the weights must live as long as the function does.
    def call(*tensors: Tensor) -> list[Tensor]:
        given = [as_real(tensor.detach().contiguous()) for tensor in tensors]
        made = graph.empty_outputs(tensors, device)
        binding = session.io_binding()
        for name, tensor in (*stored.items(), *zip(graph.inputs, given, strict=True)):
            binding.bind_input(name, *_place_of(tensor))
        for name, tensor in zip(graph.outputs, map(as_real, made), strict=True):
            binding.bind_output(name, *_place_of(tensor))
        if device.type == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        return made

    return call


def as_real(tensor: Tensor) -> Tensor:
    """A tensor of the same memory in real numbers: see :mod:`.real`."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _place_of(tensor: Tensor) -> tuple[str, int, Any, list[int], int]:
    """What onnxruntime asks about a tensor's memory; its dlpack takes no booleans."""
    device = tensor.device
    kind: Any = _KINDS.get(tensor.dtype)
    if kind is None:
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
    return device.type, device.index or 0, kind, list(tensor.shape), tensor.data_ptr()


def _with_weights_as_inputs(path: Path, weights: Weights) -> tuple[bytes, dict[str, Tensor]]:
    """A file as a model that is handed its weights, and these.

    A session copies every weight that its file refers to, whoever supplies it; of an input it reads
    what is there. So all sessions work on one copy.
    """
    import onnx

    if not path.is_file():
        raise BackendError("the ONNX file is missing", place=str(path), remedy="compile again")
    model = onnx.load(path, load_external_data=False)
    used = [one for one in model.graph.initializer if is_stored(weights, one.name)]
    for one in used:
        spec = onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims)
        model.graph.input.append(spec)
        model.graph.initializer.remove(one)
    return model.SerializeToString(), {one.name: stored_weight(weights, one.name) for one in used}


def _session(path: Path, model: bytes, provider: str, number: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # The sessions of a trajectory take turns: threads of one must not spin while another runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    choices = {"device_id": number} if provider == _PROVIDERS["cuda"] else {}
    try:
        return onnxruntime.InferenceSession(model, options, [provider], [choices])
    except Exception as error:  # onnxruntime's own have no common base
        raise BackendError(
            "onnxruntime cannot run the graph",
            place=str(path),
            found=str(error).partition("\n")[0],
            remedy="cast the model to float32" if "NOT_IMPLEMENTED" in str(error) else "",
        ) from error
