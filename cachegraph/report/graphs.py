"""Graphs as plain data: folded, with what each input is for and where each node comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegraph.graph.interface import Interface, Port, Role
from cachegraph.plan.slot import ConstantKind, Slot, StepConstant
from cachegraph.plan.variant import Variant
from cachegraph.show.fold import Folding, Line, fold_ports, port_label
from cachegraph.show.picture import common_name, steps_text
from cachegraph.show.view import View

from .costs import SiteFlops

# What a node has to do with the cache, one letter each.
READS, WRITES, KNOWN, SLICED, TOKENS = "r", "w", "k", "s", "t"
_PASSES = {"slice-columns": SLICED, "gather-tokens": TOKENS}
_ROLES = {Role.SLOT: READS, Role.REQUEST: KNOWN, Role.STEP: KNOWN}
_MOST_NUMBERS = 4  # that are told step by step
_USES = re.compile(r"%(\w+)")


@dataclass
class Graphs:
    """The graphs of a view.

    Attributes:
        view: whose graphs.
        folding: of all of them.
        site_flops: of every variant.
    """

    view: View
    folding: Folding
    site_flops: SiteFlops
    _forms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, view: View) -> Graphs:
        """Those of a view."""
        return cls(view, view.folding, SiteFlops.of(view))

    def variant(self, index: int) -> dict[str, Any]:
        """A variant: its steps, what goes in and out, its nodes, and what the passes did."""
        view = self.view
        variant, interface = view.plan.variants[index], view.interfaces[index]
        passes = [p for p in view.source.provenance.passes if p.variant == variant.name]
        prologue = f"{variant.name}-prologue"
        return {
            "name": variant.name,
            "steps": list(variant.steps),
            "flops": round(view.cost.mean_flops(variant.steps)),
            "inputs": list(_folded(interface.inputs, variant)),
            "outputs": list(_folded(interface.outputs, variant)),
            "sections": self.sections(variant.name, interface),
            "prologue": prologue if prologue in view.prologues else None,
            "passes": [
                {
                    "name": one.pass_name,
                    "rewrites": one.rewrites,
                    "nodes": list(one.nodes),
                    "removed": list(one.removed),
                }
                for one in passes
            ],
        }

    def sections(self, name: str, interface: Interface | None = None) -> list[dict[str, Any]]:
        """The nodes of a graph by block; blocks that are alike once, with the first one's nodes.

        Args:
            name: of a variant or prologue.
            interface: of a variant: says which inputs are slots and which outputs are writes.
        """
        inputs = {p.name: _ROLES.get(p.role, "") for p in interface.inputs} if interface else {}
        writes = _writes(self.folding, name, interface) if interface else set()
        flops = self.view.source.provenance.flops.get(name, {})
        return [
            {
                "label": section.label,
                "blocks": list(section.blocks),
                "nodes": [
                    self._node(line, section.blocks[0], inputs, writes)
                    | ({"flops": cost.count} if (cost := flops.get(line.name)) else {})
                    | ({"tokens": cost.tokens} if cost and cost.tokens else {})
                    for line in section.lines
                ],
            }
            for section in self.folding.sections(name)
        ]

    def _node(
        self, line: Line, block: str, inputs: dict[str, str], writes: set[str]
    ) -> dict[str, Any]:
        marks = {inputs.get(used, "") for used in _USES.findall(line.text)}
        marks.add(WRITES if line.name in writes else "")
        marks.add(_PASSES.get(line.made_by.partition(", ")[0], ""))
        node = {
            "name": line.name,
            "alike": line.alike,
            "form": self._forms.setdefault(line.form, len(self._forms)),
            "module": line.module.removeprefix(block).removeprefix("."),
            "text": line.text,
            "spec": line.spec,
            "made_by": line.made_by,
            "marks": "".join(sorted(marks)),
        }
        return {key: value for key, value in node.items() if value != ""}


def _writes(folding: Folding, name: str, interface: Interface) -> set[str]:
    """The nodes that a variant hands out to be kept."""
    returned: Any = folding.graphs[name].output_node().args[0]
    pairs = zip(returned, interface.outputs, strict=True)
    return {node.name for node, port in pairs if port.role is Role.WRITE}


def _folded(ports: Sequence[Port], variant: Variant) -> Iterator[dict[str, Any]]:
    """Ports that are alike as one."""
    constants = {constant.name: constant for constant in variant.constants}
    for group in fold_ports(ports):
        names = [port.name for port in group]
        yield {
            "label": port_label(names),
            "names": names,
            "spec": str(group[0].spec),
            "role": str(group[0].role),
            "why": _why(group, [constants[n] for n in names if n in constants]),
        }


_PARTS = {
    "order": "which of its tokens to recompute in the steps that follow, best first",
    "age": "for how many steps each of its tokens was not recomputed",
    "score": "the score of each of its tokens",
}


def _why(ports: Sequence[Port], constants: Sequence[StepConstant]) -> str:
    """What an input or output is for, in a sentence."""
    role, of = ports[0].role, [port.of for port in ports]
    match role:
        case Role.MODEL:
            return "The model's own."
        case Role.CONSTANT if constants:
            return _constant(constants)
        case Role.REQUEST:
            return "Known before the first step and the same at every step: computed once."
        case Role.STEP:
            return (
                "Known before the first step, for the timesteps are: the prologue computes it for "
                "all steps at once."
            )
    slot = Slot.of(of[0], ports[0].age, ports[0].spec)
    sites = common_name([Slot.of(key, 0, ports[0].spec).site for key in of])
    extra = of[0].rpartition(":")[2]
    kept = _PARTS[extra] if extra in _PARTS and ":" in of[0] else "its value"
    if role is Role.WRITE:
        return f"Kept for later steps: of {sites}, {kept}."
    age = "" if slot.age == 0 else f", the one made {slot.age} before the newest"
    return f"Made by an earlier step and kept since: of {sites}, {kept}{age}."


def _constant(constants: Sequence[StepConstant]) -> str:
    """What a step constant says, and how it differs from step to step."""
    one = constants[0]
    sites = common_name([name for constant in constants for name in constant.sites])
    steps = list(one.values)
    match one.kind:
        case ConstantKind.TOKENS:
            rule = (
                f"How many tokens {sites} recompute: it holds the numbers 0 to k - 1. k differs "
                "from step to step; as it comes in as a size, all of these steps share one graph. "
            )
            first = f"For {one.sites[0]}, k is " if len(constants) > 1 else "k is "
            return rule + first + _by_step({step: len(n) for step, n in one.values.items()})
        case ConstantKind.COEFFICIENTS:
            return (
                f"The weights of the kept values that a forecast of {sites} sums; they differ from "
                f"step to step, so they come in as numbers (steps {steps_text(steps)})."
            )
        case ConstantKind.AGE:
            ages = {step: numbers[0] for step, numbers in one.values.items()}
            said = f"How many partial steps of {sites} came before this one: "
            return said + _by_step({step: int(str(age)) for step, age in ages.items()})
        case ConstantKind.STEP:
            return f"The number of the step, from which the random scores of {sites} are drawn."
        case ConstantKind.COUNTS:
            return f"How many tokens {sites} will recompute in each partial step that follows."
    return ""


def _by_step(numbers: Mapping[int, int]) -> str:
    """Such as: 91 at steps 1 4, 88 at step 2."""
    steps: dict[int, list[int]] = {}
    for step, number in numbers.items():
        steps.setdefault(number, []).append(step)
    words = [
        f"{number} at step{'s' * (len(found) > 1)} {steps_text(found)}"
        for number, found in steps.items()
    ]
    more = f" and {len(words) - _MOST_NUMBERS} other numbers" if words[_MOST_NUMBERS:] else ""
    return ", ".join(words[:_MOST_NUMBERS]) + more + "."
