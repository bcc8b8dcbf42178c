"""Token choices of the reference runner: the published formulas written down once more.

Nothing here is shared with the graphs that the passes build, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cachegraph.errors import SiteError
from cachegraph.model.site import Site, SiteKind, block_of
from cachegraph.plan.action import Refresh, Reuse, Row
from cachegraph.plan.plan import Plan
from cachegraph.plan.selection import Score, Selection
from cachegraph.plan.variant import scorer


class TokenChoice:
    """Scores and ages of one trajectory.

    Args:
        plan: with a selection.
    """

    def __init__(self, plan: Plan, selection: Selection) -> None:
        self.plan, self.selection = plan, selection
        # (attention site, step that ran it) -> scores (B, N) of its tokens
        self.scores: dict[tuple[str, int], Tensor] = {}
        self.ages: dict[str, Tensor] = {}  # site -> partial steps since each token was recomputed
        self._counted: dict[str, int] = {}  # site -> partial steps that its ages account for
        self.picked: dict[str, Tensor] = {}  # site -> tokens (B, k) that were last recomputed
        self.streams: dict[str, Tensor] = {}
        self.captured: dict[str, tuple[Tensor, ...]] = {}
        self.inner: dict[tuple[str, int], Tensor] = {}  # of fused sites, by the step that made it

    @contextmanager
    def watch(self, model: nn.Module, row: Row) -> Iterator[None]:
        """Record attention inputs and streams while the model runs a step."""
        recorder = _Recorder(self.captured)
        with ExitStack() as stack, recorder:
            for site, action in zip(self.plan.sites, row, strict=True):
                if site.cores and not isinstance(action, Reuse):
                    module = model.get_submodule(site.module or block_of(site))
                    stack.callback(
                        module.register_forward_pre_hook(partial(recorder.enter, site)).remove
                    )
                    stack.callback(module.register_forward_hook(recorder.leave).remove)
                if isinstance(action, Refresh) and site.reader is not None:
                    reader = model.get_submodule(site.reader)
                    stack.callback(
                        reader.register_forward_pre_hook(partial(self._stream, site)).remove
                    )
            yield

    def computed(self, site: Site, step: int, _module: nn.Module, args: Any, _output: Any) -> None:
        """All tokens of a site were recomputed in a step; the rest is what a hook is given."""
        self.ages.pop(site.name, None)
        if site.inner is not None:
            self.inner[site.name, step] = args[0][..., slice(*site.inner.columns)]
        if site.kind is self._scoring_kind:
            self.scores[site.name, step] = self._new_scores(site)

    @property
    def _scoring_kind(self) -> SiteKind | None:
        match self.selection.score:
            case Score.ATTENTION | Score.KV_NORM:
                return SiteKind.ATTN
            case Score.CROSS_ATTENTION:
                return SiteKind.CROSS_ATTN
        return None

    def as_it_was(
        self, site: Site, action: Refresh, _module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """What the last projection of a fused site takes, with the attention that was kept."""
        if site.inner is None:
            return args
        joined = args[0].clone()
        joined[..., slice(*site.inner.columns)] = self.inner[site.name, action.scored]
        return (joined, *args[1:])

    def refreshed(
        self, site: Site, action: Refresh, step: int, kept: Tensor, all_fresh: Tensor
    ) -> Tensor:
        """The kept value with the chosen tokens replaced.

        Args:
            site: whose.
            action: how many tokens.
            step: number of the step.
            kept: ``(B, N, C)``.
            all_fresh: ``(B, N, C)``, recomputed for every token.
        """
        batch, tokens = kept.shape[:2]
        age = self._age(site, action, batch, tokens, kept.device)
        score = self._score(site, action, step, kept, age) + self.selection.age_weight * age
        score = self._with_bonus(score)
        best = torch.argsort(score, dim=-1, descending=True, stable=True)[:, : action.tokens]
        result = kept.clone()
        age = age + 1
        for sample in range(batch):
            result[sample, best[sample]] = all_fresh[sample, best[sample]]
            age[sample, best[sample]] = 0
        self.ages[site.name] = age
        self.picked[site.name] = best
        self._counted[site.name] = action.age + 1
        if site.kind is self._scoring_kind and not self.selection.foreseen:
            self._update_scores(site, action.source, step, best)
        return result

    def _age(
        self, site: Site, action: Refresh, batch: int, tokens: int, device: torch.device
    ) -> Tensor:
        """Ages now: steps that recomputed no token have passed without a call."""
        if site.name not in self.ages:
            return torch.full((batch, tokens), float(action.age), device=device)
        return self.ages[site.name] + (action.age - self._counted[site.name])

    def _score(self, site: Site, action: Refresh, step: int, kept: Tensor, age: Tensor) -> Tensor:
        match self.selection.score:
            case Score.SIMILARITY:
                stream = self.streams[site.name]
                dots = (stream * kept).sum(-1)
                norms = stream.norm(dim=-1).clamp_min(1e-8) * kept.norm(dim=-1).clamp_min(1e-8)
                return F.normalize(1 - dots / norms, dim=-1)
            case Score.NORM:
                return F.normalize(self.streams[site.name].norm(dim=-1), dim=-1)
            case Score.RANDOM:
                seed = self.selection.seed + 1000 * self.plan.sites.index(site)
                noise = [_noise(token, step + seed) for token in range(1, age.shape[-1] + 1)]
                return torch.tensor(noise, device=age.device).expand_as(age)
        owner = scorer(self.plan.sites, self.plan.sites.index(site), self.selection)
        if owner is None:
            raise SiteError(f"no attention scores the tokens of {site.name}")
        name = self.plan.sites[owner].name
        if self.selection.score is Score.CROSS_ATTENTION:
            score = self.scores[name, max(made for one, made in self.scores if one == name)]
            half = score.shape[0] // 2
            both = 1 + (score[:half].double() + score[half:].double())
            return F.normalize(both, dim=-1).repeat(2, 1)
        scores = self.scores[name, action.scored]
        streams = self.plan.sites[owner].values
        if len(streams) > 1:
            streams = tuple(one for one in streams if one.residual == site.source)
        span, folding = streams[0].tokens, streams[0].folding
        if folding is not None:  # (B size, N')
            grid = scores.unflatten(0, (-1, folding.size))
            scores = (grid if folding.outer else grid.mT).flatten(1)
            span = None
        return F.normalize(scores if span is None else scores[:, slice(*span)], dim=-1)

    def _update_scores(self, site: Site, source: int, step: int, picked: Tensor) -> None:
        """The rows of picked tokens get the scores of the attention that has just run."""
        score, old = self._new_scores(site), self.scores[site.name, source].clone()
        for sample in range(len(old)):
            old[sample, picked[sample]] = score[sample, picked[sample]]
        self.scores[site.name, step] = old

    def _new_scores(self, site: Site) -> Tensor:
        """From the attention that has just run."""
        query, key, value, mask, scale = self.captured[site.name]
        products = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if mask is not None:
            products = (
                products.masked_fill(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else products + mask
            )
        probabilities = products.float().softmax(-1).mean(1)  # (B, N, M)
        match self.selection.score:
            case Score.ATTENTION:
                return probabilities.sum(1)
            case Score.KV_NORM:
                return (1 - value.float().norm(dim=-1)).sum(1)
        halves = 0.5 * probabilities.double()
        return -(halves * (halves + 1e-7).log()).sum(-1).float()

    def _with_bonus(self, score: Tensor) -> Tensor:
        chosen = self.selection
        if not chosen.bonus or chosen.grid is None:
            return score
        height, width = chosen.grid
        result = score.reshape(-1, height, width).clone()
        for top in range(0, height, chosen.cell):
            for left in range(0, width, chosen.cell):
                block = result[:, top : top + chosen.cell, left : left + chosen.cell]
                flat = block.reshape(len(block), -1)
                best = flat.argmax(-1)
                for sample, at in enumerate(best.tolist()):
                    y, x = top + at // chosen.cell, left + at % chosen.cell
                    result[sample, y, x] *= 1 + chosen.bonus
        return result.reshape(score.shape)

    def _stream(self, site: Site, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.streams[site.name] = args[0]


def _noise(token: int, seed: int) -> float:
    mixed = 7919 * token + 104729 * seed
    for _ in range(3):
        mixed %= 1_000_003
        mixed = mixed**2 + 31 * mixed + token
    return mixed % 1_000_003 / 1_000_003


class _Recorder(TorchFunctionMode):
    """Keeps the arguments of scaled_dot_product_attention per site."""

    def __init__(self, captured: dict[str, tuple[Any, ...]]) -> None:
        super().__init__()
        self.captured = captured
        self.inside: list[str] = []

    def enter(self, site: Site, _module: nn.Module, _args: Any) -> None:
        self.inside.append(site.name)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            self.captured[self.inside[-1]] = (
                *(given.get(name) for name in names),
                given.get("scale"),
            )
        return func(*args, **kwargs)
