"""Graphs folded for the eye: by module, and blocks that do the same only once.

A model has dozens of blocks that differ in names alone. Each node gets a name within its block that
is the same in all of them (``linear_17`` of ``blocks.3`` is ``linear#1``), so that blocks can be
compared with each other, and a block of one variant with the same one of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from cachegraph.graph.provenance import Provenance
from cachegraph.graph.serialise import spec_of
from cachegraph.graph.text import operation_name, operation_text

from .picture import common_name

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.|$)")  # up to the first number of a path
_INSIDE = re.compile(_BLOCK.pattern + r"(?=\.)")
_SYMBOL = re.compile(r"\b[su]\d+\b")


@dataclass(frozen=True)
class Line:
    """A node.

    Attributes:
        name: of the node.
        alike: its name within the block.
        module: path of the module that it belongs to; empty for the model itself.
        operation: name of the operator.
        text: the whole operation, as graphs are printed.
        spec: of its value; empty where it has none.
        made_by: the pass that made it and for which site; empty for what was traced.
        form: what it computes, whichever block it is in.
    """

    name: str
    alike: str
    module: str
    operation: str
    text: str
    spec: str
    made_by: str
    form: str


@dataclass(frozen=True)
class Section:
    """Blocks that do the same.

    Attributes:
        blocks: paths of the blocks, or of one module outside of blocks; empty for the model itself.
        lines: nodes of the first of them.
    """

    blocks: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def label(self) -> str:
        """``blocks.0-27``; ``model`` for what belongs to no module."""
        return common_name(self.blocks) if any(self.blocks) else "model"


@dataclass(frozen=True)
class Change:
    """Blocks that differ in the same way between two graphs.

    Attributes:
        blocks: their paths.
        before: nodes of the first block in the one graph.
        after: and in the other.
    """

    blocks: tuple[str, ...]
    before: tuple[Line, ...]
    after: tuple[Line, ...]


@dataclass
class Folding:
    """How the graphs of one model are folded.

    Attributes:
        graphs: all that are to be compared, by name; equal names of nodes mean equal nodes.
        provenance: of their nodes.
    """

    graphs: Mapping[str, fx.Graph]
    provenance: Provenance
    _blocks: dict[str, str] = field(default_factory=dict)

    @cached_property
    def alike(self) -> dict[str, str]:
        """Name of a node -> its name within its block."""
        found: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        for graph in self.graphs.values():
            for node in graph.nodes:
                if node.op == "call_function":
                    base = re.sub(r"(_?\*)+$", "", re.sub(r"\d+", "*", node.name))
                    numbers = tuple(map(int, re.findall(r"\d+", node.name)))
                    found.setdefault((self.block(node.name), base), {})[node.name] = numbers
        return {
            name: f"{base}#{rank}"
            for (_, base), names in found.items()
            for rank, name in enumerate(sorted(names, key=lambda n: (names[n], n)))
        }

    def block(self, name: str) -> str:
        """The block of a node: its path up to the first number; else its outermost module."""
        if name not in self._blocks:
            path = self.provenance.modules.get(name, "")
            found = _BLOCK.match(path)
            numbered = found is not None and found[0] in self._parents
            self._blocks[name] = found[0] if found and numbered else path.partition(".")[0]
        return self._blocks[name]

    @cached_property
    def _parents(self) -> set[str]:
        """Numbered paths that hold modules: blocks, not the layers of a sequence."""
        paths = map(_INSIDE.match, set(self.provenance.modules.values()))
        return {found[0] for found in paths if found}

    def sections(self, name: str) -> list[Section]:
        """A graph as sections, in the order of their first nodes."""
        blocks = self.lines(name)
        folded: dict[object, list[str]] = {}
        for block, lines in blocks.items():
            folded.setdefault(_same(block, lines), []).append(block)
        return [Section(tuple(names), blocks[names[0]]) for names in folded.values()]

    def changes(self, before: str, after: str) -> list[Change]:
        """Where two graphs differ, in order; blocks that differ in the same way are one change."""
        first, second = self.lines(before), self.lines(after)
        folded: dict[object, list[str]] = {}
        for block in dict.fromkeys([*first, *second]):
            one, other = first.get(block, ()), second.get(block, ())
            if [line.form for line in one] != [line.form for line in other]:
                key = _same(block, one), _same(block, other)
                folded.setdefault(key, []).append(block)
        return [
            Change(tuple(names), first.get(names[0], ()), second.get(names[0], ()))
            for names in folded.values()
        ]

    def lines(self, name: str) -> dict[str, tuple[Line, ...]]:
        """Block -> its nodes, in order."""
        blocks: dict[str, list[fx.Node]] = {}
        for node in self.graphs[name].nodes:
            if node.op == "call_function":
                blocks.setdefault(self.block(node.name), []).append(node)
        made_by = self.provenance.made_by.get(name, {})
        return {block: self._lines(block, nodes, made_by) for block, nodes in blocks.items()}

    def _lines(
        self, block: str, nodes: Sequence[fx.Node], made_by: Mapping[str, str]
    ) -> tuple[Line, ...]:
        """What comes from outside of the block, and symbols, are numbered by first use in it."""
        outside: dict[str, str] = {}
        symbols: dict[str, str] = {}

        def alike(match: re.Match[str]) -> str:
            name = match[1]
            if name in self.alike and self.block(name) == block:
                return f"%{self.alike[name]}"
            return outside.setdefault(name, f"%outside#{len(outside)}")

        def line(node: fx.Node) -> Line:
            text, spec, made = operation_text(node), spec_of(node), made_by.get(node.name, "")
            form = re.sub(r"%(\w+)", alike, f"{text} {spec}")
            if block:
                form = form.replace(f"@{block}.", "@*.")
            if made and node.target is torch.ops.aten.select.int:
                # What is made for all blocks at once is handed out one row a block.
                form = re.sub(r"\d+\)", "its own row)", form)
            form = _SYMBOL.sub(lambda m: symbols.setdefault(m[0], f"s#{len(symbols)}"), form)
            return Line(
                name=node.name,
                alike=self.alike[node.name],
                module=self.provenance.modules.get(node.name, ""),
                operation=operation_name(node),
                text=text,
                spec=spec,
                made_by=made,
                form=f"{self.alike[node.name]} = {form}",
            )

        return tuple(map(line, nodes))


def _same(block: str, lines: Sequence[Line]) -> object:
    """Equal for blocks that do the same."""
    return re.sub(r"\d+", "*", block), tuple(line.form for line in lines)
