"""Several plans or forms of call in one artifact: weights once, graphs of plans if equal once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, fx

from cachegraph.artifact.artifact import Artifact
from cachegraph.artifact.data import to_data
from cachegraph.errors import ScheduleError
from cachegraph.graph.interface import Role
from cachegraph.graph.provenance import NodeFlops, PassRecord, Provenance
from cachegraph.graph.step_graph import merge_prologues
from cachegraph.model.trace import TracedModel
from cachegraph.runtime.known import REQUEST, prologue_name
from cachegraph.runtime.program import OtherPlan, Program, VariantLayout

from .program import prologue_interface


def join(artifacts: Mapping[str, Artifact]) -> Artifact:
    """One artifact of several plans; the first one is run where no other is asked for.

    Args:
        artifacts: by name, in memory, of one traced model and for one backend.

    Raises:
        ScheduleError: a name that no file can have.
    """
    for name in artifacts:
        if not re.fullmatch(r"[\w.+-]+", name):
            expected = "letters, digits and any of . + - _"
            raise ScheduleError("not a name of a plan", expected=expected, found=repr(name))
    first = next(iter(artifacts.values()))
    if len(artifacts) == 1:
        return first
    union = _Union()
    plans = {}
    for name, artifact in artifacts.items():
        places = [union.add(artifact, index) for index in range(len(artifact.graphs))]
        plans[name] = artifact.schedule_text, _other(artifact.program, places)
    made = [a.prologues[REQUEST] for a in artifacts.values() if REQUEST in a.prologues]
    request = merge_prologues(made)
    program = replace(
        first.program.with_plan(next(iter(plans.values()))[1]),
        variants=tuple(union.layouts),
        request=prologue_interface(request, Role.REQUEST),
    )
    weights = {name: weight for one in artifacts.values() for name, weight in one.weights.items()}
    return replace(
        first,
        program=program,
        graphs=tuple(union.graphs),
        prologues=({REQUEST: request} if request is not None else {}) | union.prologues,
        texts=tuple(union.texts),
        weights=weights,
        compiled={},
        saved={},
        plans=plans,
        provenance_text=json.dumps(to_data(union.provenance(artifacts), Provenance)),
    )


def join_forms(artifacts: Sequence[Artifact]) -> Artifact:
    """One artifact for calls of several forms, each with all plans; weights are there once.

    Args:
        artifacts: one a form, in memory, of the same plans; weights of one name are the same.
    """
    weights = {name: weight for one in artifacts for name, weight in one.weights.items()}
    first, *others = (one.with_weights(weights) for one in artifacts)
    return replace(first, forms=tuple(others))


def with_own_names(traced: TracedModel, taken: Mapping[str, Tensor], number: int) -> None:
    """Give weights of a trace other names where another trace calls something else so.

    Tracing makes constants, such as tables of positions, and numbers them.

    Args:
        traced: the model; its graph is changed.
        taken: weights of the other traces.
        number: of this one, for the names.
    """
    module = traced.module
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        path, _, leaf = name.rpartition(".")
        holder = module.get_submodule(path)
        value = getattr(holder, leaf)
        if not isinstance(value, Tensor) or name not in taken or _same(value, taken[name]):
            continue
        own = f"{leaf}_form{number}"
        if not hasattr(holder, own):
            holder.register_buffer(own, value)
        node.target = f"{path}.{own}".removeprefix(".")


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return same or torch.equal(one, other)


class _Union:
    """The different graphs of several artifacts."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.layouts: list[VariantLayout] = []
        self.texts: list[str] = []
        self.prologues: dict[str, fx.GraphModule] = {}
        self._known: dict[tuple[str, object], int] = {}
        self._names: list[tuple[Provenance, str, str]] = []  # a graph's old name and its new one

    def add(self, artifact: Artifact, index: int) -> int:
        """The place of a variant's graph; an equal one's where there is one."""
        layout, text = artifact.program.variants[index], artifact.texts[index]
        head, _, body = text.partition("\n")
        key = body, replace(layout, name="")  # the line above says which steps run it
        if key in self._known:
            return self._known[key]
        place = self._known[key] = len(self.graphs)
        name = f"variant{place}"
        self._names.append((artifact.provenance, layout.name, name))
        self.graphs.append(artifact.graphs[index])
        self.layouts.append(replace(layout, name=name))
        self.texts.append(f"{name}{head.removeprefix(layout.name)}\n{body}")
        if (before := artifact.prologues.get(prologue_name(layout.name))) is not None:
            self.prologues[prologue_name(name)] = before
        return place

    def provenance(self, artifacts: Mapping[str, Artifact]) -> Provenance:
        """Where the nodes of all graphs come from."""
        modules, sites = dict[str, str](), dict[str, str]()
        made_by, flops = dict[str, dict[str, str]](), dict[str, dict[str, NodeFlops]]()
        for artifact in artifacts.values():
            known = artifact.provenance
            modules.update(known.modules)
            sites.update(known.sites)
            made_by.setdefault(REQUEST, {}).update(known.made_by.get(REQUEST, {}))
            flops.setdefault(REQUEST, {}).update(known.flops.get(REQUEST, {}))
        passes = list[PassRecord]()
        for known, old, new in self._names:
            for before, after in ((old, new), (prologue_name(old), prologue_name(new))):
                made_by[after] = dict(known.made_by.get(before, {}))
                flops[after] = dict(known.flops.get(before, {}))
            passes += [replace(one, variant=new) for one in known.passes if one.variant == old]
        return Provenance(modules, sites, made_by, flops, tuple(passes))


def _other(program: Program, places: Sequence[int]) -> OtherPlan:
    """What a program has of its own, with the union's graphs."""
    own = {field.name: getattr(program, field.name) for field in fields(OtherPlan)}
    own["steps"] = tuple(replace(step, variant=places[step.variant]) for step in program.steps)
    return OtherPlan(**own)
