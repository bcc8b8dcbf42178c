"""The part that calls TensorRT: build an engine, fill it with weights, run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import onnx
import tensorrt as trt
import torch
from onnx import numpy_helper
from torch import Tensor

from cachegraph.backends import Progress, Weights
from cachegraph.backends.named import NamedGraph
from cachegraph.backends.onnx.convert import MODULE
from cachegraph.errors import BackendError
from cachegraph.graph.weights import is_stored, stored_weight
from cachegraph.runtime.known import StepFunction

from .bindings import Binding

_TYPES = {
    torch.float32: trt.DataType.FLOAT,
    torch.float16: trt.DataType.HALF,
    torch.bfloat16: trt.DataType.BF16,
    torch.int32: trt.DataType.INT32,
    torch.int64: trt.DataType.INT64,
    torch.bool: trt.DataType.BOOL,
}
_TIMINGS = "timings.cache"


class _Log(trt.ILogger):
    """Keeps errors, which TensorRT tells nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(msg)


class _Monitor(trt.IProgressMonitor):
    """Tells which phase of a build has come how far."""

    def __init__(self, graph: str, progress: Progress) -> None:
        super().__init__()
        self._graph, self._progress = graph, progress
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        done, steps = step + 1, self._steps.get(phase_name, 0)
        self._progress(f"building {self._graph}: {phase_name}, {done} of {steps}")
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


def build_engine(
    source: Path, model: onnx.ModelProto, plan: Sequence[Binding], cache: Path, progress: Progress
) -> bytes:
    """Build an engine without weights.

    Args:
        source: the ONNX file, with its file of weights beside it.
        model: what is in it.
        plan: the engine's bindings.
        cache: folder where timings of kernels are kept from build to build.
        progress: is told what is being done.

    Raises:
        BackendError: TensorRT refuses the graph; names the node and the module it comes from.
    """
    log = _Log()
    builder = trt.Builder(log)
    # Strongly typed: the dtypes of the file hold, nothing is lowered to gain speed.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        errors = map(parser.get_error, range(parser.num_errors))
        told = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
        raise _refused(model, told)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    profile = builder.create_optimization_profile()
    for binding in plan:
        if not binding.output:
            profile.set_shape(binding.name, binding.smallest, binding.usual, binding.largest)
    config.add_optimization_profile(profile)
    config.progress_monitor = _Monitor(source.stem, progress)
    timings = cache / _TIMINGS
    known = timings.read_bytes() if timings.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(model, log.errors)
    timings.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def open_engine(
    path: Path, source: Path, graph: NamedGraph, weights: Weights, device: torch.device
) -> StepFunction:
    """Read an engine, fill it with weights and make it a function of flat tensors.

    Args:
        path: the engine.
        source: the ONNX file that it was built from, for its small constants.
        graph: what it computes.
        weights: name -> tensor, on the device.
        device: a GPU like the one that it was built for.

    Raises:
        BackendError: it cannot be read, has other bindings or asks for unknown weights.
    """
    log = _Log()
    with torch.cuda.device(device):
        engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise _unusable(path, "TensorRT cannot read the engine", log.errors)
        _check_bindings(path, engine, graph)
        _refit(path, engine, onnx.load(source, load_external_data=False), weights, log)
        context = engine.create_execution_context()
    if context is None:
        raise _unusable(path, "the engine does not fit the GPU's memory", log.errors)
    return _function(path, context, graph, device, log)


def _function(
    path: Path, context: trt.IExecutionContext, graph: NamedGraph, device: torch.device, log: _Log
) -> StepFunction:
    lock = Lock()  # a context serves one call at a time

    def call(*tensors: Tensor) -> list[Tensor]:
        given = [tensor.contiguous() for tensor in tensors]
        made = graph.empty_outputs(given, device)
        stream = torch.cuda.current_stream(device)
        with lock, torch.cuda.device(device):
            log.errors.clear()
            ready = all(
                context.set_input_shape(name, tuple(tensor.shape))
                and context.set_tensor_address(name, tensor.data_ptr())
                for name, tensor in zip(graph.inputs, given, strict=True)
            )
            ready = ready and all(
                context.set_tensor_address(name, tensor.data_ptr())
                for name, tensor in zip(graph.outputs, made, strict=True)
            )
            # torch frees in the order of the stream, so what is given lives until it was used.
            if not (ready and context.execute_async_v3(stream.cuda_stream)):
                what = f"the engine cannot run with the sizes {graph.sizes_of(given)}"
                raise _unusable(path, what, log.errors)
        return made

    return call


def _check_bindings(path: Path, engine: trt.ICudaEngine, graph: NamedGraph) -> None:
    wanted = {
        name: (output, _TYPES[spec.dtype], _fixed(spec.shape))
        for output, specs in ((False, graph.inputs), (True, graph.outputs))
        for name, spec in specs.items()
    }
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {
        name: (
            engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT,
            engine.get_tensor_dtype(name),
            _fixed(engine.get_tensor_shape(name)),
        )
        for name in names
    }
    if found != wanted:
        raise BackendError(
            "the engine has other inputs and outputs than the graph",
            place=str(path),
            expected=str({k: v for k, v in wanted.items() if found.get(k) != v}),
            found=str({k: v for k, v in found.items() if wanted.get(k) != v}),
        )
    if on_host := [name for name in names if engine.is_shape_inference_io(name)]:
        what = "the engine reads the contents of inputs to know sizes"
        raise BackendError(what, place=str(path), found=", ".join(on_host))


def _fixed(shape: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in shape)


def _refit(
    path: Path, engine: trt.ICudaEngine, model: onnx.ModelProto, weights: Weights, log: _Log
) -> None:
    """Give the engine every weight that it was stripped of."""
    small = {
        t.name: torch.from_numpy(np.array(numpy_helper.to_array(t)))
        for t in model.graph.initializer
        if not t.external_data
    }
    refitter = trt.Refitter(engine, log)
    kept: list[object] = []  # TensorRT reads them when all are named
    for name in refitter.get_all_weights():
        tensor = stored_weight(weights, name) if is_stored(weights, name) else small.get(name)
        if tensor is None and hasattr(trt, "OnnxParserRefitter"):
            kept += _by_parser(path, refitter, model, weights, log)
            break
        if tensor is None or tensor.dtype not in _TYPES:
            raise _unusable(path, f"the engine asks for an unknown weight {name!r}", [])
        tensor = tensor.detach().contiguous()
        kept.append(tensor)
        place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
        given = trt.Weights(_TYPES[tensor.dtype], tensor.data_ptr(), tensor.numel())
        if not refitter.set_named_weights(name, given, place):
            raise _unusable(path, f"the engine refuses the weight {name!r}", log.errors)
    if missing := refitter.get_missing_weights():
        raise _unusable(path, f"the engine lacks the weights {missing}", log.errors)
    torch.cuda.current_stream().synchronize()  # weights may still be on their way to the GPU
    if not refitter.refit_cuda_engine():
        raise _unusable(path, "the engine cannot be filled with weights", log.errors)


def _by_parser(
    path: Path, refitter: trt.Refitter, model: onnx.ModelProto, weights: Weights, log: _Log
) -> list[object]:
    """Let the parser name the weights, which made others of some; all that must be kept for it."""
    parser = trt.OnnxParserRefitter(refitter, log)
    ready = parser.load_model_proto(model.SerializeToString())
    kept: list[object] = [parser]  # it holds those that it made
    for initializer in model.graph.initializer:
        if initializer.external_data:
            if not is_stored(weights, initializer.name):
                raise _unusable(
                    path, f"the engine asks for an unknown weight {initializer.name!r}", []
                )
            tensor = stored_weight(weights, initializer.name).detach().cpu().contiguous()
            kept.append(tensor)
            given = initializer.name, tensor.data_ptr(), tensor.nbytes
            ready = ready and parser.load_initializer(*given)
    if not (ready and parser.refit_model_proto()):
        told = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _unusable(path, "the parser cannot fill the engine with weights", told or log.errors)
    return kept


def _refused(model: onnx.ModelProto, errors: Sequence[str]) -> BackendError:
    """TensorRT names a layer after the ONNX node, and so its messages tell the node."""
    text = "; ".join(errors) or "no message"
    named = [node for node in model.graph.node if node.name and node.name in text]
    node = max(named, key=lambda one: len(one.name), default=None)
    place = model.graph.name
    if node is not None:
        module = next((p.value for p in node.metadata_props if p.key == MODULE), "")
        place += f", node {node.name}" + (f", {module}" if module else "")
    return BackendError("TensorRT cannot build an engine", place=place, found=text)


def _unusable(path: Path, what: str, errors: Sequence[str]) -> BackendError:
    return BackendError(what, place=str(path), found="; ".join(errors))
