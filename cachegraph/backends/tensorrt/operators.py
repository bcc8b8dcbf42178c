"""What TensorRT's ONNX parser takes, as data, and a check of a model against it.

Source: onnx/onnx-tensorrt, ``docs/operators.md`` of TensorRT 10.15: operators, types of the data
they work on, and restrictions. Only operators that have entered a converted graph, or may, are
listed; any other is refused as unknown here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from cachegraph.backends.onnx.convert import MODULE

FIRST_OPSET, LAST_OPSET = 9, 24
LARGEST_TOP_K = 3839
LARGEST_RANK = 8  # dimensions of a TensorRT tensor

_FLOAT: set[int] = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_NUMBER: set[int] = _FLOAT | {TensorProto.INT32, TensorProto.INT64}
_BOOL: set[int] = {TensorProto.BOOL}
_ANY = _NUMBER | _BOOL


_ON_FLOATS = """
Ceil Clip Conv ConvTranspose Cos CumSum Einsum Elu Erf Exp Floor Gemm GroupNormalization HardSigmoid
HardSwish InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul
PRelu RMSNormalization Reciprocal Resize Round Selu Sigmoid Sin Softmax Softplus Sqrt Tan Tanh
"""
_ON_NUMBERS = """
Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max
Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Sign
SpaceToDepth Sub Sum TopK
"""
_ON_ANYTHING = """
Cast CastLike Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity
OneHot Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
"""
_ON_TRUTH = "And Not Or Xor"
TYPES: dict[str, set[int]] = {
    operator: types
    for operators, types in (
        (_ON_FLOATS, _FLOAT),
        (_ON_NUMBERS, _NUMBER),
        (_ON_ANYTHING, _ANY),
        (_ON_TRUTH, _BOOL),
    )
    for operator in operators.split()
}
_DATA = {"Where": 1, "OneHot": 2}  # which input has the type above, where it is not the first
# Inputs that must be known when an engine is built.
CONSTANT_INPUTS: dict[str, int] = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "CumSum", "OneHot"), 1),
    **{f"Reduce{kind}": 1 for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean")},
    **{f"Reduce{kind}": 1 for kind in ("Min", "Prod", "Sum", "SumSquare")},
}


class _Facts:
    """Types, shapes and constants of a model's values by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.output, *graph.value_info)
        tensors = {value.name: value.type.tensor_type for value in values}
        self.types = {name: tensor.elem_type for name, tensor in tensors.items()}
        self.ranks = {name: len(tensor.shape.dim) for name, tensor in tensors.items()}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = node.attribute[0].t

    def number(self, name: str) -> int | None:
        """A constant of one number."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.external_data:
            return None
        value: np.ndarray = numpy_helper.to_array(tensor)
        return int(value.reshape(-1)[0]) if value.size == 1 else None


def in_single_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float32 in place of float64, which TensorRT does not have, between inputs and outputs.

    Its parser would do the same; a network whose types are fixed is to have them said.
    """
    double, single = TensorProto.DOUBLE, TensorProto.FLOAT
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.data_type == double and not tensor.external_data:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in changed.graph.value_info:
        if value.type.tensor_type.elem_type == double:
            value.type.tensor_type.elem_type = single
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == double:
                attribute.i = single
    return changed


def refusals(model: onnx.ModelProto) -> list[str]:
    """Everything in a model that TensorRT's parser would refuse; changes nothing.

    Args:
        model: as converted; the contents of its weights are not looked at.

    Returns:
        Such as ``TopK (node topk_0, blocks.0.mlp): K is 4096, at most 3839``: the module is that
        which the node was traced in, if known.
    """
    facts = _Facts(model)
    found = []
    for node in model.graph.node:
        place = f"node {node.name}" + (f", {module}" if (module := _module(node)) else "")
        found += [f"{node.op_type} ({place}): {reason}" for reason in _reasons(node, facts)]
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            found.append(f"import (node ): the domain {entry.domain} is unknown")
        elif not FIRST_OPSET <= entry.version <= LAST_OPSET:
            found.append(f"import (node ): opset {entry.version}")
    return found


def _reasons(node: NodeProto, facts: _Facts) -> Iterator[str]:
    if node.op_type not in TYPES:
        yield "not in TensorRT's list of operators"
        return
    named = [*node.input, *node.output]
    data = node.input[_DATA.get(node.op_type, 0)] if node.input else node.output[0]
    found = facts.types.get(data, 0)
    if found not in TYPES[node.op_type]:
        yield f"works on {TensorProto.DataType.Name(found).lower()}"
    for name in named:
        if facts.ranks.get(name, 0) > LARGEST_RANK:
            yield f"{name} has {facts.ranks[name]} dimensions, at most {LARGEST_RANK}"
    at = CONSTANT_INPUTS.get(node.op_type)
    if at is not None and len(node.input) > at and node.input[at] not in facts.constants:
        yield f"input {at} ({node.input[at]}) must be a constant"
    if node.op_type in _RULES:
        yield from _RULES[node.op_type](node, facts)


def _top_k(node: NodeProto, facts: _Facts) -> Iterator[str]:
    count = facts.number(node.input[1])
    if count is None:
        yield "K is not known when the engine is built"
    elif count > LARGEST_TOP_K:
        yield f"K is {count}, at most {LARGEST_TOP_K}"
    if _attribute(node, "sorted", 1) != 1:
        yield "sorted must be 1"


def _first_output(node: NodeProto, _: _Facts) -> Iterator[str]:
    if any(node.output[1:]):
        yield "only the first output is supported"


def _no_reduction(node: NodeProto, _: _Facts) -> Iterator[str]:
    if _attribute(node, "reduction", b"none") != b"none":
        yield "a reduction other than none"


def _cast(node: NodeProto, _: _Facts) -> Iterator[str]:
    to = _attribute(node, "to", TensorProto.FLOAT)
    if to not in _ANY:
        yield f"casts to {TensorProto.DataType.Name(to).lower()}"


_RULES: dict[str, Callable[[NodeProto, _Facts], Iterator[str]]] = {
    "TopK": _top_k,
    "LayerNormalization": _first_output,
    "ScatterND": _no_reduction,
    "Cast": _cast,
}


def _attribute(node: NodeProto, name: str, default: int | bytes) -> int | bytes:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _module(node: NodeProto) -> str:
    return next((p.value for p in node.metadata_props if p.key == MODULE), "")
