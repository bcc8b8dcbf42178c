"""A stand-in for the part of TensorRT's Python API that tools/stubs/tensorrt describes.

It is strict about how it is called, keeps no weights in what it builds, and computes with
onnxruntime through the addresses that it was given.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

__version__ = "10.15.1"
parsed: list[str] = []  # every file that was parsed

DataType = IntEnum(
    "DataType", {"FLOAT": 0, "HALF": 1, "INT32": 3, "BOOL": 4, "BF16": 7, "INT64": 8}
)
TensorIOMode = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
TensorLocation = IntEnum("TensorLocation", {"DEVICE": 0, "HOST": 1})
# As in 10, where networks might be typed weakly, and in 11.
FLAGS = {
    version: (
        IntEnum("BuilderFlag", {"STRIP_PLAN": strip, "REFIT_IDENTICAL": strip + 1}),
        IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": typed}),
    )
    for version, strip, typed in (("10.15.1", 19, 1), ("11.4.0", 18, 0))
}
BuilderFlag, NetworkDefinitionCreationFlag = FLAGS[__version__]
renamed: set[str] = set()  # weights that the parser made others of
_TYPES = {
    TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    TensorProto.INT64: (DataType.INT64, np.int64),
    TensorProto.BOOL: (DataType.BOOL, np.bool_),
}


class ILogger:
    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3})

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class Network:
    model: Any = None


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Sequence[int], ...]] = {}

    def set_shape(self, name: str, *shapes: Sequence[int]) -> None:
        self.shapes[name] = tuple(map(tuple, shapes))


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"t"


class Config:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.flags: set[Any] = set()

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profile = profile
        return 0

    create_timing_cache = staticmethod(TimingCache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    create_builder_config = staticmethod(Config)
    create_optimization_profile = staticmethod(OptimizationProfile)

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert config.flags == set(BuilderFlag)
        for value in network.model.graph.input:
            assert value.name in config.profile.shapes, f"{value.name} has no profile"
        config.progress_monitor.phase_start("Tactics", None, 1)
        assert config.progress_monitor.step_complete("Tactics", 0)
        config.progress_monitor.phase_finish("Tactics")
        for node in network.model.graph.node:
            if node.op_type == "Softmax" and node.name.startswith("bad"):
                self.logger.log(ILogger.Severity.ERROR, f"no implementation for {node.name}")
                return None
        return pickle.dumps((network.model.SerializeToString(), config.profile.shapes))


class ParserError:
    def __init__(self, node: Any) -> None:
        self.node = node

    def desc(self) -> str:
        return "unsupported"

    def node_name(self) -> str:
        return self.node.name

    def node_operator(self) -> str:
        return self.node.op_type


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network, self.errors = network, []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, path: str) -> bool:
        parsed.append(path)
        model = onnx.load(path, load_external_data=False)
        onnx.load(path)  # the weights lie beside it
        self.network.model = model
        self.errors = [ParserError(n) for n in model.graph.node if n.name.startswith("refused")]
        return not self.errors


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.session = onnxruntime.InferenceSession(engine.model.SerializeToString())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profile[name]
        self.shapes[name] = shape
        return all(a <= dim <= b for a, dim, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        feed = {}
        for value in self.engine.model.graph.input:
            kind = _TYPES[value.type.tensor_type.elem_type][1]
            shape = self.shapes[value.name]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            content = ctypes.string_at(self.addresses[value.name], size)
            feed[value.name] = np.frombuffer(content, kind).reshape(shape)
        names = [value.name for value in self.engine.model.graph.output]
        for name, result in zip(names, self.session.run(names, feed), strict=True):
            ctypes.memmove(self.addresses[name], result.tobytes(), result.nbytes)
        self.addresses.clear()  # the next call must say them all
        return True


class Engine:
    def __init__(self, content: bytes) -> None:
        serialized, self.profile = pickle.loads(content)
        self.model = onnx.load_from_string(serialized)
        graph = self.model.graph
        self.tensors = {v.name: (TensorIOMode.INPUT, v.type.tensor_type) for v in graph.input}
        self.tensors |= {v.name: (TensorIOMode.OUTPUT, v.type.tensor_type) for v in graph.output}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self.tensors[name][1].elem_type][0]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if d.dim_param else d.dim_value for d in self.tensors[name][1].shape.dim]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> Context:
        return Context(self)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        if not content:
            self.logger.log(ILogger.Severity.ERROR, "no magic tag")
            return None
        return Engine(content)


class Weights:
    def __init__(self, kind: Any, pointer: int, count: int) -> None:
        self.kind, self.pointer, self.count = kind, pointer, count


class Refitter:
    """Every initializer was stripped, the small ones too."""

    def __init__(self, engine: Engine, logger: ILogger) -> None:
        self.initializers = {
            f"{t.name} transposed" if t.name in renamed else t.name: t
            for t in engine.model.graph.initializer
        }
        self.given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.initializers)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.initializers if name not in self.given]

    def set_named_weights(self, name: str, weights: Weights, location: Any) -> bool:
        assert location == TensorLocation.HOST
        tensor = self.initializers[name]
        self.given[name] = weights
        right = weights.kind == _TYPES[tensor.data_type][0]
        return right and weights.count == int(np.prod(tensor.dims, dtype=np.int64))

    def refit_cuda_engine(self) -> bool:
        for name, tensor in self.initializers.items():
            kind = np.dtype(_TYPES[tensor.data_type][1])
            content = ctypes.string_at(
                self.given[name].pointer, self.given[name].count * kind.itemsize
            )
            filled = np.frombuffer(content, kind).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(filled, tensor.name))
        return True


class OnnxParserRefitter:
    """Knows which weights became which."""

    num_errors = 0

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.refitter = refitter
        self.model: Any = None
        self.loaded: dict[str, tuple[int, int]] = {}

    def load_model_proto(self, model: bytes, path: str | None = None) -> bool:
        self.model = onnx.load_from_string(model)
        return True

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        assert self.model is not None
        self.loaded[name] = data, size
        return True

    def refit_model_proto(self) -> bool:
        self.kept = []
        for name, tensor in self.refitter.initializers.items():
            kind, number = _TYPES[tensor.data_type]
            if tensor.name in self.loaded:
                place, size = self.loaded[tensor.name]
            else:
                self.kept.append(np.array(numpy_helper.to_array(tensor)))
                place, size = self.kept[-1].ctypes.data, self.kept[-1].nbytes
            self.refitter.given[name] = Weights(kind, place, size // np.dtype(number).itemsize)
        return True
