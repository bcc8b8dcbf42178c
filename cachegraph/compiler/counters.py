"""The published code's own way of counting FLOPs, for comparison with published totals."""

from __future__ import annotations

from collections.abc import Sequence

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, SiteValue, blocks_of, describe
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Action, Compute, Refresh, Row
from cachegraph.plan.plan import Plan


def toca_flops(
    rows: Sequence[Row], sites: Sequence[Site], *, batch: int, heads: int
) -> tuple[int, ...]:
    """FLOPs of each step as the published ToCa and DuCa count them for DiT, or do them for FLUX.

    Per block, with n tokens of C channels, h heads of d channels and k tokens recomputed
    (Shenyi-Z/ToCa, ``DiT-ToCa/models.py`` and ``cache_functions/attention.py``)::

        attention   6 B n C^2 + 2 B n C^2 + B n C + 4 B h n^2 d + 5 B h n^2     if computed
        mlp         16 B k C^2 + 24 B k C                                      (hidden size 4 C)
        modulation  B C + 6 B C^2                                              (a linear, times 1)
        norms       2 B n C

    A block that is skipped counts nothing, one whose result is thrown away counts. Embedding and
    final layer are not counted.

    For FLUX there is no counter, but a published total. These are the products that its code does,
    2 FLOPs a multiply-add (``flux-ToCa``, ``modules/layers.py``): attention with its map, from
    which scores are taken without another product; in partial steps the kept attention of a block
    of two streams projected again.

    Args:
        rows: one a step, one action a site.
        sites: every site of the model.
        batch: both halves of classifier-free guidance counted.
        heads: of an attention.

    Raises:
        PlanError: the model is not made like DiT.
    """
    index = {site.name: i for i, site in enumerate(sites)}
    if any(site.fused for site in sites):
        places = [[index[site.name] for site in block] for block in blocks_of(sites)]
        return tuple(
            sum(batch * _flux_block([(sites[i], row[i]) for i in block]) for block in places)
            for row in rows
        )
    stacks = [i for i, site in enumerate(sites) if site.kind == SiteKind.STACK]
    blocks = [_Block(block, index, batch, heads) for block in blocks_of(sites)]
    return tuple(
        sum(
            block.flops(row)
            for block in blocks
            if all(isinstance(row[i], Compute) for i in stacks) or block.runs(row)
        )
        for row in rows
    )


def count_toca(plan: Plan, traced: TracedModel, batch: int | None) -> tuple[int, ...]:
    """:func:`toca_flops` of a plan.

    Args:
        plan: what every step does.
        traced: the model, for its number of heads.
        batch: both halves of guidance counted; None for that of the example inputs.

    Raises:
        PlanError: the model is not made like DiT.
    """
    cores = [name for site in plan.sites for name in site.cores]
    query = next((n for n in traced.module.graph.nodes if n.name in cores), None)
    heads = query.args[0].meta["val"].shape[1] if query is not None else 0
    return toca_flops(plan.rows, plan.sites, batch=batch or _batch(traced), heads=int(heads))


def projected_again(plan: Plan, traced: TracedModel, batch: int | None) -> int:
    """Of :func:`count_toca`, what FLUX's code spends on projecting attention that it has kept.

    The graphs keep what was projected; the numbers are the same.
    """
    if not any(site.fused for site in plan.sites):
        return 0
    double = [i for i, s in enumerate(plan.sites) if s.kind == SiteKind.ATTN and not s.fused]
    tokens = [
        2 * n * c**2
        for row in plan.rows
        for i in double
        if not isinstance(row[i], Compute)
        for n, c in map(_size, plan.sites[i].values)
    ]
    return sum(tokens) * (batch or _batch(traced))


def _batch(traced: TracedModel) -> int:
    return int(traced.signature.inputs[0][1].sizes(traced.symbols)[0])


def _flux_block(block: Sequence[tuple[Site, Action]]) -> int:
    """Products of one sample in a block of FLUX; an mlp is four times as wide as the stream."""
    flops = 0
    for site, action in block:
        sizes = [_size(value) for value in site.values]
        n, c = sum(tokens for tokens, _ in sizes), sizes[0][1]
        k = action.tokens if isinstance(action, Refresh) else n * isinstance(action, Compute)
        whole = isinstance(action, Compute)
        if site.kind == SiteKind.MLP:
            flops += 16 * k * c**2
        elif site.fused:  # the halves of two projections that make an mlp; queries to attention
            flops += 18 * k * c**2 + whole * (6 * n * c**2 + 4 * n**2 * c) + 6 * c**2
        else:
            flops += whole * (6 * n * c**2 + 4 * n**2 * c) + 2 * n * c**2 + 24 * c**2
    return flops


class _Block:
    """A block's attention and mlp, by their places in a row."""

    def __init__(
        self, sites: Sequence[Site], index: dict[str, int], batch: int, heads: int
    ) -> None:
        by_kind = {site.kind: site for site in sites}
        if len(sites) != 2 or set(by_kind) != {SiteKind.ATTN, SiteKind.MLP}:
            raise PlanError(
                "the counter of ToCa does not fit the model",
                expected="blocks of one attn and one mlp site, as DiT has them",
                found=describe(sites),
            )
        self.attn = index[by_kind[SiteKind.ATTN].name]
        self.mlp = index[by_kind[SiteKind.MLP].name]
        self.batch, self.heads = batch, heads
        self.tokens, self.channels = _size(by_kind[SiteKind.MLP].values[0])

    def runs(self, row: Row) -> bool:
        """True where anything of the block is computed."""
        return any(isinstance(row[i], Compute | Refresh) for i in (self.attn, self.mlp))

    def flops(self, row: Row) -> int:
        """FLOPs of the block in one step."""
        b, n, c, h = self.batch, self.tokens, self.channels, self.heads
        action = row[self.mlp]
        k = action.tokens if isinstance(action, Refresh) else n * isinstance(action, Compute)
        attention = 8 * b * n * c**2 + b * n * c + 4 * b * n**2 * c + 5 * b * h * n**2
        modulation, norms = b * c + 6 * b * c**2, 2 * b * n * c
        mlp = 16 * b * k * c**2 + 24 * b * k * c
        return mlp + modulation + norms + attention * isinstance(row[self.attn], Compute)


def _size(value: SiteValue) -> tuple[int, int]:
    """Tokens and channels of a value ``(B, N, C)``."""
    match value.spec.shape:
        case (_, int(tokens), int(channels)):
            return tokens, channels
    raise PlanError(
        "the counter of ToCa does not fit the model",
        place=value.module or value.node,
        expected="a value of shape (batch, tokens, channels), the last two numbers",
        found=str(value.spec),
    )
