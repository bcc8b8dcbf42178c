"""A site: a region of the traced graph whose outputs can be kept between steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from cachegraph.errors import SiteError, nearest
from cachegraph.spec import TensorSpec


@dataclass(frozen=True)
class BlockRange:
    """Blocks of one list of modules, as Python slices them: ``blocks[2:26]`` is 2 to 25.

    Attributes:
        path: of the list.
        start: the first block.
        stop: the one behind the last, or None for all that follow.
    """

    path: str
    start: int
    stop: int | None

    @classmethod
    def parse(cls, text: str) -> BlockRange | None:
        """The range that a text names; None where it names none."""
        found = re.fullmatch(r"([\w.]+)\[(\d*):(\d*)\]", text)
        if found is None:
            return None
        path, start, stop = found.groups()
        return cls(path, int(start or 0), int(stop) if stop else None)

    def holds(self, name: str) -> bool:
        """True for the name of a site in one of the blocks."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?!\w)", name)
        at = int(found[1]) if found is not None else -1
        return self.start <= at and (self.stop is None or at < self.stop)


class SiteKind(StrEnum):
    """What a site computes."""

    ATTN = "attn"  # self or joint attention
    CROSS_ATTN = "cross_attn"  # keys from another source than the stream
    MLP = "mlp"
    STACK = "stack"  # blocks together; a site only where a schedule says so


@dataclass(frozen=True)
class Folding:
    """Tokens of a stream that lie in the batch of an attention: frames, or the places in them.

    Attributes:
        size: how many.
        outer: the stream's tokens are sorted by them first.
    """

    size: int
    outer: bool


@dataclass(frozen=True)
class SiteValue:
    """One output of a site.

    Attributes:
        node: name of the value's node in the traced graph.
        spec: shape and dtype, such as ``f32[s0, N, C]``.
        module: path of the innermost module whose output this value is, or None.
        residual: node of the addition that it ends in.
        tokens: from which to which token of the site's attention this value's stream goes; None
            where that is not known, or there is none.
        folding: of an attention within frames or along time.
    """

    node: str
    spec: TensorSpec
    module: str | None
    residual: str = ""
    tokens: tuple[int, int] | None = None
    folding: Folding | None = None


@dataclass(frozen=True)
class Inner:
    """What a fused site keeps inside: the attention that its last projection takes.

    With it, tokens of the site can be recomputed without attention.

    Attributes:
        node: that makes it.
        spec: such as ``f32[s0, N, C]``.
        columns: where it stands in what the projection takes.
    """

    node: str
    spec: TensorSpec
    columns: tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A site; joint attention has one value per stream.

    Attributes:
        name: module path such as ``blocks.3.attn``; ``blocks.3:attn`` where no module holds
            just this region.
        kind: attention, cross-attention, mlp or stack.
        values: what is kept, before the gate multiplication.
        module: path of the module that holds the whole region, or None.
        source: node of the stream that the site reads and is added to.
        reader: path of the module that takes the stream, or None.
        residual: node of that addition; the last of them where there are several values.
        cores: attention cores among the anchors.
        anchors: nodes that do the site's main work (attention cores and linears); none of them
            may be left in a step that reuses the site.
        fused: one projection serves attention and mlp (single blocks of FLUX).
        inner: of a fused site whose projection can be split, its attention.
        call: which call of the module it is, where one module serves several streams.
        covers: names of the sites inside of a stack. What a row says of them counts only in steps
            that compute the stack; in others they do not run.
        relative: what is kept is what the site adds to its source, not what comes out behind it.
    """

    name: str
    kind: SiteKind
    values: tuple[SiteValue, ...]
    module: str | None
    anchors: tuple[str, ...]
    fused: bool = False
    call: int = 0
    source: str = ""
    reader: str | None = None
    residual: str = ""
    cores: tuple[str, ...] = ()
    inner: Inner | None = None
    covers: tuple[str, ...] = ()
    relative: bool = False


def select_sites(
    sites: Sequence[Site],
    *,
    kinds: Sequence[str],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    named: bool = False,
    place: str = "",
) -> frozenset[str]:
    """Names of the sites that a schedule speaks of.

    Args:
        sites: every site of the model.
        kinds: of the sites to select.
        include: globs over names, or ranges of blocks; a site must match one.
        exclude: globs over names, or ranges of blocks; a site must match none.
        named: whether the user wrote the kinds, so that each must match.
        place: where the selection is written, for errors.

    Raises:
        SiteError: a glob, or a kind that was named, matches no site, or no site is selected; lists
            what there is.
    """
    for glob in (*include, *exclude):
        if not any(_matches(site.name, glob) for site in sites):
            raise SiteError(
                f"glob {glob!r} matches no site",
                place=place,
                expected=describe(sites),
                remedy=nearest(glob, [site.name for site in sites]),
            )
    missing = [kind for kind in kinds if named and all(site.kind != kind for site in sites)]
    if missing:
        raise SiteError(
            f"the model has no site of kind {', '.join(missing)}",
            place=place,
            expected=describe(sites),
            remedy=f"leave {', '.join(missing)} out of sites: kinds",
        )
    chosen = frozenset(
        site.name
        for site in sites
        if site.kind in kinds
        and any(_matches(site.name, glob) for glob in include)
        and not any(_matches(site.name, glob) for glob in exclude)
    )
    if not chosen:
        raise SiteError(
            "the schedule selects no site",
            place=place,
            expected=describe(sites),
            found=f"kinds {', '.join(kinds)}",
        )
    return chosen


def _matches(name: str, glob: str) -> bool:
    blocks = BlockRange.parse(glob)
    return name == glob or (fnmatchcase(name, glob) if blocks is None else blocks.holds(name))


def block_of(site: Site) -> str:
    """The block of a site: ``blocks.3`` of ``blocks.3.attn`` or ``blocks.3:attn@1``."""
    name = site.name.partition("@")[0]
    block, colon, _ = name.partition(":")
    return block if colon else name.rpartition(".")[0]


def blocks_of(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites of each block, in order: those whose modules have the same parent."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind != SiteKind.STACK:
            blocks.setdefault(block_of(site), []).append(site)
    return list(blocks.values())


def describe(sites: Sequence[Site]) -> str:
    """One line about what there is: ``56 sites: blocks.0.attn (attn), ... blocks.27.mlp (mlp)``."""
    if not sites:
        return "no sites at all"
    names = [f"{site.name} ({site.kind})" for site in sites]
    if len(names) > 6:
        names = [*names[:3], "...", *names[-2:]]
    count = "1 site" if len(sites) == 1 else f"{len(sites)} sites"
    return f"{count}: {', '.join(names)}"
