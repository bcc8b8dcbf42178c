"""From a module to a flat functional graph with sites: torch.export, then some tidying."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from cachegraph.errors import ModelError, SiteError, TraceError
from cachegraph.spec import TensorSpec

from .contents import Contents
from .dynamic import checked_names
from .export import CHECKS, Exported, export
from .items import Items
from .lines import line_of_node
from .signature import CallSignature, call_arguments, make_signature
from .site import Site
from .sites import find_sites
from .sizes import is_object, symbols_of, unknown_sizes
from .stack import find_stack
from .state import unchanged
from .wrapped import refuse_wrapped

aten = torch.ops.aten
_log = logging.getLogger(__name__)


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
        contents: of inputs, which the model reads: for others the graph is not the model.
        items: how a call is taken apart where the graph is of one item of the batch.
        names: symbol -> what people call it: ``batch``, ``height``, or ``axis0_img_ids``.
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
    contents: tuple[Contents, ...] = ()
    items: Items | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    by_item: bool = True,
    dynamic: Iterable[str] = (),
) -> TracedModel:
    """Trace a model; nothing about it is changed.

    Args:
        model: in eval mode; any module whose ``forward`` torch.export can follow.
        args: example inputs; the first dimension of the first tensor is the batch.
        kwargs: example inputs by name.
        dynamic_batch: let the batch vary where torch.export can; else it is fixed.
        by_item: where it cannot, trace one item of the batch, if items do not depend on another.
        dynamic: sizes that have to vary, see :data:`cachegraph.spec.SIZES`.

    Raises:
        InputError: there is no such size.
        ModelError: the model is in training mode or wrapped, or no input is a tensor.
        TraceError: torch.export cannot follow the model, it changes a buffer, or it fixes a size
            that has to vary.
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
    with unchanged(model) as restore, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        how = dynamic_batch, by_item, checked_names(dynamic)
        exported = copy_context().run(export, model, arguments, *how, restore=restore)
    flat = _flatten(exported.source, len(_pytree.tree_leaves(dict(exported.arguments))))
    return _finish(model, flat, exported)


def _finish(
    model: nn.Module,
    module: fx.GraphModule,
    exported: Exported,
) -> TracedModel:
    arguments, program = exported.arguments, exported.program
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
        exported.lists,
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
        symbols=symbols_of(inputs, tensors),
        fixed_batch_reason=exported.reason if isinstance(first, int) else "",
        config=_plain_config(model),
        conditions=exported.conditions,
        contents=exported.contents,
        items=exported.items,
        names=exported.names,
    )


def _flatten(source: fx.GraphModule, leaves: int) -> fx.GraphModule:
    """A graph of aten calls with one placeholder a tensor and nodes named by their order."""
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    counts: dict[str, int] = {}
    constants = 0
    for node in source.graph.nodes:
        if node.target in CHECKS:
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
    if unknown := unknown_sizes(node):
        found = f"{node.name} makes {', '.join(unknown)}, which only contents decide"
    elif node.op == "get_attr" and "val" not in node.meta and node.users:
        found = f"{next(iter(node.users)).name} takes the function {node.target}"
    elif is_object(node.meta.get("val")) and node.users:
        found = f"{next(iter(node.users)).name} takes the object {node.name}"
    else:
        return
    raise TraceError(
        "the model is no graph of tensors whose shapes are known beforehand",
        place=line_of_node(node),
        found=found,
        remedy="do without .item(), boolean masks and operators that take a function",
    )


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
