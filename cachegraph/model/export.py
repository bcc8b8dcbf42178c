"""A module exported: for any batch where that works, else item by item, else for one batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from cachegraph.errors import ModelError, TraceError
from cachegraph.spec import BATCH

from .conditions import failed
from .contents import Contents
from .dynamic import (
    SEVERAL,
    Axes,
    FixedSizeError,
    axes_of,
    refuse_fixed,
    refuse_read,
    symbol_names,
    tensors_of,
)
from .flex import write_out_flex_attention
from .functional import functional
from .guards import branches, conditions_of
from .items import Items, agree_for_more, batch_of, independent_items, one_more, two_items
from .lines import quiet, untraceable
from .masks import without_masks
from .one_item import OneItem
from .reads import Listening, Read, ReadError, Replaying, contents_of, record, same_reads
from .signature import TIMESTEP_NAMES
from .sizes import BRANCHES, batch_conditions, inputs_of, symbols_of, tensors_in, unknown_sizes

aten = torch.ops.aten
_log = logging.getLogger(__name__)

# Checks of sizes and dtypes that torch.export writes into the graph. They have no result, keep dead
# code alive, and the runner checks every call against the signature anyway.
CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    aten._assert_async.msg,
}
_SMALL = range(2, 7)  # batches that are tried where items are taken one by one
_AUTOCAST = "wrap_with_autocast"


@dataclass(frozen=True)
class Exported:
    """What torch.export made of a module.

    Attributes:
        program: as it made it.
        source: the same without anything written in place.
        arguments: that it is of.
        conditions: on sizes.
        reason: why the batch is fixed, where it is.
        contents: of inputs, which the model reads.
        items: how a batch is taken apart, where the trace is of one item.
        names: symbol -> what people call it.
        lists: arguments that are a list of the same constant for each item of the batch.
    """

    program: ExportedProgram
    source: fx.GraphModule
    arguments: Mapping[str, Any]
    conditions: tuple[str, ...] = ()
    reason: str = ""
    contents: tuple[Contents, ...] = ()
    items: Items | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()


def export(
    model: nn.Module,
    arguments: dict[str, Any],
    dynamic_batch: bool,
    by_item: bool,
    dynamic: Collection[str] = (),
    *,
    restore: Callable[[], None],
) -> Exported:
    """Export a module.

    Args:
        model: in eval mode.
        arguments: an example call, by name.
        dynamic_batch: let the batch vary where it can.
        by_item: where it cannot, export one item, if items do not depend on another.
        dynamic: names of sizes that have to vary, see :mod:`.dynamic`.
        restore: puts back what a call of the model changed.

    Raises:
        ModelError: no input is a tensor with a batch, or there is no such size.
        TraceError: torch.export cannot follow the model, or the model fixes such a size.
    """
    leaves = tensors_in(arguments)
    if not leaves or not leaves[0].ndim:
        raise ModelError(
            "the example inputs hold no tensor with a batch dimension",
            expected="the latent first, with the batch as its first dimension",
        )
    weights = (*model.parameters(), *model.buffers())
    runs = not any(tensor.is_meta for tensor in (*weights, *leaves))
    attempt = _Attempt(model, arguments, runs, by_item, axes_of(arguments, dynamic), restore)
    try:
        found = attempt.run(dynamic_batch)
    except FixedSizeError as error:
        _log.info("%s: others follow", error)
        follow = axes_of(arguments, dynamic, follow=True)
        found = replace(attempt, axes=follow).run(dynamic_batch)
    if BATCH in dynamic and found.reason and found.items is None:
        raise FixedSizeError("the batch cannot vary", found=found.reason)
    return found


def changing(place: str, name: str) -> TraceError:
    """A model that reads numbers from an input that differs from step to step."""
    return TraceError(
        "the model reads numbers from an input that differs from step to step, and computes "
        "something else for others",
        place=place,
        found=f"input {name!r}",
        remedy="let it compute all cases (every expert for every token) and choose among them",
    )


@dataclass(frozen=True)
class _Attempt:
    """One way through: without reading any numbers, or with those of a plain call."""

    model: nn.Module
    arguments: dict[str, Any]
    runs: bool  # the model has weights to run with
    by_item: bool
    axes: Axes | None
    restore: Callable[[], None]
    reading: bool = False

    def run(self, dynamic_batch: bool) -> Exported:
        """Without reading numbers if that works.

        Raises:
            FixedSizeError: a named size does not vary.
        """
        try:
            return self._run(dynamic_batch)
        except ReadError as error:
            if self.reading:
                raise
            _log.info("the model reads numbers at %s: they are recorded in a plain call", error)
        return replace(self, reading=True)._run(dynamic_batch)

    def _run(self, dynamic_batch: bool) -> Exported:
        if not dynamic_batch:
            return self._once(self.arguments, reason="asked for")
        found, reason = self._any_batch()
        if found is not None and not reason:
            return found
        _log.info("batch is fixed: %s", reason)
        if (apart := self._item_by_item(reason)) is not None:
            return apart
        return self._once(self.arguments, reason=reason) if found is None else found

    def _any_batch(self) -> tuple[Exported | None, str]:
        """With a symbolic batch and its conditions; and why the batch is fixed, where it is."""
        leaves = tensors_in(self.arguments)
        batch = leaves[0].shape[0]
        if batch_of(self.arguments) != batch:
            return None, "the first input is a list of an item each"
        # Export takes a size of 1 for a constant, so a batch of one is traced as two.
        example = one_more(self.arguments) if batch == 1 else self.arguments
        reads = self._reads(example)
        if reads and not self._reads_alike(reads, example):
            return None, f"what the model reads depends on the batch ({_first_place(reads)})"
        asked: dict[Any, str] = {}
        try:
            with branches() as asked:
                program, source = self._export(example, reads, max(batch, 2))
        except (TraceError, ReadError):
            raise
        except Exception as error:  # noqa: BLE001 - export has no common base for "cannot vary"
            said = f"{BRANCHES[0]} ({next(iter(asked.values()))}); " if asked else ""
            return None, f"{said}torch.export: {_first_line(error)}"
        refuse_fixed(program, self.axes)
        conditions, reason = batch_conditions(program, asked, dict(tensors_of(self.arguments)))
        if reason and asked and not reason.startswith(BRANCHES):
            reason = f"{BRANCHES[0]} ({next(iter(asked.values()))}); {reason}"
        if conditions is None or (reason and batch == 1):
            return None, reason
        lists = frozenset[str]() if reason else self._lists()
        if not reason:
            replaying = partial(Replaying, reads) if self.reading else nullcontext
            one = OneItem(
                *(self.model, example, program, source, lists, replaying, CHECKS),
                *(self.runs, self.restore),
            )
            conditions += one.conditions(conditions)
            sizes = symbols_of(inputs_of(program), leaves)
            if (broken := failed(conditions, sizes)) is not None:
                return None, f"{BRANCHES[1]} of one another way ({broken} for all others)"
        contents = contents_of(reads, tensors_in(example), rows=True)
        found = Exported(program, source, self.arguments, conditions, reason, contents)
        return replace(self._named(found), lists=lists), reason

    def _lists(self) -> frozenset[str]:
        """Lists of the same constant for each item, which are as long for another batch."""
        batch, found = batch_of(self.arguments), set[str]()
        for name, value in self.arguments.items():
            if not isinstance(value, list) or len(value) != batch or tensors_in({name: value}):
                continue
            if all(one == value[0] for one in value):
                found.add(name)
        items = self._independent()[1] if found and self.runs else None
        return frozenset(found & {*items.lists} if items is not None else ())

    def _independent(self) -> tuple[dict[str, Any], Items | None]:
        """A batch, and how it is taken apart into items that do not depend on one another."""
        several = self.arguments
        if batch_of(several) == 1:
            several = two_items(several)
        try:
            return several, independent_items(self.model, several)
        except Exception:  # noqa: BLE001 - a model that fails in a plain call is told by its trace
            return several, None

    def _reads_alike(self, reads: Mapping[Any, Read], example: Mapping[str, Any]) -> bool:
        """Whether another batch of the same items makes the model read the same."""
        batch, leaves = tensors_in(example)[0].shape[0], tensors_in(example)
        used = (leaves[i] for i in frozenset[int]().union(*(r.inputs for r in reads.values())))
        if any(len(t) == batch and not torch.equal(t, t[:1].expand_as(t)) for t in used if t.ndim):
            return False  # rows of other batches could be others
        try:
            return same_reads(reads, self._reads(one_more(example)))
        except Exception:  # noqa: BLE001 - whatever a model says of arguments that do not fit
            return False

    def _item_by_item(self, reason: str) -> Exported | None:
        """Of one item, where a plain call shows that items do not depend on one another."""
        if not (self.runs and self.by_item) or reason.startswith(BRANCHES):
            return None
        several, items = self._independent()
        if items is None:
            return None
        tried = items.count(several)
        others = (count for count in _SMALL if count not in (tried, tried + 1))
        if not agree_for_more(self.model, items, several, others):
            return None
        parts = [items.part(several, number) for number in range(tried)]
        reads = [self._reads(part) for part in parts]
        if any(not same_reads(reads[0], other) for other in reads[1:]):
            return None
        return self._once(parts[0], reason=f"item by item: {reason}", items=items)

    def _once(
        self, arguments: dict[str, Any], *, reason: str, items: Items | None = None
    ) -> Exported:
        reads = self._reads(arguments)
        try:
            with branches() as asked:
                program, source = self._export(arguments, reads, None)
        except (TraceError, ReadError):
            raise
        except Exception as error:
            raise untraceable(self.model, tensors_in(arguments), error) from error
        contents = contents_of(reads, tensors_in(arguments), rows=False)
        found = Exported(program, source, arguments, (), reason, contents, items)
        if self.axes is None:
            return self._named(found)
        refuse_fixed(program, self.axes)
        symbols = symbols_of(inputs_of(program), tensors_in(arguments))
        try:
            return self._named(replace(found, conditions=conditions_of(program, asked, symbols)))
        except ValueError as error:
            raise FixedSizeError("sizes cannot vary", found=str(error), remedy=SEVERAL) from error

    def _named(self, found: Exported) -> Exported:
        """The same with names for its symbols, and sizes that the conditions are known for."""
        places = dict(tensors_of(found.arguments))
        inputs = dict(zip(places, inputs_of(found.program), strict=True))
        first = str(next(iter(inputs.values())).shape[0])
        batch = first if first.isidentifier() else None
        names = symbol_names(inputs, batch, self.axes)
        if self.axes is None:
            return replace(found, names=names)
        refuse_read(found.contents, list(inputs.values()), batch)
        # Torch takes a symbol to be 2 or more; of the batch alone we know that 1 is as right.
        least = (f"{symbol} >= 2" for symbol in names if symbol != batch)
        return replace(found, names=names, conditions=(*found.conditions, *least))

    def _reads(self, arguments: Mapping[str, Any]) -> dict[Any, Read]:
        if not self.reading:
            return {}
        try:
            reads = record(self.model, arguments)
        except Exception as error:
            raise untraceable(self.model, tensors_in(arguments), error) from error
        finally:
            self.restore()
        leaves = _pytree.tree_leaves_with_path(dict(arguments))
        names = [str(path[-1]) for path, leaf in leaves if isinstance(leaf, Tensor)]
        for (_, place, _), read in reads.items():
            for index in read.inputs:
                if index == 0 or names[index].strip("[]'") in TIMESTEP_NAMES:
                    raise changing(place, names[index].strip("[]'"))
        return reads

    def _export(
        self, arguments: Mapping[str, Any], reads: Mapping[Any, Read], batch: int | None
    ) -> tuple[ExportedProgram, fx.GraphModule]:
        listening = Listening()
        mode = Replaying(reads) if self.reading else listening if self.runs else nullcontext()
        try:
            with mode:
                alone = copy_context()  # of what a forward sets in a context, nothing stays
                program, source = alone.run(_export_once, self.model, arguments, batch, self.axes)
        except Exception as error:
            if listening.passed and not isinstance(error, ReadError):
                raise ReadError(listening.passed) from error
            raise
        finally:
            self.restore()
        _inline_autocast(source)
        write_out_flex_attention(source)
        without_masks(source, CHECKS)
        if self.runs and not self.reading and any(map(unknown_sizes, source.graph.nodes)):
            raise ReadError("a shape that contents decide")
        return program, source


def _export_once(
    model: nn.Module, arguments: Mapping[str, Any], batch: int | None, axes: Axes | None
) -> tuple[ExportedProgram, fx.GraphModule]:
    def dims(path: Any, leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return None
        free = axes.free.get(_pytree.keystr(path), ()) if axes is not None else ()
        rows = (0,) if batch and leaf.shape[0] == batch else ()
        return dict.fromkeys((*rows, *free), Dim.AUTO)

    vary = batch or axes is not None
    shapes = _pytree.tree_map_with_path(dims, dict(arguments)) if vary else None
    # Export marks the tensors it is given as dynamic, and forgets to undo that where it fails.
    given = _pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, dict(arguments))
    if axes is not None:  # strides of a view would be symbols that no shape tells
        given = _pytree.tree_map_only(Tensor, Tensor.contiguous, given)
    with quiet():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    return functional(program)


def _first_place(reads: Mapping[Any, Read]) -> str:
    return next(iter(reads))[1]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


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
