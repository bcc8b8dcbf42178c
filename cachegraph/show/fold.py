"""Graphs folded for the eye: by module, and blocks that do the same only once.

A model has dozens of blocks that differ in names alone. Each node gets a name within its block that
is the same in all of them (``linear_17`` of ``blocks.3`` is ``linear#1``), so that blocks can be
compared with each other, and a block of one variant with the same one of another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from cachegraph.graph.interface import KNOWN, Port
from cachegraph.graph.provenance import Provenance
from cachegraph.graph.serialise import spec_of
from cachegraph.graph.text import operation_text

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
        text: the whole operation, as graphs are printed.
        spec: of its value; empty where it has none.
        made_by: the pass that made it and for which site; empty for what was traced.
        form: what it computes, whichever block it is in.
    """

    name: str
    alike: str
    module: str
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


@dataclass(frozen=True)
class _Place:
    """Where a node belongs: its module, its block, and its name within the block."""

    module: str
    block: str
    alike: str


@dataclass
class Folding:
    """How the graphs of one model are folded.

    Attributes:
        graphs: all that are to be compared, by name.
        provenance: of their nodes.
    """

    graphs: Mapping[str, fx.Graph]
    provenance: Provenance

    @cached_property
    def _parents(self) -> set[str]:
        """Numbered paths that hold modules: blocks, not the layers of a sequence."""
        paths = map(_INSIDE.match, set(self.provenance.modules.values()))
        return {found[0] for found in paths if found}

    def _block(self, path: str) -> str:
        """The block of a module: its path up to the first number; else its outermost module."""
        found = _BLOCK.match(path)
        return found[0] if found and found[0] in self._parents else path.partition(".")[0]

    @cached_property
    def _traced(self) -> dict[str, _Place]:
        """The places of traced nodes, in order of their numbers within each block."""
        found: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        for name, path in self.provenance.modules.items():
            numbers = tuple(map(int, re.findall(r"\d+", name)))
            found.setdefault((self._block(path), _base(name)), {})[name] = numbers
        return {
            name: _Place(self.provenance.modules[name], block, f"{base}#{rank}")
            for (block, base), names in found.items()
            for rank, name in enumerate(sorted(names, key=lambda n: (names[n], n)))
        }

    def _places(self, name: str) -> dict[str, _Place]:
        """The places of a graph's nodes.

        What a pass made belongs to the module of the site that it was made for, else to that of the
        first node that it uses; it is counted by itself, for its names differ between graphs.
        """
        made_by, provenance = self.provenance.made_by.get(name, {}), self.provenance
        found: dict[str, _Place] = {}
        ranks: Counter[tuple[str, str]] = Counter()
        for node in self.graphs[name].nodes:
            if node.op != "call_function":
                continue
            traced = self._traced.get(node.name)
            if traced is not None and node.name not in made_by:
                found[node.name] = traced
                continue
            path = provenance.sites.get(made_by.get(node.name, "").partition(", ")[2], "")
            used = (n.name for n in node.all_input_nodes if n.name in found)
            first = next(used, "")
            if traced is not None:
                path = traced.module
            elif not path and first:
                path = found[first].module
            key = self._block(path), _base(node.name.replace(_label(self._block(path)), "*"))
            found[node.name] = _Place(path, key[0], f"{key[1]}+{ranks[key]}")
            ranks[key] += 1
        return found

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
        """Block -> its nodes, in order; none of a graph that is not there."""
        if name not in self.graphs:
            return {}
        places, blocks = self._places(name), dict[str, list[fx.Node]]()
        for node in self.graphs[name].nodes:
            if node.name in places:
                blocks.setdefault(places[node.name].block, []).append(node)
        made_by = self.provenance.made_by.get(name, {})
        return {
            block: self._lines(block, nodes, places, made_by) for block, nodes in blocks.items()
        }

    def _lines(
        self,
        block: str,
        nodes: Sequence[fx.Node],
        places: Mapping[str, _Place],
        made_by: Mapping[str, str],
    ) -> tuple[Line, ...]:
        """What comes from outside of the block, and symbols, are numbered by first use in it."""
        outside: dict[str, str] = {}
        symbols: dict[str, str] = {}
        counts: Counter[str] = Counter()

        def alike(match: re.Match[str]) -> str:
            name = match[1]
            known = name.removeprefix("known_")
            place = places.get(name) or self._traced.get(known)
            if place is not None and place.block == block:
                return f"%{'known ' * (known != name)}{place.alike}"
            if name not in outside:
                # A stream may come from any operation; inputs are told apart by their names.
                base = "" if place else _base(name.replace(_label(block), "*"))
                outside[name] = f"%outside {base}#{counts[base]}"
                counts[base] += 1
            return outside[name]

        def line(node: fx.Node) -> Line:
            text, spec, made = operation_text(node), spec_of(node), made_by.get(node.name, "")
            form = re.sub(r"%(\w+)", alike, f"{text} {spec}")
            if block:
                form = form.replace(f"@{block}.", "@*.")
            if made and node.target is torch.ops.aten.select.int:
                # What is made for all blocks at once is handed out one row a block.
                form = re.sub(r"\d+\)", "its own row)", form)
            form = _SYMBOL.sub(lambda m: symbols.setdefault(m[0], f"s#{len(symbols)}"), form)
            place = places[node.name]
            return Line(
                name=node.name,
                alike=place.alike,
                module=place.module,
                text=text,
                spec=spec,
                made_by=made,
                form=f"{place.alike} = {form}",
            )

        return tuple(map(line, nodes))


def _base(name: str) -> str:
    """A name without its numbers: ``linear_17`` and ``linear_17_0_384`` are a ``linear``."""
    return re.sub(r"(_?\*)+$", "", re.sub(r"\d+", "*", name))


def _label(block: str) -> str:
    """A block's path as it stands in the names of slots and of what passes made."""
    return re.sub(r"\W+", "_", block) if block else "\0"


def fold_ports(ports: Sequence[Port]) -> list[list[Port]]:
    """Inputs or outputs by what they are: those that differ in numbers alone stand together.

    What is known beforehand has names that say little, so it stands together by its shape.
    """
    groups: dict[object, list[Port]] = {}
    for port in ports:
        spec = re.sub(r"\bs\d+\b", "s", str(port.spec))
        alike = () if port.role in KNOWN else tuple(map(_starred, (port.name, port.of)))
        groups.setdefault((port.role, spec, port.age, *alike), []).append(port)
    return list(groups.values())


def port_label(names: Sequence[str]) -> str:
    """Their common name, where they differ in numbers alone; else the first and how many more."""
    if len(set(map(_starred, names))) == 1:
        return common_name(names)
    return f"{names[0]} and {len(names) - 1} more"


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _same(block: str, lines: Sequence[Line]) -> object:
    """Equal for blocks that do the same."""
    return _starred(block), tuple(line.form for line in lines)
