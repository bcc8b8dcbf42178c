"""The stacks that a schedule makes sites of, and what they do to the sites inside of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from cachegraph.errors import SiteError
from cachegraph.model.site import BlockRange, Site, SiteKind, describe
from cachegraph.model.stack import WHOLE, find_stack
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Compute, Row

from .schedule import Schedule


def with_stacks(schedule: Schedule, traced: TracedModel) -> tuple[Site, ...]:
    """Every site of a model, the stacks that the schedule names last.

    Raises:
        SiteError: the blocks of one are no chain, or two stacks have blocks in common.
    """
    if schedule.policy.skips_stack:
        return (*traced.sites, *((traced.stack,) if traced.stack is not None else ()))
    if SiteKind.STACK not in schedule.sites.kinds:
        return traced.sites
    names = [g for g in schedule.sites.include if BlockRange.parse(g) is not None]
    if any(fnmatchcase(WHOLE, glob) for glob in schedule.sites.include):
        names.append(WHOLE)
    place, relative = schedule.where("sites"), schedule.sites.relative is not False
    stacks = [make_stack(traced, name, relative, place) for name in names]
    for at, stack in enumerate(stacks):
        for other in stacks[:at]:
            if common := set(stack.covers) & set(other.covers):
                raise SiteError(
                    f"{other.name} and {stack.name} have blocks in common",
                    place=place,
                    expected="stacks beside each other",
                    found=", ".join(sorted(common)[:4]),
                )
    return (*traced.sites, *stacks)


def make_stack(traced: TracedModel, name: str, relative: bool, place: str = "") -> Site:
    """The blocks that a name speaks of as one site.

    Args:
        traced: the model.
        name: ``stack``, or a range such as ``blocks[2:26]``.
        relative: whether what the blocks add to the stream is its value.
        place: where the schedule names it.

    Raises:
        SiteError: there are no such blocks, or they are no chain.
    """
    blocks = BlockRange.parse(name)
    if blocks is None and traced.stack is not None:
        return replace(traced.stack, relative=relative)
    inside = [site for site in traced.sites if blocks is None or blocks.holds(site.name)]
    found = find_stack(traced.module.graph, inside, name, relative=relative)
    if found is None:
        raise SiteError(
            f"the model has no site for {'all blocks' if blocks is None else name} together",
            place=place,
            expected="a chain of blocks, each taking what the one before it hands out",
            found=describe(inside),
            remedy="'kinds: [attn, mlp]' works without"
            if inside
            else f"the sites are {describe(traced.sites)}",
        )
    return found


def hide_covered(rows: Sequence[Row], sites: Sequence[Site]) -> tuple[Row, ...]:
    """Rows in which what lies in a stack that is not computed keeps nothing alive."""
    index = {site.name: i for i, site in enumerate(sites)}
    inside = {i: {index[n] for n in site.covers} for i, site in enumerate(sites) if site.covers}
    hidden = []
    for row in rows:
        skipped = [inner for i, inner in inside.items() if not isinstance(row[i], Compute)]
        idle = set[int]().union(*skipped)
        hidden.append(tuple(Compute() if i in idle else action for i, action in enumerate(row)))
    return tuple(hidden)
