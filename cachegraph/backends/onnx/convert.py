"""A lowered graph as an ONNX model whose weights lie in the artifact's own file of weights."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.tensor_adapters
import onnxscript.optimizer
import onnxscript.version_converter
import torch
from onnx_ir.passes import common
from onnxscript import opset20 as op
from torch import Tensor, fx
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

from cachegraph.backends.export import export_graph, fold_constants
from cachegraph.backends.named import NamedGraph
from cachegraph.errors import BackendError
from cachegraph.graph.weights import WEIGHTS_FILE, is_stored, place_of, weight_offsets
from cachegraph.spec import TensorSpec

from .real import has_real_form, in_real_numbers, real_spec, touches_complex

OPSET = 20  # the newest that every TensorRT 10 reads
_OPSET_BFLOAT16 = 22  # the first with convolutions in bfloat16
MODULE = "module"  # key in a node's metadata: path of the module that it was traced in
_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's own: "['', 'blocks.0', 'blocks.0.attn', 'add']"
_LOGGER = "torch.onnx._internal.exporter._registration"


def untranslatable(graph: fx.Graph) -> list[str]:
    """Operations that cannot be said in ONNX; changes nothing."""
    found: dict[str, str] = {}
    for node in _operations(graph):
        target: Any = node.target
        if touches_complex(node):
            if not has_real_form(target):
                found.setdefault(f"no form of {target} in real numbers", node.name)
        elif target not in _translated() | _decomposed() and not target._can_decompose():
            found.setdefault(f"no ONNX translation of {target}", node.name)
    return [f"{why} (node {name})" for why, name in found.items()]


def to_onnx(name: str, graph: NamedGraph, weights: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Convert a graph.

    Args:
        name: of the graph.
        graph: what to convert.
        weights: name -> tensor. The model refers to them by their place in a file of weights beside
            it, as :func:`cachegraph.graph.weights.save_weights` writes it.

    Raises:
        BackendError: an operation has no translation, or an input or output did not survive.
    """
    try:
        with torch.no_grad(), _quiet():
            specs = [real_spec(spec) for spec in graph.inputs.values()]
            module = fold_constants(in_real_numbers(graph.module))
            exported = export_graph(module, specs, graph.example_sizes())
            model = _translate(exported, graph)
    except Exception as error:
        raise BackendError(
            "the graph cannot be converted to ONNX", place=name, found=_innermost(error)
        ) from error
    return _finish(name, model, graph, weights)


def _finish(
    name: str, model: ir.Model, graph: NamedGraph, weights: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """Simplify and check a model, and let it refer to the file of weights."""
    # Weights stand as inputs for a while: nothing folds what it cannot see.
    used = [v for key, v in model.graph.initializers.items() if is_stored(weights, key)]
    names = {value: str(value.name) for value in used}
    for value in used:
        del model.graph.initializers[names[value]]
        model.graph.inputs.append(value)
    halves = any(tensor.dtype is torch.bfloat16 for tensor in weights.values())
    _simplify(model, _OPSET_BFLOAT16 if halves else OPSET)
    _check_interface(name, model, graph, len(used))
    _name_sizes(model, graph)
    for node in model.graph:
        _keep_module_path(node)
    model.graph.name = name
    model.producer_name = "cachegraph"
    onnx.checker.check_model(ir.to_proto(model).SerializeToString(), full_check=True)
    offsets = weight_offsets(weights)
    for value in used:
        model.graph.inputs.remove(value)
        if not value.uses():
            continue
        key = names[value]
        offset, tensor = place_of(key, weights, offsets)
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            offset,
            tensor.nbytes,
            ir.tensor_adapters.from_torch_dtype(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            name=key,
        )
        model.graph.initializers[key] = value
    return ir.to_proto(model)


def _simplify(model: ir.Model, opset: int) -> None:
    """Without onnxscript's rewrite rules, whose time grows with the square of the graph."""
    onnxscript.version_converter.convert_version(model, opset)
    onnxscript.optimizer.inline(model)
    onnxscript.optimizer.fold_constants(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _translate(program: torch.export.ExportedProgram, graph: NamedGraph) -> ir.Model:
    """What ``torch.onnx.export`` does, but decomposing only where an operation needs it.

    Decomposing traces the graph anew, which takes many times longer than all the rest, and almost
    every operation of a traced model has a translation of its own.
    """
    registry = _registry()
    if any(n.target not in _translated() for n in _operations(program.graph)):
        program = _fx_passes.decompose_with_registry(program, registry)
    _fx_passes.insert_type_promotion_nodes(program.graph_module)
    _fx_passes.remove_assertion_nodes(program.graph_module)
    model = _core._exported_program_to_onnx_program(program, registry=registry).model
    for values, names in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    return model


def _sort(self: Any, *, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """ONNX has no sort; its TopK puts the lower index first among equals, as a stable one does."""
    if not descending:
        raise NotImplementedError("an ascending stable sort")
    return op.TopK(self, _whole(self.shape[dim]), axis=dim, largest=1, sorted=1)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Plain products: torch's own translation works out the transposition of the keys at run time.

    Engines know this form and fuse it.
    """
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    if enable_gqa:
        key, value = _for_all_heads(key, query), _for_all_heads(value, query)
    rank = len(query.shape)
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    products = op.MatMul(op.Mul(query, _number(factor, query)), op.Transpose(key, perm=swapped))
    if is_causal:
        attn_mask = _not_later(query, key)
    if attn_mask is not None:
        if is_causal or attn_mask.dtype == ir.DataType.BOOL:
            zero, least = _number(0.0, query), _number(float("-inf"), query)
            attn_mask = op.Where(attn_mask, zero, least)
        products = op.Add(products, attn_mask)
    return op.MatMul(op.Softmax(products, axis=-1), value)


def _for_all_heads(shared: Any, query: Any) -> Any:
    """Keys or values that several heads of the queries share, once for each of them."""
    rank, times = len(shared.shape), query.shape[-3] // shared.shape[-3]
    if times == 1:
        return shared
    axis = rank - 2
    many = op.Concat(*[op.Unsqueeze(shared, _whole(axis))] * times, axis=axis)
    front, back = op.Shape(shared, start=0, end=rank - 3), op.Shape(shared, start=rank - 2)
    return op.Reshape(many, op.Concat(front, _whole(query.shape[-3]), back, axis=0))


def _not_later(query: Any, key: Any) -> Any:
    """A mask of the keys that are no later than each query."""
    lengths = [op.Squeeze(op.Shape(x, start=-2, end=-1), _whole(0)) for x in (query, key)]
    rows, columns = (op.Range(_scalar(0), length, _scalar(1)) for length in lengths)
    return op.GreaterOrEqual(op.Unsqueeze(rows, _whole(1)), columns)


def _scalar(number: int) -> Any:
    return op.Constant(value_int=number)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """One Gemm that takes the weight as it is stored.

    Torch's own translation transposes it, and each session would hold a transposed copy.
    """
    if len(x.shape) < 2 or len(weight.shape) != 2:
        raise NotImplementedError("a linear layer of a vector")
    width, rank = x.shape[-1], len(x.shape)
    flat = x if rank == 2 else op.Reshape(x, _whole(-1, width))
    inputs = (flat, weight) if bias is None else (flat, weight, bias)
    product = op.Gemm(*inputs, transB=1)
    if rank == 2:
        return product
    sizes = [size if isinstance(size, int) else -1 for size in (*x.shape[:-1], weight.shape[0])]
    if sizes.count(-1) <= 1:
        return op.Reshape(product, _whole(*sizes))
    front = op.Shape(x, start=0, end=rank - 1)
    return op.Reshape(product, op.Concat(front, _whole(sizes[-1]), axis=0))


def _number(number: float, like: Any) -> Any:
    dtype = ir.tensor_adapters.to_torch_dtype(like.dtype)
    value: Any = ir.tensor_adapters.TorchTensor(torch.tensor(number, dtype=dtype))
    return op.Constant(value=value)


def _roll(self: Any, shifts: Any, dims: Any = ()) -> Any:
    """Torch's own translation takes no shift that depends on a size, such as half of the batch."""
    if len(shifts) != len(dims):
        raise NotImplementedError("a roll without axes")
    rank = len(self.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % rank
        length = op.Shape(self, start=axis, end=axis + 1)
        by = _whole(shift) if isinstance(shift, int) else op.Reshape(shift, _whole(-1))
        cut = op.Mod(op.Sub(length, by), length)
        front = op.Slice(self, _whole(0), cut, _whole(axis))
        back = op.Slice(self, cut, length, _whole(axis))
        self = op.Concat(back, front, axis=axis)
    return self


def _squeeze(self: Any, dim: int) -> Any:
    """Torch takes a dimension away only where its size is 1; its own translation fails else."""
    single = len(self.shape) > 0 and self.shape[dim] == 1
    return op.Squeeze(self, _whole(dim % len(self.shape))) if single else op.Identity(self)


def _whole(*numbers: int) -> Any:
    return op.Constant(value_ints=numbers)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten.roll.default: _roll,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.squeeze.dim: _squeeze,
}


@cache
def _registry() -> _registration.ONNXRegistry:
    """How operations are translated."""
    with _quiet():
        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
    for target, translation in _TRANSLATIONS.items():
        registry.register_op(target, translation)
    return registry


@cache
def _translated() -> set[Any]:
    """Operations with a translation of their own."""
    return set(_decomp.get_onnx_implemented_overloads(_registry()))


@cache
def _decomposed() -> set[Any]:
    """Operations that torch can say in terms of others."""
    return set(_decomp.create_onnx_friendly_decomposition_table(_translated()))


def _operations(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            yield node


def _check_interface(name: str, model: ir.Model, graph: NamedGraph, weights: int) -> None:
    """A write that is lost on the way would leave a slot unchanged: refuse it."""
    inputs = list(model.graph.inputs)[: len(model.graph.inputs) - weights]
    for kind, values, wanted in (
        ("inputs", inputs, graph.inputs),
        ("outputs", list(model.graph.outputs), graph.outputs),
    ):
        found = [f"{value.name}: {_spec_of(value)}" for value in values]
        expected = [f"{k}: {_without_names(real_spec(spec))}" for k, spec in wanted.items()]
        if found != expected:
            raise BackendError(
                f"the {kind} of the graph did not survive the conversion to ONNX",
                place=name,
                expected=", ".join(e for e in expected if e not in found) or "this order",
                found=", ".join(f for f in found if f not in expected) or "nothing for these",
            )


def _spec_of(value: ir.Value) -> TensorSpec:
    dtype = ir.DataType.UNDEFINED if value.dtype is None else value.dtype
    shape = value.shape or ()
    dims = tuple(dim if isinstance(dim, int) else "?" for dim in shape)
    return TensorSpec(dims, ir.tensor_adapters.to_torch_dtype(dtype))


def _without_names(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(tuple(d if isinstance(d, int) else "?" for d in spec.shape), spec.dtype)


def _name_sizes(model: ir.Model, graph: NamedGraph) -> None:
    """Call varying sizes by the graph's names for them, where torch has made up its own."""
    specs = {**graph.inputs, **graph.outputs}
    ends = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name in specs]
    names: dict[str, str] = {}
    for value in ends:
        shape = real_spec(specs[str(value.name)]).shape
        for made_up, dim in zip(value.shape or (), shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                names[str(made_up)] = dim
    for value in (*ends, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None:
            dims = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
            value.shape = ir.Shape(TensorSpec(dims, torch.bool).renamed(names).shape)


def _keep_module_path(node: ir.Node) -> None:
    """Of all that torch notes about a node, keep which module it was traced in."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    node.metadata_props.clear()
    node.doc_string = None
    if len(scopes) > 1 and scopes[-2]:
        node.metadata_props[MODULE] = scopes[-2]
    for value in node.outputs:
        value.metadata_props.clear()


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch tells about packages that are not installed."""
    logger = logging.getLogger(_LOGGER)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
