"""Lowered graphs as JSON, without weights and without code.

Only calls of functional aten operators, ``operator.*`` and symbolic-number functions are written
or read. fx turns names in a graph into Python source, so every name that is read must be a plain
one: loading a graph never runs anything that the file brings along.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachegraph.errors import ArtifactError
from cachegraph.spec import DTYPES, short_dtype, spec_text

SPEC = "cachegraph_spec"  # key in ``node.meta``: text of the spec of a node that was read
_MEMORY = {
    str(m): m
    for m in (
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}
_LAYOUTS = {str(torch.strided): torch.strided}
_OPERATOR = type(torch.ops.aten.add.Tensor)
# Functional operators of aten that have documentation check their arguments. Of those that torch
# keeps for itself some do not (_reshape_alias reads beside its tensor): those that tracing leaves.
_DOCUMENTED = re.compile(
    r"(?!_|from_file$|fbgemm_|mkldnn_|cudnn_|miopen_|quantized_|sparse_|record_stream$)\w+"
)
_OF_TORCH_ITSELF = re.compile(
    r"__(and|or|xor|lshift|rshift)__"
    r"|_(to_copy|cast_\w+|conj|conj_physical|neg_view|unsafe_view|stack|shape_as_tensor|prelu_kernel"
    r"|(log_|safe_)?softmax|logcumsumexp|aminmax|is_(all|any)_true|cdist_forward|euclidean_dist"
    r"|(int|scaled|grouped|scaled_grouped)_mm|weight_int[48]pack_mm\w*|dyn_quant_matmul_4bit"
    r"|addmm_activation|trilinear|convolution|convolution_mode|fused_rms_norm|weight_norm\w*"
    r"|native_batch_norm_legit\w*|native_multi_head_attention|transformer_encoder_layer_fwd"
    r"|scaled_dot_product_\w+|fft_(c2c|c2r|r2c)|linalg_(det|eigh|slogdet|solve_ex|svd)"
    r"|adaptive_avg_pool[23]d|upsample_\w+|pad_(circular|enum))"
)
# Keys of a ModuleDict need not be identifiers; rows of a weight have a name that says which.
_WEIGHT_NAME = re.compile(r"(?!__)[\w -]+(\[\d+:\d+\])?")
_MODULES = {"_operator": operator, "operator": operator, "math": math, "torch": torch}
FUNCTIONS = {  # beside aten: what export leaves for arithmetic on symbolic sizes
    "operator": {
        *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
    },
    "math": {"ceil", "floor", "trunc", "sqrt"},
    "torch": {"sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt"},
}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order.

    Raises:
        ArtifactError: a node that cannot be written.
    """
    return [_node_to_json(node) for node in graph.nodes]


def graph_from_json(nodes: list[dict[str, Any]], device: torch.device) -> fx.Graph:
    """The inverse of :func:`graph_to_json`.

    Args:
        nodes: what was written.
        device: stands wherever the traced graph names a device.

    Raises:
        ArtifactError: an operation that this torch does not have, or one that no graph may hold.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in nodes:
        try:
            _add_node(graph, entry, made, device)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError("a node of a graph is damaged", found=repr(error)) from error
    return graph


def _add_node(
    graph: fx.Graph, entry: Mapping[str, Any], made: dict[str, fx.Node], device: torch.device
) -> None:
    args = tuple(_value_from_json(v, made, device) for v in entry.get("args", ()))
    kwargs = {
        _plain_name(k): _value_from_json(v, made, device)
        for k, v in entry.get("kwargs", {}).items()
    }
    target = entry["target"]
    match entry["op"]:
        case "output":
            graph.output(tuple(args[0]))
            return
        case "call_function":
            target = _function(target)
        case "placeholder":
            _plain_name(target)
        case "get_attr":
            for part in target.split("."):
                if not _WEIGHT_NAME.fullmatch(part):
                    raise ArtifactError(f"a graph may not hold the name {target!r}")
        case other:
            raise ArtifactError(f"a graph may not hold a node of the kind {other!r}")
    name = _plain_name(entry["name"])
    made[name] = graph.create_node(entry["op"], target, args, kwargs, name=name)
    if "spec" in entry:
        made[name].meta[SPEC] = str(entry["spec"])


def _plain_name(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"a graph may not hold the name {name!r}")
    return name


def weights_module(weights: Mapping[str, Tensor]) -> nn.Module:
    """A module tree that holds the weights under their names, as buffers if not Parameters."""
    root = nn.Module()
    for name, tensor in weights.items():
        holder = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor)
    return root


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": node.op, "name": node.name, "target": str(node.target)}
    if node.op == "call_function":
        entry["target"] = _function_name(node)
    if node.args:
        entry["args"] = [_value_to_json(a, node) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: _value_to_json(v, node) for k, v in node.kwargs.items()}
    if spec := spec_of(node):
        entry["spec"] = spec
    return entry


def spec_of(node: fx.Node) -> str:
    """Shape and dtype of a node's value as text; empty where they are not known."""
    return spec_text(node.meta["val"]) if "val" in node.meta else str(node.meta.get(SPEC, ""))


def _function_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, _OPERATOR) and _may_be_called(target):
        return str(target)
    if callable(target) and hasattr(target, "__name__"):
        module = str(getattr(target, "__module__", "")).removeprefix("_")
        if target.__name__ in FUNCTIONS.get(module, ()):
            return f"{module}.{target.__name__}"
    raise ArtifactError(
        f"operation {target} cannot be written to an artifact",
        place=f"node {node.name}",
        expected="aten operators and arithmetic on sizes",
    )


def _may_be_called(operator: Any) -> bool:
    """Whether an operator of aten computes tensors from tensors and does nothing else."""
    namespace, _, name = operator._schema.name.partition("::")
    known = _DOCUMENTED.fullmatch(name) or _OF_TORCH_ITSELF.fullmatch(name)
    return namespace == "aten" and not operator._schema.is_mutable and known is not None


def _function(name: str) -> Callable[..., Any]:
    module, _, rest = name.partition(".")
    if module == "aten":
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(found, _OPERATOR):
            if not _may_be_called(found):
                raise ArtifactError(f"a graph may not call {name!r}")
            return found
        raise ArtifactError(
            f"this torch has no operator {name}",
            found=f"torch {torch.__version__}",
            remedy="use the torch version named in the artifact's manifest",
        )
    if rest in FUNCTIONS.get(module, ()):
        return getattr(_MODULES[module], rest)
    raise ArtifactError(f"a graph may not call {name!r}")


def _value_to_json(value: Any, node: fx.Node) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case list() | tuple():
            return [_value_to_json(v, node) for v in value]
        case slice():
            parts = (value.start, value.stop, value.step)
            return {"slice": [_value_to_json(v, node) for v in parts]}
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case torch.dtype():
            return {"dtype": short_dtype(value)}
        case torch.device():
            return {"device": True}
        case torch.memory_format():
            return {"memory_format": str(value)}
        case torch.layout():
            return {"layout": str(value)}
    raise ArtifactError(
        f"a {type(value).__name__} argument cannot be written to an artifact",
        place=f"node {node.name}",
    )


def _value_from_json(value: Any, made: Mapping[str, fx.Node], device: torch.device) -> Any:
    match value:
        case {"node": name}:
            return made[name]
        case {"slice": parts}:
            return slice(*(_value_from_json(v, made, device) for v in parts))
        case {"float": text}:
            return float(text)
        case {"dtype": name}:
            return DTYPES[name]
        case {"device": _}:
            return device
        case {"memory_format": name}:
            return _MEMORY[name]
        case {"layout": name}:
            return _LAYOUTS[name]
        case list():
            return [_value_from_json(v, made, device) for v in value]
        case bool() | int() | float() | str() | None:
            return value
    raise ArtifactError(f"a graph may not hold the argument {value!r}")
