"""Variants as folded text: one by itself, and what it leaves out of another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from cachegraph.graph.interface import Port
from cachegraph.graph.provenance import NodeFlops
from cachegraph.graph.text import action_word
from cachegraph.plan.variant import Variant

from .fold import Folding, Line, Section, fold_ports, port_label
from .picture import amount, common_name, plain_table, steps_text
from .view import View

_STYLES = {"-": "red", "+": "green", "@": "bold"}
_UNTOLD = "..."  # in place of what did not change


@dataclass(frozen=True)
class Share:
    """What one kind of module does in a graph.

    Attributes:
        operations: how many, over all blocks.
        flops: of all of them.
    """

    operations: int = 0
    flops: float = 0


def show_difference(view: View, first: str, second: str) -> RenderableType:
    """The difference of two variants as text: headers, inputs and outputs, blocks, a summary.

    Args:
        view: plan and graphs.
        first: name of a variant.
        second: name of another.
    """
    one, other = (view.plan.variants[view.variant(name)] for name in (first, second))
    lines = [*_headers(view, one, other), *_ports(view, one, other)]
    lines += _changes(view.folding, first, second, "")
    lines += _changes(view.folding, f"{first}-prologue", f"{second}-prologue", "prologue: ")
    if not lines:
        return Text(f"{first} and {second} do not differ")
    text = _coloured([f"--- {first}", f"+++ {second}", *lines])
    return Group(text, _summary(view, one, other))


def show_variant(view: View, name: str) -> RenderableType:
    """A variant as text: steps, sites, inputs and outputs, blocks; those that are alike once.

    Args:
        view: plan and graphs.
        name: of the variant.
    """
    index = view.variant(name)
    variant, interface = view.plan.variants[index], view.interfaces[index]
    lines = [f"@@ {name}: steps {steps_text(variant.steps, 60)}"]
    groups: dict[str, list[str]] = {}
    for site, action, write in zip(view.plan.sites, variant.row, variant.writes, strict=True):
        groups.setdefault(action_word(action) + " write" * write, []).append(site.name)
    lines += [f" {label}: {word}" for word, names in groups.items() for label in _families(names)]
    for what, ports in (("inputs", interface.inputs), ("outputs", interface.outputs)):
        lines += [f"@@ {what}", *_only(ports, (), " ")]
    for graph, said in ((name, ""), (f"{name}-prologue", "prologue: ")):
        for section in view.folding.sections(graph):
            lines.append(f"@@ {said}{section.label}{_alike(section.blocks)}")
            lines += [f" {_written(line)}" for line in section.lines]
    return _coloured(lines)


def _alike(blocks: Sequence[str]) -> str:
    return f" ({len(blocks)} alike)" if len(blocks) > 1 else ""


def _coloured(lines: Sequence[str]) -> Text:
    text = Text()
    for line in lines:
        text.append(f"{line}\n", _STYLES.get(line[:1]))
    return text


def _headers(view: View, one: Variant, other: Variant) -> Iterator[str]:
    """Steps, and what sites do where that differs; sites that are alike in one line."""
    if one.steps != other.steps:
        yield "@@ steps"
        yield f"-{steps_text(one.steps, 60)}"
        yield f"+{steps_text(other.steps, 60)}"
    groups: dict[tuple[str, str], list[str]] = {}
    for index, site in enumerate(view.plan.sites):
        words = [
            action_word(v.row[index]) + (" write" if v.writes[index] else "") for v in (one, other)
        ]
        if words[0] != words[1]:
            groups.setdefault((words[0], words[1]), []).append(site.name)
    yield from ["@@ sites"] if groups else []
    for (before, after), names in groups.items():
        for label in _families(names):
            yield f"-{label}: {before}"
            yield f"+{label}: {after}"


def _families(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers alone as one."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [common_name(family) for family in families.values()]


def _ports(view: View, one: Variant, other: Variant) -> Iterator[str]:
    """Inputs and outputs that only one of them has; those that are alike in one line."""
    pair = [view.interfaces[view.variant(variant.name)] for variant in (one, other)]
    for what in ("inputs", "outputs"):
        before, after = (getattr(interface, what) for interface in pair)
        changed = [*_only(before, after, "-"), *_only(after, before, "+")]
        yield from [f"@@ {what}", *changed] if changed else []


def _only(ports: Sequence[Port], others: Sequence[Port], mark: str) -> Iterator[str]:
    taken = {(port.role, port.name) for port in others}
    for group in fold_ports([port for port in ports if (port.role, port.name) not in taken]):
        label = port_label([port.name for port in group])
        yield f"{mark}{group[0].role} {label}  {group[0].spec}"


def _changes(folding: Folding, first: str, second: str, said: str) -> Iterator[str]:
    for change in folding.changes(first, second):
        section = Section(change.blocks, change.after or change.before)
        yield f"@@ {said}{section.label}{_alike(change.blocks)}"
        yield from _line_difference(change.before, change.after)


def _line_difference(before: Sequence[Line], after: Sequence[Line]) -> Iterator[str]:
    """Nodes by what they compute; only those that differ, and a mark where others were."""
    matcher = difflib.SequenceMatcher(
        None, [line.form for line in before], [line.form for line in after], autojunk=False
    )
    for kind, start, stop, new_start, new_stop in matcher.get_opcodes():
        if kind == "equal":
            yield f" {_UNTOLD}"
            continue
        yield from (f"-{_written(line)}" for line in before[start:stop])
        yield from (f"+{_written(line)}" for line in after[new_start:new_stop])


def _written(line: Line) -> str:
    made = f"  # {line.made_by}" if line.made_by else ""
    return f"%{line.name} = {line.text}  {line.spec}{made}"


def _summary(view: View, one: Variant, other: Variant) -> RenderableType:
    """Operations and FLOPs by kind of module, where they differ."""
    shares = [module_shares(view, variant) for variant in (one, other)]
    names = [f"{what} {v.name}" for what in ("operations", "FLOPs") for v in (one, other)]
    table = plain_table("module", *names, right=tuple(names))
    for module in dict.fromkeys([*shares[0], *shares[1]]):
        before, after = (share.get(module, Share()) for share in shares)
        if before != after:
            counts = str(before.operations), str(after.operations)
            table.add_row(module, *counts, amount(before.flops), amount(after.flops))
    total = [sum(share.flops for share in found.values()) for found in shares]
    counted = [sum(share.operations for share in found.values()) for found in shares]
    table.add_row("all", *map(str, counted), *map(amount, total))
    return table


def module_shares(view: View, variant: Variant) -> dict[str, Share]:
    """What each kind of module does in a variant: ``blocks.*.attn.qkv`` -> operations, FLOPs."""
    flops = view.source.provenance.flops.get(variant.name, {})
    tokens = view.mean_tokens(variant)
    found: dict[str, Share] = {}
    for block, lines in view.folding.lines(variant.name).items():
        for line in lines:
            kind = re.sub(r"\d+", "*", block) + line.module.removeprefix(block) or "model"
            before = found.get(kind, Share())
            spent = before.flops + _spent(flops, line.name, tokens)
            found[kind] = Share(before.operations + 1, spent)
    return found


def _spent(flops: Mapping[str, NodeFlops], name: str, tokens: Mapping[str, float]) -> float:
    one = flops.get(name)
    return one.count * tokens.get(one.tokens, 1) if one is not None else 0
