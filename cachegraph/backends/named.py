"""Lowered graphs with a name for everything that goes in and out.

Backends that compile ahead of time write files that others may run too, so inputs and outputs are
found there by name, and sizes that vary have names of their own: ``batch``, and ``k_tokens0`` for
how many tokens the step constant ``tokens0`` lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from cachegraph.graph.serialise import SPEC
from cachegraph.lazy import LazyMapping
from cachegraph.plan.slot import Slot
from cachegraph.runtime.program import Program
from cachegraph.spec import TensorSpec

BATCH = "batch"


@dataclass(frozen=True)
class NamedGraph:
    """One graph to compile.

    Attributes:
        module: lowered graph; its weights are attributes under the names of the weight store.
        inputs: name -> spec, in the order of the graph's inputs: the model's, slots that are read,
            step constants, known values. A symbolic size is an expression in the keys of ``sizes``.
        outputs: name -> spec, in the order of the graph's outputs: the model's, then writes.
        sizes: name of a varying size -> every value that it is known to take, the largest first.
            Of the batch only the traced one is known.
    """

    module: fx.GraphModule
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    sizes: Mapping[str, tuple[int, ...]]

    def example_sizes(self) -> dict[str, int]:
        """The largest known value of every varying size, but 2 at least: see ``export_graph``."""
        return {name: max(values[0], 2) for name, values in self.sizes.items()}

    def sizes_of(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """What the varying sizes are in a call with these inputs."""
        return {
            dim: size
            for spec, tensor in zip(self.inputs.values(), tensors, strict=True)
            for dim, size in zip(spec.shape, tensor.shape, strict=True)
            if isinstance(dim, str) and dim.isidentifier()
        }


def named_graphs(program: Program, graphs: Sequence[fx.GraphModule]) -> Mapping[str, NamedGraph]:
    """Every graph of a program by its name.

    Args:
        program: says how the graphs are called.
        graphs: one a variant, lowered.
    """
    indices = {layout.name: index for index, layout in enumerate(program.variants)}
    return LazyMapping(indices, lambda name: _named(program, indices[name], graphs[indices[name]]))


def _named(program: Program, variant: int, module: fx.GraphModule) -> NamedGraph:
    placeholders = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]
    inputs = dict(zip(placeholders, program.variants[variant].inputs, strict=True))
    sizes = _sizes(program, variant, inputs)
    labels = _labels(program, inputs, sizes)
    names = _output_names(program, variant, inputs)
    return NamedGraph(
        module,
        {name: spec.renamed(labels) for name, spec in inputs.items()},
        {
            name: _spec_of(node).renamed(labels)
            for name, node in zip(names, _returned(module), strict=True)
        },
        {labels.get(symbol, symbol): values for symbol, values in sizes.items()},
    )


def named_prologues(
    program: Program, modules: Mapping[str, fx.GraphModule]
) -> dict[str, NamedGraph]:
    """The graphs of what is known beforehand; an output is called as the input that takes it.

    Args:
        program: says how the model is called.
        modules: by name, over the model's inputs.
    """
    found = {}
    labels = {program.batch: BATCH} if program.batch else {}
    for name, module in modules.items():
        placeholders = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]
        specs = [spec for _, spec in program.signature.inputs]
        symbols = set().union(*(spec.symbols() for spec in specs))
        returned: dict[str, fx.Node] = {}
        for node in _returned(module):
            value: Any = node.args[0]
            returned[f"known_{value.name}"] = node
        found[name] = NamedGraph(
            module,
            {k: s.renamed(labels) for k, s in zip(placeholders, specs, strict=True)},
            {key: _spec_of(node).renamed(labels) for key, node in returned.items()},
            {labels.get(s, s): (size,) for s, size in program.symbols.items() if s in symbols},
        )
    return found


def _sizes(
    program: Program, variant: int, inputs: Mapping[str, TensorSpec]
) -> dict[str, tuple[int, ...]]:
    """Values of every symbol: as traced, or as the step constants of the variant's steps say."""
    specs = list(inputs.values())
    symbols = set().union(*(spec.symbols() for spec in specs))
    found = {s: {size} for s, size in program.symbols.items() if s in symbols}
    for entry in program.steps:
        if entry.variant != variant:
            continue
        end = len(specs) - len(program.variants[variant].known)
        constants = specs[end - len(entry.constants) : end]
        for numbers, spec in zip(entry.constants, constants, strict=True):
            for dim, size in zip(spec.shape, _shape(numbers), strict=True):
                if isinstance(dim, str):
                    found.setdefault(dim, set()).add(size)
    return {symbol: tuple(sorted(values, reverse=True)) for symbol, values in found.items()}


def _shape(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list | tuple):
        return ()
    return (len(numbers), *(_shape(numbers[0]) if numbers else ()))


def _labels(
    program: Program, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, Any]
) -> dict[str, str]:
    """Symbol -> the name that a reader knows it by."""
    labels = {program.batch: BATCH} if program.batch else {}
    for name, spec in inputs.items():
        for dim in spec.shape:
            if isinstance(dim, str) and dim in sizes and dim not in program.symbols:
                labels.setdefault(dim, f"k_{name}")
    return labels


def _output_names(program: Program, variant: int, inputs: Mapping[str, TensorSpec]) -> list[str]:
    """``out`` (``out0`` and so on where there are several), ``write_blocks_3_attn_0``."""
    count = len(program.signature.outputs)
    wanted = ["out"] if count == 1 else [f"out{i}" for i in range(count)]
    for site, value in program.variants[variant].writes:
        slot = Slot(program.sites[site].name, value, 0, program.sites[site].values[0].spec)
        wanted.append(f"write_{slot.label}")
    taken = set(inputs)
    unique = []
    for name in wanted:
        while name in taken:
            name += "_"
        taken.add(name)
        unique.append(name)
    return unique


def _returned(module: fx.GraphModule) -> tuple[fx.Node, ...]:
    [output] = module.graph.find_nodes(op="output")
    nodes: Any = output.args[0]
    return tuple(nodes)


def _spec_of(node: fx.Node) -> TensorSpec:
    """Of a node in memory, or of one that was read from an artifact."""
    if "val" in node.meta:
        return TensorSpec.of(node.meta["val"])
    return TensorSpec.parse(node.meta[SPEC])
