"""A compiled denoising loop as data: what a runner needs, free of the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cachegraph.graph.interface import Interface
from cachegraph.model.contents import Contents
from cachegraph.model.items import Items
from cachegraph.model.signature import CallSignature
from cachegraph.model.site import Site
from cachegraph.plan.action import Row
from cachegraph.plan.cost import PlanCost
from cachegraph.plan.plan import Plan, make_plan
from cachegraph.plan.selection import Selection

Made = tuple[str, int]  # slot, step that made the tensor in it


@dataclass(frozen=True)
class Step:
    """One step of a trajectory.

    Attributes:
        variant: index of the graph that it runs.
        slots: slot input -> the step that made its tensor.
        constants: step constant -> its numbers, nested as the tensor is.
        keeps: names of the writes that a later step uses.
        frees: what nothing needs afterwards.
    """

    variant: int
    slots: Mapping[str, int]
    constants: Mapping[str, Any]
    keeps: frozenset[str]
    frees: tuple[Made, ...]


@dataclass(frozen=True)
class VariantLayout:
    """How a variant is called.

    Attributes:
        name: of the variant.
        interface: of its graph.
        prologue: interface of what computes the known values of one step, where there are any.
        step_by_step: why known values cannot be computed for several steps at once; empty where
            they can.
    """

    name: str
    interface: Interface
    prologue: Interface | None = None
    step_by_step: str = ""


@dataclass(frozen=True)
class OtherPlan:
    """Another plan for the same model: of a program, what it has of its own.

    Attributes:
        sites: see :class:`Program`, as for all that follows.
        rows: what each step does at each site.
        selection: how tokens are chosen.
        cost: predicted.
        steps: their variants are those of the program that it stands beside.
        lasting: inputs that must stay the same.
        timesteps: the sampler's.
        ascending: time grows.
    """

    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    selection: Selection | None
    cost: PlanCost
    steps: tuple[Step, ...]
    lasting: tuple[int, ...]
    timesteps: tuple[float, ...] | None
    ascending: bool


@dataclass(frozen=True)
class Program:
    """Everything but graphs and weights.

    Attributes:
        sites: every site of the model, in execution order.
        rows: what each step does at each site.
        selection: how tokens are chosen, where some are refreshed.
        cost: what a trajectory costs, predicted.
        steps: what each step does.
        variants: how the graphs are called.
        request: interface of what computes the values that no step changes, where there are any.
        signature: how the model is called.
        lasting: indices of the model's inputs that known values depend on and that must therefore
            stay the same throughout a trajectory.
        batch: the symbol that stands for the batch, or None where it is fixed.
        symbols: shape symbols with the sizes that the model was traced with.
        timesteps: the sampler's, one a step, or None.
        ascending: time grows along a trajectory.
        config: the model's own configuration, as plain data.
        conditions: on the sizes of a call, such as ``s0 <= 3``; elsewhere the graphs are not the
            model.
        varying: inputs that were said to differ from step to step.
        disabled: names of exact optimisations that were left out.
        contents: of inputs, which the model reads: for others the graphs are not the model.
        items: how a call is taken apart where the graphs are of one item of the batch.
        names: symbol -> what people call it: ``batch``, ``height``, or ``axis0_img_ids``.
    """

    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    selection: Selection | None
    cost: PlanCost
    steps: tuple[Step, ...]
    variants: tuple[VariantLayout, ...]
    request: Interface | None
    signature: CallSignature
    lasting: tuple[int, ...]
    batch: str | None
    symbols: Mapping[str, int]
    timesteps: tuple[float, ...] | None
    ascending: bool
    config: Mapping[str, Any]
    conditions: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    contents: tuple[Contents, ...] = ()
    items: Items | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def with_plan(self, other: OtherPlan) -> Program:
        """The program of another plan, over the same graphs."""
        own = {one.name: getattr(other, one.name) for one in fields(other)}
        return replace(self, **own)

    def without_others(self) -> Program:
        """The program of its plan alone: graphs that only other plans run are left out."""
        used = list(dict.fromkeys(step.variant for step in self.steps))  # as a plan numbers them
        place = {variant: number for number, variant in enumerate(used)}
        return replace(
            self,
            steps=tuple(replace(step, variant=place[step.variant]) for step in self.steps),
            variants=tuple(self.variants[variant] for variant in used),
        )

    @property
    def plan(self) -> Plan:
        """The plan that the program carries out."""
        return make_plan(self.sites, self.rows, selection=self.selection)

    def layout(self, step: int) -> VariantLayout:
        """How the graph of a step is called."""
        return self.variants[self.steps[step].variant]

    def batch_dims(self) -> dict[str, int]:
        """Slot -> which dimension of its values is the batch; without slots where none is."""
        ports = (port for v in self.variants for port in v.interface.writes)
        shapes = {port.of: port.spec.shape for port in ports}
        return {
            slot: shape.index(self.batch)
            for slot, shape in shapes.items()
            if self.batch is not None and shape.count(self.batch) == 1
        }
