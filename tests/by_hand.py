"""ToCa and DuCa on FLUX and Open-Sora as loops that anybody can read, from the published rules.

Nothing of cachegraph decides here: which steps are full, how many tokens and which ones is written
out once more, attention keeps its whole map, texts are cut instead of masked, and samples that need
it are taken one by one. Of the models, weights and embeddings are used.

Sources: Shenyi-Z/ToCa (``flux-ToCa``, ``Open-Sora``) and Shenyi-Z/DuCa (``DuCa-Open-Sora``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cachegraph.zoo import Flux, STDiT3

Call = Mapping[str, Tensor]
AGE_WEIGHT = 0.25


class Tokens:
    """What is kept of a module: its last value, and how old each of its tokens is."""

    closest: ClassVar[float] = 1.0  # how far apart the last that was chosen and the next ever were

    def __init__(self) -> None:
        self.value = self.age = torch.empty(0)

    def compute(self, value: Tensor) -> Tensor:
        self.value, self.age = value, torch.zeros(value.shape[:2])
        return value

    def refresh(self, module: Any, score: Tensor, share: float, interval: int) -> Tensor:
        """Recomputes the best tokens; ``module`` takes a sample's number and its tokens'."""
        count = int(torch.tensor(share).clamp(0, 1) * score.shape[1])
        score = score + AGE_WEIGHT * self.age / interval
        self.value, self.age = self.value.clone(), self.age + 1
        for sample, row in enumerate(score):
            order = sorted(range(len(row)), key=lambda token: -float(row[token]))
            best = order[:count]
            if 0 < count < len(row):
                gap = float(row[order[count - 1]] - row[order[count]])
                Tokens.closest = min(Tokens.closest, gap)
            self.value[sample, best] = module(sample, best)
            self.age[sample, best] = 0
        return self.value


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention ``(B, N, H D)`` and its map ``(B, H, N, M)`` of ``(B, H, N, D)``."""
    found = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (found @ v).transpose(1, 2).flatten(2), found


# FLUX.


def flux(
    model: Flux, calls: Sequence[Call], interval: int, share: float, last_block: int | None = 27
) -> Iterator[Tensor]:
    """The output of each call; ``last_block`` is what ratios divide by, None for what there is."""
    kept: dict[Any, Any] = {}
    counter = 0
    for step, call in enumerate(calls):
        full = step <= 2 or counter == interval - 1
        counter = 0 if full else counter + 1
        vec = model.time_in(_waves(1000 * call["timesteps"])) + model.vector_in(call["y"])
        if "guidance" in call:
            vec = vec + model.guidance_in(_waves(1000 * call["guidance"]))
        turn = model._rotation(torch.cat([call["txt_ids"], call["img_ids"]], dim=1))
        img, txt = model.img_in(call["img"]), model.txt_in(call["txt"])
        for at, block in enumerate(model.double_blocks):
            ratio = share * (1.5 - at / (last_block or len(model.double_blocks) - 1)) * 0.4
            state = kept.setdefault(("double", at), {})
            img, txt = _double(block, img, txt, vec, turn, state, full, ratio, interval)
        x = torch.cat([txt, img], dim=1)
        for at, block in enumerate(model.single_blocks):
            ratio = share * (1.5 - at / (last_block or len(model.single_blocks) - 1)) * 1.6
            state = kept.setdefault(("single", at), {})
            x = _single(block, x, vec, turn, state, full, ratio, interval)
        yield model.final_layer(x[:, txt.shape[1] :], vec)


def _double(
    block: Any,
    img: Tensor,
    txt: Tensor,
    vec: Tensor,
    turn: Any,
    state: dict[str, Any],
    full: bool,
    ratio: float,
    interval: int,
) -> tuple[Tensor, Tensor]:
    length = txt.shape[1]
    parts = {
        "txt": (txt, block.txt_attn, block.txt_mlp, _pieces(block.txt_mod, vec, 6)),
        "img": (img, block.img_attn, block.img_mlp, _pieces(block.img_mod, vec, 6)),
    }
    if full:
        heads = [
            _heads(attn.qkv(_modulated(x, m[0], m[1])), block.num_heads, attn.norm)
            for x, attn, _, m in parts.values()
        ]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        state["attn"], found = attend(_turned(q, turn), _turned(k, turn), v)
        state["score"] = found.mean(dim=(1, 2))
    spans = {"txt": slice(0, length), "img": slice(length, None)}
    made = []
    for name, (x, attn, mlp, m) in parts.items():
        x = x + m[2] * attn.proj(state["attn"][:, spans[name]])
        tokens = state.setdefault(name, Tokens())
        if full:
            value = tokens.compute(mlp(_modulated(x, m[3], m[4])))
        else:
            score = F.normalize(state["score"][:, spans[name]], dim=1)

            def some(at: int, best: list[int], x: Tensor = x, mlp: Any = mlp, m: Any = m) -> Tensor:
                return mlp(_modulated(x[at, best], m[3][at], m[4][at]))

            value = tokens.refresh(some, score, ratio, interval)
        made.append(x + m[5] * value)
    return made[1], made[0]


def _single(
    block: Any,
    x: Tensor,
    vec: Tensor,
    turn: Any,
    state: dict[str, Any],
    full: bool,
    ratio: float,
    interval: int,
) -> Tensor:
    width = x.shape[2]
    shift, scale, gate = _pieces(block.modulation, vec, 3)
    tokens = state.setdefault("out", Tokens())
    if full:
        both = block.linear1(_modulated(x, shift, scale))
        q, k, v = _heads(both[..., : 3 * width], block.num_heads, block.norm)
        state["attn"], found = attend(_turned(q, turn), _turned(k, turn), v)
        state["score"] = found.mean(dim=(1, 2))
        joined = torch.cat([state["attn"], F.gelu(both[..., 3 * width :], approximate="tanh")], 2)
        return x + gate * tokens.compute(block.linear2(joined))

    def some(at: int, best: list[int]) -> Tensor:
        mlp = block.linear1(_modulated(x[at, best], shift[at], scale[at]))[..., 3 * width :]
        joined = torch.cat([state["attn"][at, best], F.gelu(mlp, approximate="tanh")], dim=1)
        return block.linear2(joined)

    return x + gate * tokens.refresh(some, F.normalize(state["score"], dim=1), ratio, interval)


def _pieces(modulation: Any, vec: Tensor, count: int) -> tuple[Tensor, ...]:
    return modulation.lin(F.silu(vec))[:, None].chunk(count, dim=-1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def _heads(qkv: Tensor, heads: int, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1).flatten(-2)


def _waves(t: Tensor) -> Tensor:
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# Open-Sora.


def opensora(
    model: STDiT3, calls: Sequence[Call], share: float, *, duca: bool = False
) -> Iterator[Tensor]:
    """The output of each call, by ToCa or DuCa; the first halves of a batch are conditioned."""
    kept: dict[Any, dict[str, Any]] = {}
    end = torch.empty(0)
    for step, call in enumerate(calls):
        x, batch = call["x"], len(call["x"])
        frames, high, wide = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        tokens = model.x_embedder(x).unflatten(1, (frames, -1))
        tokens = tokens + model._positions(high, wide, call["height"], call["width"])
        rate = model.fps_embedder(call["fps"])
        rate = rate.repeat(batch // len(rate), 1)
        times = [model.t_embedder(t) + rate for t in (call["timestep"], 0 * call["timestep"])]
        drawn = call.get("x_mask", torch.ones(batch, frames)) != 0
        mask = call.get("mask", torch.ones(batch, call["y"].shape[2]))
        lengths = mask.repeat(batch // len(mask), 1).sum(dim=1).tolist()
        lines = model.y_embedder(call["y"][:, 0])
        text = [line[: int(length)] for line, length in zip(lines, lengths, strict=True)]
        tokens = tokens.flatten(1, 2)
        if not (duca and step > 2 and step % 3 == 2):  # there all blocks are skipped
            for pair in enumerate(zip(model.spatial_blocks, model.temporal_blocks, strict=True)):
                for branch, block in enumerate(pair[1]):
                    state = kept.setdefault((pair[0], branch), {"mlp": Tokens()})
                    modulation = _by_frame(block.scale_shift_table, model.t_block, times, drawn)
                    run = _Block(block, state, modulation, model.rope(frames), share, duca)
                    tokens = run(tokens, text, step)
            end = tokens
        yield _last(model, end, times, drawn, (frames, high, wide))


def _by_frame(table: Tensor, t_block: Any, times: Sequence[Tensor], drawn: Tensor) -> Tensor:
    """Modulation ``(6, B, T, C)`` of each sample's frames."""
    now, still = (t_block(t).unflatten(1, (6, -1)) + table for t in times)
    frames = range(drawn.shape[1])
    rows = [
        torch.stack([now[at] if drawn[at, frame] else still[at] for frame in frames], dim=1)
        for at in range(len(drawn))
    ]
    return torch.stack(rows, dim=1)


def _last(
    model: STDiT3, x: Tensor, times: Sequence[Tensor], drawn: Tensor, grid: tuple[int, int, int]
) -> Tensor:
    """The final layer; as published, given frames are modulated as drawn ones first."""
    tables = [model.final_layer.scale_shift_table + t[:, None] for t in times]
    once = _modulated(x, tables[0][:, :1], tables[0][:, 1:])
    twice = _modulated(once, tables[1][:, :1], tables[1][:, 1:])
    places = grid[1] * grid[2]
    which = drawn[:, :, None].repeat(1, 1, places).flatten(1)
    out = model.final_layer.linear(torch.where(which[..., None], once, twice))
    return model._unpatchify(out, *grid)


class _Block:
    def __init__(
        self, block: Any, state: dict[str, Any], m: Tensor, turn: Any, share: float, duca: bool
    ) -> None:
        self.block, self.state, self.m, self.turn = block, state, m, turn
        self.share, self.duca = share, duca

    def modulated(self, x: Tensor, which: int) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (self.m.shape[2], -1))
        shift, scale = self.m[which][:, :, None], self.m[which + 1][:, :, None]
        return ((1 + scale) * normed + shift).flatten(1, 2)

    def gated(self, value: Tensor, which: int) -> Tensor:
        return (self.m[which][:, :, None] * value.unflatten(1, (self.m.shape[2], -1))).flatten(1, 2)

    def __call__(self, x: Tensor, text: Sequence[Tensor], step: int) -> Tensor:
        state = self.state
        if step <= 2 or step % 3 == 0:
            state["attn"] = self.attention(self.modulated(x, 0))
        x = x + self.gated(state["attn"], 2)
        if step <= 2 or step % 6 == 0:
            state["cross"] = self.cross(x, text)
        x = x + state["cross"]
        inputs = self.modulated(x, 3)
        if step <= 2 or step % 3 == 0:
            value = state["mlp"].compute(self.block.mlp(inputs))
        else:
            score = F.normalize(state["small" if self.duca else "entropy"], dim=1)
            if not self.duca:
                score = score.repeat(2, 1)

            def some(at: int, best: list[int]) -> Tensor:
                return self.block.mlp(inputs[at, best])

            value = state["mlp"].refresh(some, score, self.share * 1.495, 3)
        return x + self.gated(value, 5)

    def attention(self, x: Tensor) -> Tensor:
        """Within frames, or along time; how small values are is kept in the stream's order."""
        attn, frames = self.block.attn, self.m.shape[2]
        grid = x.unflatten(1, (frames, -1))
        rows = (grid.transpose(1, 2) if self.block.temporal else grid).flatten(0, 1)
        q, k, v = attn.qkv(rows).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if self.block.temporal:
            q, k = _turned(q, self.turn), _turned(k, self.turn)
        found = attn.proj(attend(q, k, v)[0])
        small = (1 - v.norm(dim=-1)).sum(dim=1)[..., None]
        found, small = (
            part.unflatten(0, (len(x), -1)).transpose(1, 1 + self.block.temporal).flatten(1, 2)
            for part in (found, small)
        )
        self.state["small"] = small[..., 0]
        return found

    def cross(self, x: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Each sample sees its own text; texts of both halves stand side by side in the map."""
        attn, found, entropies = self.block.cross_attn, [], []
        for sample, words in zip(x, text, strict=True):
            q = attn.q_linear(sample).unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)
            k, v = attn.kv_linear(words).unflatten(-1, (2, attn.num_heads, -1)).permute(1, 2, 0, 3)
            value, seen = attend(q[None], k[None], v[None])
            half = seen[0].mean(dim=0).double() / 2
            entropies.append(-(half * (half + 1e-7).log()).sum(dim=-1))
            found.append(value[0])
        first, second = torch.stack(entropies).chunk(2)
        self.state["entropy"] = 1 + first + second
        return attn.proj(torch.stack(found))
