"""What a plan costs, known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from cachegraph.graph.binding import Binding
from cachegraph.graph.provenance import NodeFlops
from cachegraph.graph.step_graph import CONSTANT, StepGraph, merge_prologues, request_values
from cachegraph.plan.cost import PlanCost
from cachegraph.plan.plan import Plan
from cachegraph.plan.slot import ConstantKind, StepConstant
from cachegraph.runtime.release import only_before
from cachegraph.spec import TensorSpec

from .sized import SizedCalls


def plan_cost(
    plan: Plan,
    graphs: Sequence[StepGraph],
    full: fx.GraphModule,
    weights: Mapping[str, Tensor],
    symbols: Mapping[str, int],
    calls: SizedCalls | None = None,
) -> PlanCost:
    """Predict FLOPs and memory of a trajectory.

    Args:
        plan: what the steps do.
        graphs: one lowered graph a variant.
        full: the traced model.
        weights: the weight store.
        symbols: a size for every shape symbol.
        calls: what is known of calls, for whoever asks further.
    """
    calls = calls or SizedCalls()
    counted = [count_flops(step.module, symbols, token_symbols(step), calls) for step in graphs]
    before = [
        count_flops(step.prologue, symbols, calls=calls).fixed if step.prologue else 0
        for step in graphs
    ]
    flops = [
        before[v] + counted[v].at(token_sizes(graphs[v], step))
        for step, v in enumerate(plan.variant_of)
    ]
    request = merge_prologues([step.request for step in graphs if step.request is not None])
    if request is not None:
        flops[0] += count_flops(request, symbols, calls=calls).fixed
    cost = PlanCost(
        symbols=dict(symbols),
        flops=tuple(flops),
        full_flops=count_flops(full, symbols, calls=calls).fixed,
        cache_bytes=plan.cache_bytes(symbols),
        known_bytes=known_bytes(plan, graphs, symbols, ahead=True),
        weight_bytes=_stored_bytes(weights),
        prologue_bytes=_stored_bytes({name: weights[name] for name in _only_before(graphs)}),
    )
    return replace(cost, peak_bytes=predict_peaks(plan, graphs, cost, compiled=True, calls=calls))


def _stored_bytes(weights: Mapping[str, Tensor]) -> int:
    """Of the tensors, each storage once."""
    return sum({t.data_ptr() or id(t): t.nbytes for t in weights.values()}.values())


def _only_before(graphs: Sequence[StepGraph]) -> set[str]:
    """Weights that only prologues use."""
    before = [p.graph for step in graphs for p in (step.request, step.prologue) if p is not None]
    return only_before([step.graph for step in graphs], before)


def known_bytes(
    plan: Plan, graphs: Sequence[StepGraph], symbols: Mapping[str, int], *, ahead: bool
) -> tuple[int, ...]:
    """Bytes of known values that are held when each step begins; see :func:`plan_cost`.

    With ``ahead`` a variant's prologue runs before its first step for all of them.
    """
    lasting = sum(known.spec.nbytes(symbols) for known in request_values(graphs))
    held = [lasting] * plan.steps
    for step in graphs:
        row, steps = _row_bytes(step, symbols), step.variant.steps
        for now in range(steps[0], plan.steps):
            held[now] += row * (sum(s >= now for s in steps) if ahead else now in steps)
    return tuple(held)


def _row_bytes(step: StepGraph, symbols: Mapping[str, int]) -> int:
    """Of the values known per step, for one step."""
    return sum(k.spec.nbytes(symbols) for k in step.known if k.binding is Binding.STEP)


def predict_peaks(
    plan: Plan,
    graphs: Sequence[StepGraph],
    cost: PlanCost,
    *,
    compiled: bool,
    calls: SizedCalls | None = None,
) -> tuple[int, ...]:
    """Most bytes in use at a time during each step: weights, inputs, slots, known values and work.

    The steps of a variant are taken for as large as the one that recomputes the most tokens. With
    ``compiled`` the backend fuses operators and computes known values ahead of time.
    """
    symbols, calls = cost.symbols, calls or SizedCalls()
    known = known_bytes(plan, graphs, symbols, ahead=compiled)
    work, before = [], {}
    for step in graphs:
        steps = step.variant.steps
        tokens = max((token_sizes(step, s) for s in steps), key=lambda found: sum(found.values()))
        sizes = {**symbols, **tokens}
        work.append(working_bytes(step.module, sizes, fused=compiled, calls=calls)[0])
        if step.prologue is not None:
            most, made = working_bytes(step.prologue, symbols, calls=calls)
            row, first, count = _row_bytes(step, symbols), steps[0], len(steps) if compiled else 1
            # Ahead of time, rows are copied out of what was computed for all steps, table by table.
            table = max(k.spec.nbytes(symbols) for k in step.known if k.binding is Binding.STEP)
            most = max(most, made + table) if compiled else most
            before[first] = known[first] + count * (most - row)
    inputs = sum(
        TensorSpec.of(node.meta["val"]).nbytes(symbols)
        for node in graphs[0].inputs[: graphs[0].model_inputs]
    )
    kept = (0, *cost.cache_bytes)
    return tuple(
        cost.weight_bytes + inputs + kept[s] + max(known[s] + work[v], before.get(s, 0))
        for s, v in enumerate(plan.variant_of)
    )


def working_bytes(
    module: fx.GraphModule,
    symbols: Mapping[str, int],
    *,
    fused: bool = False,
    calls: SizedCalls | None = None,
) -> tuple[int, int]:
    """Most bytes that one call of a graph allocates at a time, and bytes of its outputs.

    Inputs and weights are the caller's, views take nothing, and a value is freed after its last
    use. Operators run one by one; what one allocates within itself is not known here. With
    ``fused``, what is computed element by element is not stored where all that use it can compute
    it themselves, and takes the place of an input of its size that is needed no more: roughly what
    inductor does.
    """
    held = {node: blocks for node, blocks, _ in (calls or SizedCalls()).run(module, symbols)}
    nodes = list(module.graph.nodes)
    inlined = {n for n in nodes if fused and _is_pointwise(n) and all(map(_fuses, n.users))}
    reads: dict[fx.Node, set[int]] = {}  # storages, through what is inlined
    for node in nodes:
        reads[node] = set() if node in inlined else set(held.get(node, ()))
        for used in node.all_input_nodes:
            reads[node] |= reads[used] if used in inlined else held[used].keys()
    last = {storage: node for node in nodes if node not in inlined for storage in reads[node]}
    given = {s for node in nodes if node.op in ("placeholder", "get_attr") for s in held[node]}
    live: dict[int, int] = {}
    most = 0
    for node in nodes:
        if node.op != "call_function" or node in inlined:
            continue
        new = {s: n for s, n in held[node].items() if s not in given and s not in live}
        for size in new.values() if fused and _is_pointwise(node) else ():
            spare = [s for s, n in live.items() if n == size and last[s] is node]
            if spare:
                del live[spare[0]]
        live |= new
        most = max(most, sum(live.values()))
        live = {s: n for s, n in live.items() if last[s] is not node}
    return most, sum(live.values())


def moved_bytes(module: fx.GraphModule, symbols: Mapping[str, int]) -> int:
    """Bytes that one call of a graph must read and write at least.

    They are those of weights and inputs that it uses, and of its outputs; not of a table in which
    it looks things up, of which it need not read much.
    """
    [output] = module.graph.find_nodes(op="output")
    read = {
        (node.op, node.target): node
        for node in module.graph.nodes
        if node.op in ("placeholder", "get_attr")
        and any(u.target is not _LOOK_UP or u.args[0] is not node for u in node.users)
    }
    moved = {*read.values(), *output.all_input_nodes}
    return sum(TensorSpec.of(node.meta["val"]).nbytes(symbols) for node in moved)


def storages(values: Sequence[Any]) -> dict[int, int]:
    """Key and bytes of each distinct memory block that is behind tensors, or tuples of these."""
    blocks = (t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor))
    return {block._cdata: block.nbytes() for block in blocks}


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _ROWWISE


def _fuses(node: fx.Node) -> bool:
    return _is_pointwise(node) or torch.Tag.reduction in getattr(node.target, "tags", ())


_LOOK_UP = torch.ops.aten.embedding.default
# Element by element but for a few numbers a row.
_ROWWISE = {
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
    torch.ops.aten._to_copy.default,
}


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
    module: fx.GraphModule,
    symbols: Mapping[str, int],
    token_symbols: Sequence[str] = (),
    calls: SizedCalls | None = None,
) -> FlopCount:
    """FLOPs of one call, from shapes alone: nothing is computed and no weight is touched.

    Args:
        module: the graph.
        symbols: a size for every other shape symbol.
        token_symbols: symbols of numbers of recomputed tokens. What is done for such tokens is
            done one by one, so its cost is counted for one and multiplied.
        calls: what is known of calls, to be shared by several graphs.
    """
    fixed, per_token = 0, dict.fromkeys(token_symbols, 0)
    for one in node_flops(module, symbols, token_symbols, calls).values():
        if one.tokens:
            per_token[one.tokens] += one.count
        else:
            fixed += one.count
    return FlopCount(fixed, per_token)


def node_flops(
    module: fx.GraphModule,
    symbols: Mapping[str, int],
    token_symbols: Sequence[str] = (),
    calls: SizedCalls | None = None,
) -> dict[str, NodeFlops]:
    """The FLOPs of each node that has any; see :func:`count_flops`."""
    sizes = {**symbols, **dict.fromkeys(token_symbols, 1)}
    found = {}
    for node, _, spent in (calls or SizedCalls()).run(module, sizes):
        if spent:
            chosen = _symbols_of(node) & set(token_symbols) if token_symbols else ()
            found[node.name] = NodeFlops(spent, next(iter(chosen), ""))
    return found


def _symbols_of(node: fx.Node) -> set[str]:
    value = node.meta["val"]
    return TensorSpec.of(value).symbols() if isinstance(value, Tensor) else set()


def _token_inputs(step: StepGraph) -> Iterator[tuple[str, StepConstant]]:
    """(symbol, constant) of every number of tokens among a graph's inputs."""
    for node in step.inputs:
        constant = node.meta.get(CONSTANT)
        if constant is not None and constant.kind is ConstantKind.TOKENS:
            yield str(node.meta["val"].shape[0]), constant


def token_symbols(step: StepGraph) -> list[str]:
    """The symbols of numbers of tokens that a graph recomputes."""
    return [symbol for symbol, _ in _token_inputs(step)]


def token_sizes(graph: StepGraph, step: int) -> dict[str, int]:
    """Symbol -> how many tokens a step recomputes."""
    return {symbol: len(constant.values[step]) for symbol, constant in _token_inputs(graph)}
