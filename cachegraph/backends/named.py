"""Lowered graphs with a name for everything that goes in and out.

Backends that compile ahead of time write files that others may run too, so inputs and outputs are
found there by name, and sizes that vary have names of their own: ``batch``, and ``k_tokens0`` for
how many tokens the step constant ``tokens0`` lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from cachegraph.graph.interface import Interface, Port
from cachegraph.lazy import LazyMapping
from cachegraph.runtime.known import REQUEST, prologue_name
from cachegraph.runtime.program import Program
from cachegraph.spec import TensorSpec

COUNT = "k_"  # before the name of a step constant: how many tokens it lists


@dataclass(frozen=True)
class NamedGraph:
    """One graph to compile.

    Attributes:
        module: lowered graph; its weights are attributes under the names of the weight store.
        interface: what it takes and returns. A symbolic size is an expression in the keys of
            ``sizes``.
        sizes: name of a varying size -> every value that it is known to take, the largest first.
            Of the batch only the traced one is known.
    """

    module: fx.GraphModule
    interface: Interface
    sizes: Mapping[str, tuple[int, ...]]

    @cached_property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec, in the order of the graph's inputs."""
        return {port.name: port.spec for port in self.interface.inputs}

    @cached_property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec, in the order of the graph's outputs."""
        return {port.name: port.spec for port in self.interface.outputs}

    def example_sizes(self) -> dict[str, int]:
        """The largest known value of every varying size, but 2 at least: see ``export_graph``."""
        return {name: max(values[0], 2) for name, values in self.sizes.items()}

    def empty_outputs(self, given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Room for the outputs of a call with these inputs."""
        sizes, specs = self.sizes_of(given), self.outputs.values()
        return [torch.empty(s.sizes(sizes), dtype=s.dtype, device=device) for s in specs]

    def sizes_of(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """What the varying sizes are in a call with these inputs."""
        return {
            dim: size
            for port, tensor in zip(self.interface.inputs, tensors, strict=True)
            for dim, size in zip(port.spec.shape, tensor.shape, strict=True)
            if isinstance(dim, str) and dim.isidentifier()
        }


def named_graphs(program: Program, graphs: Sequence[fx.GraphModule]) -> Mapping[str, NamedGraph]:
    """Every graph of a program by its name.

    Args:
        program: says how the graphs are called.
        graphs: one a variant, lowered.
    """
    indices = {layout.name: index for index, layout in enumerate(program.variants)}

    def make(name: str) -> NamedGraph:
        index = indices[name]
        sizes = _sizes(program, index)
        return _named(program, graphs[index], program.variants[index].interface, sizes)

    return LazyMapping(indices, make)


def named_prologues(
    program: Program, modules: Mapping[str, fx.GraphModule]
) -> dict[str, NamedGraph]:
    """The graphs of what is known beforehand; an output is called as the input that takes it.

    Args:
        program: says how the model is called.
        modules: by name, over the model's inputs.
    """
    own = {prologue_name(v.name): v.prologue for v in program.variants}
    interfaces = {REQUEST: program.request, **own}
    found = {}
    for name, module in modules.items():
        interface = interfaces[name]
        if interface is not None:
            sizes = {s: (program.symbols[s],) for s in _symbols(interface) & {*program.symbols}}
            found[name] = _named(program, module, interface, sizes)
    return found


def _named(
    program: Program,
    module: fx.GraphModule,
    interface: Interface,
    sizes: Mapping[str, tuple[int, ...]],
) -> NamedGraph:
    """The graph with its varying sizes called as a reader knows them."""
    labels = dict(program.names)
    for port in interface.constants:
        for dim in port.spec.shape:
            if isinstance(dim, str) and dim in sizes and dim not in program.symbols:
                labels.setdefault(dim, f"{COUNT}{port.name}")

    def renamed(ports: Sequence[Port]) -> tuple[Port, ...]:
        return tuple(replace(port, spec=port.spec.renamed(labels)) for port in ports)

    return NamedGraph(
        module,
        Interface(renamed(interface.inputs), renamed(interface.outputs)),
        {labels.get(symbol, symbol): values for symbol, values in sizes.items()},
    )


def _symbols(interface: Interface) -> set[str]:
    return {symbol for port in interface.inputs for symbol in port.spec.symbols()}


def _sizes(program: Program, variant: int) -> dict[str, tuple[int, ...]]:
    """Values of every symbol: as traced, or as the step constants of the variant's steps say."""
    interface = program.variants[variant].interface
    symbols = _symbols(interface)
    found = {s: {size} for s, size in program.symbols.items() if s in symbols}
    for entry in program.steps:
        if entry.variant != variant:
            continue
        for port in interface.constants:
            shape = np.shape(entry.constants[port.name])
            for dim, size in zip(port.spec.shape, shape, strict=True):
                if isinstance(dim, str):
                    found.setdefault(dim, set()).add(size)
    return {symbol: tuple(sorted(values, reverse=True)) for symbol, values in found.items()}
