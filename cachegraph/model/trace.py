"""From a module to a flat functional graph with sites: torch.export, then some tidying."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree

from cachegraph.errors import ModelError, SiteError, TraceError
from cachegraph.spec import TensorSpec

from .conditions import failed
from .functional import functional
from .guards import branches, conditions_of, line_that_fixes
from .lines import line_of_node, quiet, untraceable
from .signature import CallSignature, call_arguments, make_signature
from .site import Site
from .sites import find_sites
from .stack import find_stack
from .state import unchanged
from .wrapped import refuse_wrapped

aten = torch.ops.aten
_log = logging.getLogger(__name__)

# Checks of sizes and dtypes that torch.export writes into the graph. They have no result, keep dead
# code alive, and the runner checks every call against the signature anyway.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    aten._assert_async.msg,
}
_AUTOCAST = "wrap_with_autocast"


@dataclass(frozen=True)
class TracedModel:
    """A model as a graph of tensors.

    Attributes:
        module: flat: tensors in signature order in, a tuple of tensors out.
        sites: what can be kept between steps.
        stack: all blocks as one site, where they form one chain.
        signature: how calls map to the graph's inputs and outputs.
        batch: the symbol that stands for the batch, or None where it is fixed.
        symbols: shape symbols with the sizes of the example inputs.
        fixed_batch_reason: why the batch is fixed, where it is.
        config: the model's own configuration (diffusers), as plain data.
        conditions: on the symbols, such as ``s0 <= 3``: where one does not hold, the graph is not
            the model; see :mod:`.conditions`.
    """

    module: fx.GraphModule
    sites: tuple[Site, ...]
    stack: Site | None
    signature: CallSignature
    batch: str | None
    symbols: Mapping[str, int]
    fixed_batch_reason: str
    config: Mapping[str, Any]
    conditions: tuple[str, ...] = ()


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
) -> TracedModel:
    """Trace a model; nothing about it is changed.

    Args:
        model: in eval mode; any module whose ``forward`` torch.export can follow.
        args: example inputs; the first dimension of the first tensor is the batch.
        kwargs: example inputs by name.
        dynamic_batch: let the batch vary where torch.export can; else it is fixed.

    Raises:
        ModelError: the model is in training mode or wrapped, or no input is a tensor.
        TraceError: torch.export cannot follow the model, or it changes a buffer.
        SiteError: no site was found.
    """
    refuse_wrapped(model)
    if model.training:
        raise ModelError(
            f"{type(model).__name__} is in training mode",
            expected="a model for inference",
            remedy="call model.eval() first",
        )
    arguments = call_arguments(model, args, kwargs or {})
    with unchanged(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        program, source, conditions, reason = _export(model, arguments, dynamic_batch)
    flat = _flatten(source, len(_pytree.tree_leaves(arguments)))
    found = _finish(model, flat, arguments, program, reason)
    return replace(found, conditions=conditions)


def _finish(
    model: nn.Module,
    module: fx.GraphModule,
    arguments: Mapping[str, Any],
    program: ExportedProgram,
    reason: str,
) -> TracedModel:
    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    tensors = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    returned = next(iter(module.graph.find_nodes(op="output"))).args[0]
    outputs = [None if n is None else TensorSpec.of(n.meta["val"]) for n in returned]
    _set_outputs(module, [n for n in returned if n is not None])
    signature = make_signature(
        model.forward,
        arguments,
        [TensorSpec.of(v) for v in inputs],
        program.call_spec.out_spec,
        outputs,
    )
    first = signature.inputs[0][1].shape[0]  # a number where the batch is fixed
    sites = find_sites(module.graph)
    if not sites:
        raise SiteError(
            f"no attention or mlp site was found in {type(model).__name__}",
            expected="residual adds whose branch holds attention or two linears in series",
            found=_operations(module.graph),
        )
    return TracedModel(
        module=module,
        sites=sites,
        stack=find_stack(module.graph, sites),
        signature=signature,
        batch=None if isinstance(first, int) else first,
        symbols=_symbols(inputs, tensors),
        fixed_batch_reason=reason if isinstance(first, int) else "",
        config=_plain_config(model),
    )


def _export(
    model: nn.Module, arguments: dict[str, Any], dynamic_batch: bool
) -> tuple[ExportedProgram, fx.GraphModule, tuple[str, ...], str]:
    """Export with a symbolic batch and its conditions where that works; else why it is fixed."""
    leaves = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if not leaves or not leaves[0].ndim:
        raise ModelError(
            "the example inputs hold no tensor with a batch dimension",
            expected="the latent first, with the batch as its first dimension",
        )
    reason = "asked for"
    if dynamic_batch:
        # Export takes a size of 1 for a constant, so a batch of one is traced as two.
        batch = leaves[0].shape[0]
        example = _with_batch(arguments, batch, 2) if batch == 1 else arguments
        try:
            with branches() as asked:
                program, source = _export_once(model, example, max(batch, 2))
        except TraceError:
            raise
        except Exception as error:  # noqa: BLE001 - export has no common base for "cannot vary"
            reason = f"torch.export: {_first_line(error)}"
        else:
            conditions, reason = _conditions(program, asked, leaves)
            if conditions is not None and not (reason and batch == 1):
                return program, source, conditions, reason
        _log.info("batch is fixed: %s", reason)
    try:
        return *_export_once(model, arguments, None), (), reason
    except TraceError:
        raise
    except Exception as error:
        raise untraceable(model, leaves, error) from error


def _conditions(
    program: ExportedProgram, asked: Mapping[Any, str], leaves: Sequence[Tensor]
) -> tuple[tuple[str, ...] | None, str]:
    """What sizes must fulfil, None where that has no form; and why the batch is fixed if it is."""
    names = set(program.graph_signature.user_inputs)
    holders = (n for n in program.graph.find_nodes(op="placeholder") if n.name in names)
    inputs = [n.meta["val"] for n in holders if isinstance(n.meta.get("val"), Tensor)]
    symbols = _symbols(inputs, leaves)
    try:
        conditions = conditions_of(program, asked, symbols)
    except ValueError as error:
        return None, f"the model branches on sizes: {error}"
    if isinstance(TensorSpec.of(inputs[0]).shape[0], int):
        line = line_that_fixes(program, asked)
        return conditions, f"the model fixes it ({line})" if line else "the model fixes it"
    if (broken := failed(conditions, symbols)) is not None:
        return None, f"the model takes batches of one another way ({broken} for all others)"
    return conditions, ""


def _symbols(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Symbol -> size, of symbolic inputs that stand for the given tensors."""
    return {
        str(dim): size
        for value, tensor in zip(inputs, tensors, strict=True)
        for dim, size in zip(value.shape, tensor.shape, strict=True)
        if not isinstance(dim, int) and str(dim).isidentifier()
    }


def _export_once(
    model: nn.Module, arguments: dict[str, Any], batch: int | None
) -> tuple[ExportedProgram, fx.GraphModule]:
    def dims(leaf: Any) -> dict[int, Any] | None:
        varies = batch and isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
        return {0: Dim.AUTO} if varies else None

    shapes = _pytree.tree_map(dims, arguments) if batch else None
    # Export marks the tensors it is given as dynamic, and forgets to undo that where it fails.
    given = _pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments)
    with quiet():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    return functional(program)


def _with_batch(arguments: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    def resize(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == old:
            return torch.cat([leaf] * new)
        return leaf

    return _pytree.tree_map(resize, arguments)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _flatten(source: fx.GraphModule, leaves: int) -> fx.GraphModule:
    """A graph of aten calls with one placeholder a tensor and nodes named by their order."""
    _inline_autocast(source)
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    counts: dict[str, int] = {}
    constants = 0
    for node in source.graph.nodes:
        if node.target in _CHECKS:
            continue
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            constants += 1
            if node.users:
                raise TraceError(f"input {node.name} is neither a tensor nor a constant")
            continue
        if _is_no_op(node):
            made[node] = made[node.args[0]]
            continue
        if node.op == "output":
            graph.output(fx.node.map_arg(tuple(node.args[0]), made.__getitem__))
            continue
        _refuse_unknown_shape(node)
        target, arguments, options = _plain_call(node)
        args = fx.node.map_arg(arguments, made.__getitem__)
        kwargs = fx.node.map_arg(options, made.__getitem__)
        name = _node_name(node, counts)
        made[node] = graph.create_node(node.op, target, args, kwargs, name=name)
        made[node].meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
        if node.op == "placeholder":
            made[node].target = made[node].name
    module = fx.GraphModule(source, graph)
    if len(module.graph.find_nodes(op="placeholder")) + constants != leaves:
        raise TraceError("torch.export lost inputs", expected=str(leaves))
    return module


def _node_name(node: fx.Node, counts: dict[str, int]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return node.name
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0].strip("_")
    count = counts.get(name, 0)
    counts[name] = count + 1
    return f"{name}_{count}"


def _is_no_op(node: fx.Node) -> bool:
    """Inactive dropout, clones that change no layout, casts to the dtype that is there."""
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target is aten.type_as.default:
        before, after = (n.meta["val"] for n in (node.all_input_nodes[0], node))
        return (before.dtype, before.device) == (after.dtype, after.device)
    if node.target is aten.clone.default and not node.kwargs:
        source = node.args[0]
        return isinstance(source, fx.Node) and (
            source.meta["val"].stride() == node.meta["val"].stride()
        )
    return False


def _plain_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments; of a cast to another tensor's dtype without that tensor.

    Else it would be known no earlier than that one, though only its dtype matters.
    """
    if node.target is not aten.type_as.default:
        return node.target, node.args, node.kwargs
    value = node.meta["val"]
    return aten._to_copy.default, node.args[:1], {"dtype": value.dtype, "device": value.device}


def _refuse_unknown_shape(node: fx.Node) -> None:
    """Refuse what has no shape before it runs, and functions that are handed to an operator."""
    unknown = sorted(map(str, free_unbacked_symbols(node.meta.get("val"))))
    if unknown:
        found = f"{node.name} makes {', '.join(unknown)}, which only contents decide"
    elif node.op == "get_attr" and "val" not in node.meta and node.users:
        found = f"{next(iter(node.users)).name} takes the function {node.target}"
    else:
        return
    raise TraceError(
        "the model is no graph of tensors whose shapes are known beforehand",
        place=line_of_node(node),
        found=found,
        remedy="do without .item(), boolean masks and operators that take a function",
    )


def _inline_autocast(module: fx.GraphModule) -> None:
    """Put the body of regions with autocast switched off into the graph itself."""
    for node in list(module.graph.nodes):
        if str(node.target) != _AUTOCAST:
            continue
        arguments: Any = node.args
        _device, _dtype, enabled, _cache, body, *operands = arguments
        if enabled:
            raise TraceError(
                "the model switches autocast on inside forward",
                remedy="cast the model to the dtype it should run in",
            )
        inner: Any = module.get_submodule(body.target)
        with module.graph.inserting_before(node):
            holders = inner.graph.find_nodes(op="placeholder")
            copied = dict(zip(holders, operands, strict=True))
            returned: Any = module.graph.graph_copy(inner.graph, copied)
        for user in list(node.users):  # getitem of the region's results
            user.replace_all_uses_with(returned[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _operations(graph: fx.Graph) -> str:
    """``41 operations: 12 linear, 9 add, ...``, the most frequent first."""
    counts = Counter(n.name.rpartition("_")[0] for n in graph.nodes if n.op == "call_function")
    listed = [f"{count} {name}" for name, count in counts.most_common(8)]
    more = ", ..." if len(counts) > len(listed) else ""
    return f"{counts.total()} operations: {', '.join(listed)}{more}"


def _set_outputs(module: fx.GraphModule, nodes: list[fx.Node]) -> None:
    module.graph.find_nodes(op="output")[0].args = (tuple(nodes),)
    module.graph.lint()
    module.recompile()


def _plain_config(model: nn.Module) -> dict[str, Any]:
    """The entries of ``model.config`` that are plain data; pipelines ask for some of them."""
    config = getattr(model, "config", None)
    plain = {}
    for key, value in dict(config).items() if isinstance(config, Mapping) else ():
        try:
            plain[key] = json.loads(json.dumps(value))
        except TypeError:
            continue  # a class or function: nothing that a pipeline can ask an artifact for
    return plain
