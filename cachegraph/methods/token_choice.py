"""Which tokens a partial step recomputes: the score, and the grid of cells of the bonus."""

from __future__ import annotations

from math import isqrt

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, describe
from cachegraph.plan.selection import Score, Selection

from .method import Ruled
from .rules import kind_of
from .token_keys import TokenKeys

_NEEDED = {  # the kind of site that makes a score
    Score.ATTENTION: SiteKind.ATTN,
    Score.KV_NORM: SiteKind.ATTN,
    Score.CROSS_ATTENTION: SiteKind.CROSS_ATTN,
}


def choose(keys: TokenKeys, sites: Ruled) -> Selection:
    """How tokens are chosen.

    Raises:
        PlanError: the score is not to be had, or the tokens form no grid of whole cells.
    """
    score = Score(keys.score)
    kinds = {None, *(site.kind for site in sites.model)}
    if _NEEDED.get(score) not in kinds:
        raise PlanError(
            f"no score {keys.score!r}: the model has no {_NEEDED[score]} site",
            place=keys.where("score"),
            expected=f"a score that the model can give ({describe(sites.model)})",
            remedy="choose another: " + ", ".join(s for s in Score if _NEEDED.get(s) in kinds),
        )
    counts = token_counts(keys, sites)
    if not counts or (keys.bonus.weight and len(set(counts.values())) > 1):
        several = ", ".join(f"{name}: {n}" for name, n in counts.items())
        raise PlanError(
            "the sites to refresh have no common number of tokens" if counts else "nothing to do",
            place=keys.where(),
            expected="at least one site of kind "
            + " or ".join(sorted(keys.rule_set.refresh))
            + ", and as many tokens in all of them",
            found=several if len(several) < 200 else several[:200] + "...",
            remedy="'sites: {exclude: ...}' leaves sites out" if counts else "",
        )
    return Selection(
        score=score,
        age_weight=keys.age_weight / keys.interval,
        bonus=keys.bonus.weight,
        cell=keys.bonus.cell if keys.bonus.weight else 1,
        grid=_grid(keys, *counts.values()),
        seed=keys.seed or 0,
    )


def token_counts(keys: TokenKeys, sites: Ruled) -> dict[str, int]:
    """Tokens of the ruled sites that partial steps recompute some of."""
    kinds = set(keys.rule_set.refresh)
    return {site.name: _tokens(keys, site) for site in sites if kind_of(site) in kinds}


def _tokens(keys: TokenKeys, site: Site) -> int:
    """Tokens of a site's value ``(B, N, C)``."""
    if site.fused and site.inner is None:
        raise PlanError(
            f"the last projection of {site.name} cannot be split into attention and mlp",
            place=keys.where("rules"),
            expected="one that takes both side by side, (batch, tokens, channels) each",
            found=f"{site.values[0].node} of {site.values[0].module or 'the model'}",
            remedy="leave the site out with 'sites: {exclude: ...}', or let it be reused whole: "
            "rules: {like: ..., refresh: [mlp]}",
        )
    shape = site.values[0].spec.shape
    tokens = shape[1] if len(shape) == 3 and len(site.values) == 1 else None
    if not isinstance(tokens, int):
        raise PlanError(
            f"the tokens of {site.name} cannot be counted",
            place=keys.where(),
            expected="one value of shape (batch, tokens, channels), the tokens a number",
            found=", ".join(str(value.spec) for value in site.values),
            remedy="compile for a fixed image size, or leave the site out with 'sites: {exclude}'",
        )
    return tokens


def _grid(keys: TokenKeys, tokens: int, *others: int) -> tuple[int, int] | None:
    if {*others} - {tokens} and keys.grid is None:
        return None  # nothing needs it
    side = isqrt(tokens)
    if keys.grid is not None:
        height, width = keys.grid
    elif keys.bonus.weight and side * side != tokens:
        raise PlanError(
            f"{tokens} tokens form no square",
            place=keys.where(),
            expected="the grid of tokens",
            remedy="add 'grid: [height, width]' to the policy, or 'bonus: {weight: 0}'",
        )
    else:
        height, width = (side, side) if side * side == tokens else (1, tokens)
    if height * width != tokens:
        raise PlanError(
            f"a grid of {height} x {width} does not hold {tokens} tokens",
            place=keys.where("grid"),
            expected=f"two numbers whose product is {tokens}",
            found=f"{height * width}",
        )
    cell = keys.bonus.cell
    if keys.bonus.weight and (height % cell or width % cell):
        raise PlanError(
            f"{height} x {width} tokens do not divide into cells of {cell} x {cell}",
            place=keys.where("bonus", "cell"),
            expected=f"a cell that divides {height} and {width}",
            found=f"{cell}",
            remedy="choose another cell, or 'bonus: {weight: 0}' for no bonus",
        )
    return height, width
