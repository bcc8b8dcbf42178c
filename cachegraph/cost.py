"""What a plan costs, known before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .binding import Binding
from .graph import CONSTANT, StepGraph, merge_prologues, request_values
from .plan import Plan
from .slot import ConstantKind, StepConstant
from .spec import TensorSpec


@dataclass(frozen=True)
class PlanCost:
    """Predicted cost of one trajectory.

    Attributes:
        symbols: the sizes that it was computed for, such as the batch.
        flops: per step, with its share of what is computed beforehand; 1 multiply-add is 2 FLOPs,
            counted by ``torch.utils.flop_counter`` (matrix products, convolutions and attention).
        full_flops: of one uncached model call.
        cache_bytes: kept after each step.
        known_bytes: values known beforehand that are held when each step begins: those of the
            request, and those of every later step whose prologue has run.
        weight_bytes: of the weights, stored once for all variants.
    """

    symbols: Mapping[str, int]
    flops: tuple[int, ...]
    full_flops: int
    cache_bytes: tuple[int, ...]
    known_bytes: tuple[int, ...]
    weight_bytes: int

    @property
    def total_flops(self) -> int:
        """FLOPs of all steps."""
        return sum(self.flops)

    @property
    def limit(self) -> float:
        """Speed-up if time were FLOPs: uncached over cached."""
        return len(self.flops) * self.full_flops / max(self.total_flops, 1)


def plan_cost(
    plan: Plan,
    graphs: Sequence[StepGraph],
    full: fx.GraphModule,
    weights: Mapping[str, Tensor],
    symbols: Mapping[str, int],
) -> PlanCost:
    """Predict FLOPs and memory of a trajectory.

    Args:
        plan: what the steps do.
        graphs: one lowered graph a variant.
        full: the traced model.
        weights: the weight store.
        symbols: a size for every shape symbol.
    """
    counted = [count_flops(step.module, symbols, _token_symbols(step)) for step in graphs]
    before = [count_flops(step.prologue, symbols).fixed if step.prologue else 0 for step in graphs]
    flops = [
        before[v] + counted[v].at(_tokens(graphs[v], step))
        for step, v in enumerate(plan.variant_of)
    ]
    request = merge_prologues([step.request for step in graphs if step.request is not None])
    if request is not None:
        flops[0] += count_flops(request, symbols).fixed
    return PlanCost(
        symbols=dict(symbols),
        flops=tuple(flops),
        full_flops=count_flops(full, symbols).fixed,
        cache_bytes=plan.cache_bytes(symbols),
        known_bytes=_known_bytes(plan, graphs, symbols),
        weight_bytes=sum({t.data_ptr() or id(t): t.nbytes for t in weights.values()}.values()),
    )


def _known_bytes(
    plan: Plan, graphs: Sequence[StepGraph], symbols: Mapping[str, int]
) -> tuple[int, ...]:
    """Bytes held when each step begins; a variant's prologue runs before its first step."""
    lasting = sum(known.spec.nbytes(symbols) for known in request_values(graphs))
    held = [lasting] * plan.steps
    for step in graphs:
        row = sum(k.spec.nbytes(symbols) for k in step.known if k.binding is Binding.STEP)
        steps = step.variant.steps
        for now in range(steps[0], plan.steps):
            held[now] += row * sum(later >= now for later in steps)
    return tuple(held)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call of a graph, some of them proportional to a number of tokens.

    Attributes:
        fixed: whatever the numbers of tokens are.
        per_token: symbol of a number of tokens -> FLOPs for each of them.
    """

    fixed: int
    per_token: Mapping[str, int]

    def at(self, tokens: Mapping[str, int]) -> int:
        """FLOPs for the given numbers of tokens."""
        return self.fixed + sum(self.per_token[name] * tokens[name] for name in self.per_token)


def count_flops(
    module: fx.GraphModule, symbols: Mapping[str, int], token_symbols: Sequence[str] = ()
) -> FlopCount:
    """FLOPs of one call, from shapes alone: nothing is computed and no weight is touched.

    Args:
        module: the graph.
        symbols: a size for every other shape symbol.
        token_symbols: symbols of numbers of recomputed tokens. What is done for such tokens is
            done one by one, so its cost is counted for one and multiplied.
    """
    mode = module.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    sizes = {**symbols, **dict.fromkeys(token_symbols, 1)}
    env: dict[fx.Node, Any] = {}
    fixed, before = 0, 0
    per_token = dict.fromkeys(token_symbols, 0)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with mode, counter, torch.no_grad(), _quiet():
        for node in module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                env[node] = _empty(node, sizes)
                continue
            if node.op != "call_function":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
            spent = int(counter.get_total_flops()) - before if token_symbols else 0
            before += spent
            for symbol in _symbols_of(node) & per_token.keys() if spent else ():
                per_token[symbol] += spent
                spent = 0
            fixed += spent
        total = int(counter.get_total_flops())
    return FlopCount(fixed if token_symbols else total, per_token)


def _symbols_of(node: fx.Node) -> set[str]:
    value = node.meta["val"]
    return TensorSpec.of(value).symbols() if isinstance(value, Tensor) else set()


def _token_inputs(step: StepGraph) -> Iterator[tuple[str, StepConstant]]:
    """(symbol, constant) of every number of tokens among a graph's inputs."""
    for node in step.inputs:
        constant = node.meta.get(CONSTANT)
        if constant is not None and constant.kind is ConstantKind.TOKENS:
            yield str(node.meta["val"].shape[0]), constant


def _token_symbols(step: StepGraph) -> list[str]:
    return [symbol for symbol, _ in _token_inputs(step)]


def _tokens(graph: StepGraph, step: int) -> dict[str, int]:
    return {symbol: len(constant.values[step]) for symbol, constant in _token_inputs(graph)}


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the attention kernels of GPUs only, so a trace on the CPU would seem cheaper.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _empty(node: fx.Node, symbols: Mapping[str, int]) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    sizes = TensorSpec.of(value).sizes(symbols)
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notice about counting inside another dispatch mode."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
