"""The cache operations that stand in a rewritten graph until they are lowered.

Plain functions of tensors, so a graph that holds them still runs in eager. Sizes: B batch,
H heads, N tokens, D head width, C width, k recomputed tokens, L sites, J partial steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PRIME = 1_000_003
_MAP_BYTES = 2**24  # of an attention map that is made in one piece; larger blocks come with faults
_MOST_PIECES = 4  # each is several nodes of a graph


def read(slot: Tensor) -> Tensor:
    """What is kept in a slot, such as ``(B, N, C)``."""
    return slot


def write(value: Tensor, slot: str) -> Tensor:
    """Hand out a value to be kept under the name ``slot``."""
    return value


def forecast(values: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Weighted sum of kept values.

    Args:
        values: m tensors of one shape, newest first.
        coefficients: ``(m,)`` float32, a step constant.
    """
    if not values:
        raise ValueError("a forecast without values")
    total = values[0] * coefficients[0]
    for i, value in enumerate(values[1:], 1):
        total = total + value * coefficients[i]
    return total


def pick_tokens(order: Tensor, age: Tensor, tokens: Tensor) -> Tensor:
    """The tokens to recompute in this step, best first.

    Args:
        order: ``(B, J, N)`` int64.
        age: ``(1,)`` int64, which of the J rows.
        tokens: ``(k,)`` int64, 0 .. k-1.

    Returns:
        ``(B, k)`` int64.
    """
    row = torch.ops.aten.select.int(torch.index_select(order, 1, age), 1, 0)
    return torch.index_select(row, 1, tokens)


def gather_tokens(stream: Tensor, picked: Tensor) -> Tensor:
    """The picked tokens ``(B, k, ...)`` of a stream ``(B, N, C)`` or of scores ``(B, N)``."""
    return torch.gather(stream, 1, _over_width(picked, stream))


def scatter_tokens(kept: Tensor, picked: Tensor, fresh: Tensor) -> Tensor:
    """What is kept, ``(B, N, C)`` or ``(B, N)``, with the picked tokens replaced by fresh ones."""
    return torch.scatter(kept, 1, _over_width(picked, kept), fresh)


def attention_received(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Attention that each token received: column sums of the softmax map, mean over heads.

    The map is gone after the step; only its column sums, a vector a site, can be kept. A large one
    is made of some queries after others.

    Args:
        query: ``(B, H, N, D)``.
        key: ``(B, H, N, D)``.
        scale: of the products; ``D**-0.5`` where None.

    Returns:
        ``(B, N)`` float32.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    heads, tokens, width = query.shape[1:]
    whole = 4 * heads * tokens * key.shape[2]
    pieces = min(-(-whole // _MAP_BYTES), _MOST_PIECES) if isinstance(whole, int) else 1
    if pieces == 1:
        products = torch.matmul(query * factor, key.transpose(-2, -1))
        return torch.softmax(products.float(), dim=-1).mean(dim=1).sum(dim=1)
    columns = key.reshape(-1, key.shape[2], width).transpose(1, 2)
    rows = (query * factor).reshape(-1, tokens, width)
    received = []
    for piece in rows.split(-(-tokens // pieces), dim=1):
        found = torch.softmax(torch.bmm(piece, columns).float(), dim=-1)
        received.append(found.reshape(-1, heads * piece.shape[1], key.shape[2]).sum(dim=1))
    total = received[0]
    for one in received[1:]:
        total = total + one
    return total / heads


def value_smallness(value: Tensor) -> Tensor:
    """``sum over heads of 1 - ||v||``: large where the value vectors ``(B, H, N, D)`` are small.

    Returns:
        ``(B, N)`` float32.
    """
    return (1 - torch.linalg.vector_norm(value.float(), dim=-1)).sum(dim=1)


def unfold_tokens(score: Tensor, size: int, outer: bool) -> Tensor:
    """Scores of an attention within frames or along time as those of the stream's tokens.

    Args:
        score: ``(B size, N')``.
        size: tokens that lie in the batch.
        outer: the stream's tokens are sorted by them first.

    Returns:
        ``(B, size N')``.
    """
    tokens = score.shape[1]
    if outer:
        return score.reshape(-1, size * tokens)
    return score.reshape(-1, size, tokens).transpose(1, 2).reshape(-1, size * tokens)


def order_tokens(
    scores: Sequence[Tensor],
    counts: Tensor,
    age_weight: float,
    bonus: float,
    cell: int,
    grid: Sequence[int],
) -> Tensor:
    """In which order the tokens of L sites are recomputed in the J partial steps that follow.

    A token's score is its normalised score plus ``age_weight`` for each partial step that it was
    left out of; the best of each cell gets ``bonus`` times its score on top. The first of equals
    comes first. Source: Shenyi-Z/ToCa, ``cache_functions/cache_cutfresh.py``, ``scores.py``.

    Args:
        scores: L tensors ``(B, N)``.
        counts: ``(L, J)`` int64, how many tokens each partial step recomputes.
        age_weight: see above.
        bonus: see above; 0 for none.
        cell: side of a cell in tokens.
        grid: height and width of the token grid.

    Returns:
        ``(L, B, J, N)`` int64.
    """
    base = torch.nn.functional.normalize(torch.stack(list(scores)), dim=-1)
    age = torch.zeros_like(base)
    place = torch.zeros_like(base, dtype=torch.int64) + torch.arange(
        base.shape[-1], device=base.device
    )
    orders = []
    for j in range(counts.shape[1]):
        score = base + age_weight * age
        if bonus:
            score = _with_bonus(score, bonus, cell, grid)
        order = torch.sort(score, dim=-1, descending=True, stable=True)[1]
        rank = torch.scatter(torch.zeros_like(place), -1, order, place)
        age = torch.where(rank < counts[:, j : j + 1, None], torch.zeros_like(age), age + 1)
        orders.append(order)
    return torch.stack(orders, dim=2)


def order_now(
    score: Tensor,
    age: Tensor,
    gap: Tensor,
    age_weight: float,
    bonus: float,
    cell: int,
    grid: Sequence[int],
) -> Tensor:
    """In which order the tokens of one site are recomputed in this step; as :func:`order_tokens`.

    Args:
        score: ``(B, N)``.
        age: ``(B, N)``, partial steps since each token was recomputed, as kept.
        gap: ``(1,)`` int64, partial steps since then.
        age_weight: added for each partial step.
        bonus: of the best token of each cell; 0 for none.
        cell: side of a cell in tokens.
        grid: height and width of the token grid.

    Returns:
        ``(B, N)`` int64.
    """
    total = (score + age_weight * (age + gap)).unsqueeze(0)
    if bonus:
        total = _with_bonus(total, bonus, cell, grid)
    order = torch.sort(total, dim=-1, descending=True, stable=True)[1]
    return torch.ops.aten.select.int(order, 0, 0)


def pick_first(order: Tensor, tokens: Tensor) -> Tensor:
    """The first k of an order ``(B, N)``, as ``(B, k)``; ``tokens`` is ``(k,)``, 0 .. k-1."""
    return torch.index_select(order, 1, tokens)


def no_age(value: Tensor) -> Tensor:
    """Ages right after all tokens of a value ``(B, N, C)`` were computed: zeros ``(B, N)``."""
    return torch.zeros_like(value[..., 0], dtype=torch.float32)


def age_tokens(age: Tensor, gap: Tensor, picked: Tensor) -> Tensor:
    """Ages after a partial step: one more, and zero for the picked tokens."""
    older = age + (gap + 1)
    return torch.scatter(older, 1, picked, torch.zeros_like(picked, dtype=older.dtype))


def row_entropy(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Half of the entropy of each query's attention, mean over heads.

    Two halves of a batch attend to texts of their own; ToCa takes the entropy of the mean of both
    maps side by side, ``-sum p/2 log(p/2 + 1e-7)`` over either. This is one half's share of it.
    Source: Shenyi-Z/ToCa, ``PixArt-alpha-ToCa``, ``scores.py:12-25``.

    Args:
        query: ``(B, H, N, D)``.
        key: ``(B, H, M, D)``.
        mask: to be added to the products or, if boolean, True where attended; or None.
        scale: of the products; ``D**-0.5`` where None.

    Returns:
        ``(B, N)`` float32.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    products = torch.matmul(query * factor, key.transpose(-2, -1)).float()
    if mask is not None:
        bias = torch.zeros_like(products)
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask
        products = products + bias
    # Entropies of neighbours in an order lie so close that float32 ties them, see entropy_score.
    half = torch.softmax(products, dim=-1).mean(dim=1).double() / 2
    return -(half * torch.log(half + 1e-7)).sum(dim=-1).float()


def entropy_score(entropy: Tensor) -> Tensor:
    """Scores ``(B, N)`` from both halves' entropies: the same for both, high where they are.

    They are float64, whatever the entropies: the 1 that is added takes their last digits in
    float32, and then what an engine rounds differently moves the choice of a token.

    B is even. Each sample meets its partner by rolling, not by cutting the batch in two: half a
    batch of 2 has the size 1, which torch would make a constant of.
    """
    entropy = entropy.double()
    total = 1 + (entropy + torch.roll(entropy, entropy.shape[0] // 2, 0))
    return torch.nn.functional.normalize(total, dim=-1)


def similarity_score(stream: Tensor, kept: Tensor) -> Tensor:
    """Scores ``(B, N)``: how little the stream resembles the kept value, both ``(B, N, C)``."""
    # Not F.cosine_similarity, whose body writes in place.
    first, second = (
        value / torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp_min(1e-8)
        for value in (stream.float(), kept.float())
    )
    return torch.nn.functional.normalize(1 - (first * second).sum(dim=-1), dim=-1)


def norm_score(stream: Tensor) -> Tensor:
    """Scores ``(B, N)``: the norm of each token of the stream ``(B, N, C)``."""
    norm = torch.linalg.vector_norm(stream.float(), dim=-1)
    return torch.nn.functional.normalize(norm, dim=-1)


def random_score(age: Tensor, step: Tensor, seed: int) -> Tensor:
    """Scores like ``age``, ``(B, N)``: noise in [0, 1) from token, step and seed alone.

    No random state is involved, and both halves of a batch choose alike. Squares modulo a prime, in
    whole numbers, come out the same on every machine.
    """
    token = torch.arange(1, age.shape[-1] + 1, device=age.device)
    mixed = token * 7919 + (step + seed) * 104729
    for _ in range(3):
        rest = torch.remainder(mixed, _PRIME)
        mixed = rest * rest + 31 * rest + token
    return torch.zeros_like(age) + torch.remainder(mixed, _PRIME).to(age.dtype) / _PRIME


def _with_bonus(score: Tensor, bonus: float, cell: int, grid: Sequence[int]) -> Tensor:
    """Raise the best token of each cell of the grid by a share of its score."""
    rows, columns = grid[0] // cell, grid[1] // cell
    # No size is left to be worked out: torch.compile does not take the division that it traces to.
    front = score.shape[:2]
    cells = score.reshape(*front, rows, cell, columns, cell).permute(0, 1, 2, 4, 3, 5)
    flat = cells.reshape(*front, rows, columns, cell * cell)
    inside = torch.arange(cell * cell, device=score.device)
    best = flat.argmax(dim=-1, keepdim=True) == inside
    raised = flat + torch.where(best, flat * bonus, torch.zeros_like(flat))
    back = raised.reshape(*front, rows, columns, cell, cell).permute(0, 1, 2, 4, 3, 5)
    return back.reshape(*front, rows * cell * columns * cell)


def _over_width(picked: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 2:
        return picked
    return picked.unsqueeze(-1).expand(-1, -1, like.shape[-1])


CACHE_OPS = frozenset(
    {
        *(read, write, forecast),
        *(pick_tokens, gather_tokens, scatter_tokens),
        *(attention_received, value_smallness, unfold_tokens, order_tokens),
        *(order_now, pick_first, no_age, age_tokens, row_entropy, entropy_score),
        *(similarity_score, norm_score, random_score),
    }
)
