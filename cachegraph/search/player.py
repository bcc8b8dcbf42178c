"""Run many schedules on one model: graphs that are alike are made once, equal beginnings run once.

A graph depends on what its steps do and not on which steps these are, so candidates that differ in
their full steps share all graphs. And samplers are deterministic, so what a step returned holds for
every schedule that did the same up to that step.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.calibrate.recorder import NamedBranches
from cachegraph.compiler.pipeline import module_weights, rewrite
from cachegraph.compiler.program import make_program, named_prologues
from cachegraph.graph.step_graph import CONSTANT, StepGraph, copy_module
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.cost import PlanCost
from cachegraph.plan.plan import Plan
from cachegraph.plan.variant import Variant
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.program import Made, Program
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.session import Session
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import Schedule

_NO_COST = PlanCost({}, (), 0, (), (), 0)
_REMEMBERED = 1 << 30  # bytes of outputs and kept values


@dataclass
class _Result:
    """What a step returned, and the values that it made."""

    outputs: tuple[Tensor, ...]
    made: dict[Made, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.outputs, *self.made.values()))


class _Memory(OrderedDict[tuple[Any, ...], _Result]):
    """Results by what led to them; the ones that were not used for longest are forgotten."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.held = limit, 0

    def recall(self, key: tuple[Any, ...]) -> _Result | None:
        found = self.get(key)
        if found is not None:
            self.move_to_end(key)
        return found

    def keep(self, key: tuple[Any, ...], result: _Result) -> None:
        self[key] = result
        self.held += result.nbytes
        while self.held > self.limit:
            self.held -= self.popitem(last=False)[1].nbytes


class _Remembering(Session):
    """A session that runs no step whose result is known."""

    def __init__(self, runner: Runner, memory: _Memory, keys: Sequence[int], seed: int) -> None:
        super().__init__(runner)
        self.memory, self.keys, self.seed = memory, keys, seed
        self.behind: set[str] = set()  # branches whose values are those of an earlier step

    def _outputs(self, branch: Any, step: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        name, beforehand = self._branch_name, branch.known[branch.runner]
        if step == 0:
            beforehand.begin(inputs)
            branch.values.clear()
        known = self.memory.recall((self.seed, name, self.keys[step]))
        if known is not None:
            branch.values.update(known.made)
            return known.outputs
        before = set(branch.values)
        taken = beforehand.at(step, inputs)
        outputs = tuple(self._runner.run_step(step, inputs, branch.values, taken))
        made = {key: branch.values[key] for key in branch.values.keys() - before}
        self.memory.keep((self.seed, name, self.keys[step]), _Result(outputs, made))
        return outputs


class Watched(NamedBranches, nn.Module):
    """The uncached model, for a sampler; it sees how it is called. All else is the model's.

    Attributes:
        call: arguments of the first call.
        calls: how many there were, by branch.
        seconds: spent in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype, self.device = next((p.dtype, p.device) for p in model.parameters())
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self.call = self.call or (args, kwargs)
        self.calls[self._name] += 1
        began = time.perf_counter()
        result = self.model(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result


class Player:
    """Samples images under schedules.

    Args:
        model: in eval mode.
        args: of a call, as the sampler makes it.
        kwargs: of a call.
        remember: bytes that results of steps may take.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        remember: int = _REMEMBERED,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.traced: TracedModel = trace(model, args, kwargs)
        self.weights = module_weights(self.traced)
        self._graphs: dict[tuple[Any, ...], StepGraph] = {}
        self._memory = _Memory(remember)

    def runner(self, schedule: Schedule, seed: int) -> Runner:
        """Something to call as the model in the sampler, for one trajectory."""
        plan = plan_of(schedule, self.traced)
        graphs = self._graphs_of(plan)
        program = _keeping(make_program(self.traced, schedule, plan, graphs, _NO_COST))
        before = Prologues.of(program, named_prologues(graphs), batched=False)
        functions = [graph.module for graph in graphs]
        runner = Runner(program, functions, self.weights, prologues=before)
        runner._session = _Remembering(runner, self._memory, _prefixes(plan), seed)
        _give_back()
        return runner

    def _graphs_of(self, plan: Plan) -> list[StepGraph]:
        missing = [v for v in plan.variants if _key(plan, v) not in self._graphs]
        made = rewrite(self.traced, replace(plan, variants=tuple(missing)), weights=self.weights)
        for variant, graph in zip(missing, made, strict=True):
            self._graphs[_key(plan, variant)] = graph
        return [_with(self._graphs[_key(plan, v)], v) for v in plan.variants]


def _give_back() -> None:
    """Hand freed memory back to the system.

    What is remembered is small and lies between much that was freed: after some hundred
    trajectories the C library holds many times what is in use.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)


def _key(plan: Plan, variant: Variant) -> tuple[Any, ...]:
    """What decides a graph: the sites, what is done at each, what is handed out and comes in."""
    kinds = tuple((type(a).__name__, len(getattr(a, "sources", ()))) for a in variant.row)
    sites = tuple((site.name, site.relative) for site in plan.sites)
    constants = tuple((c.name, c.sites, c.kind) for c in variant.constants)
    shape = plan.selection, plan.order_depth
    return sites, kinds, variant.writes, variant.extras, constants, shape


def _with(graph: StepGraph, variant: Variant) -> StepGraph:
    """The graph for other steps that do the same."""
    copied = replace(graph, module=copy_module(graph.module), variant=variant)
    constants = {constant.name: constant for constant in variant.constants}
    for node in copied.inputs:
        if CONSTANT in node.meta:
            node.meta[CONSTANT] = constants[node.meta[CONSTANT].name]
    return copied


def _keeping(program: Program) -> Program:
    """Whatever is handed out stays: another schedule may need it later than this one."""
    steps = []
    for step in program.steps:
        writes = program.variants[step.variant].interface.writes
        steps.append(replace(step, keeps=frozenset(port.name for port in writes), frees=()))
    return replace(program, steps=tuple(steps))


def _prefixes(plan: Plan) -> list[int]:
    """For each step, a number that stands for all that was done up to it."""
    sites = tuple((site.name, site.relative) for site in plan.sites)
    found, last = [], hash((sites, plan.selection, plan.order_depth))
    for step, row in enumerate(plan.rows):
        variant = plan.variants[plan.variant_of[step]]
        last = hash((last, row, variant.writes, variant.extras))
        found.append(last)
    return found
