"""The text-to-video transformer STDiT3 of Open-Sora 1.2, with its published weight names.

Source: the code of hpcaitech/Open-Sora (``opensora/models/stdit/stdit3.py`` and
``layers/blocks.py``). Published checkpoints load without renaming, and outputs agree to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.errors import ModelError

from .layers import Mlp, ModelSize, TimestepEmbedder, modulate, plain_norm
from .pixart import (
    MODULATIONS,
    CaptionEmbedder,
    CrossAttention,
    T2IFinalLayer,
    attended,
    random_table,
)

SIZES = {"XL": ModelSize(28, 1152, 16), "3B": ModelSize(28, 1872, 26)}
LATENT = (15, 60, 106)  # frames, height and width of the latent of 2 s at 480p (480 x 854 pixels)
PIXELS = (480.0, 854.0)
PERIOD = 10_000.0  # of positions, in space and in time
Times = tuple[Tensor, ...]  # of drawn frames and, where some are given, of these, at timestep 0


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class RotaryFrequencies(nn.Module):
    """Frequencies at which a frame's number turns the channels of a head; they are weights."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        self.freqs = nn.Parameter(PERIOD**-exponent, requires_grad=False)

    def forward(self, frames: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(T, D / 2)``."""
        place = torch.arange(frames, dtype=self.freqs.dtype, device=self.freqs.device)
        angle = place[:, None] * self.freqs
        return angle.cos(), angle.sin()


class BranchAttention(nn.Module):
    """Self-attention within frames, or along time within places; there with rotations."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        split = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if turn is not None:
            query, key = _turned(query, *turn), _turned(key, *turn)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    """Self-attention in space or in time, cross-attention and mlp, modulated by adaLN-single."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = plain_norm(hidden_size)
        self.attn = BranchAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = random_table(MODULATIONS, hidden_size)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        c: Times,
        mask: Tensor | None,
        frames: int,
        turn: tuple[Tensor, Tensor],
        drawn: Tensor | None,
    ) -> Tensor:
        """One block.

        Args:
            x: video tokens ``(B, T S, C)``, frame by frame.
            y: text tokens ``(B, L, C)``.
            c: modulation of each time ``(B, 6, C)``.
            mask: ``(B, 1, 1, L)``, true for valid text tokens.
            frames: T.
            turn: rotation along time.
            drawn: ``(B, T S, 1)``, true for tokens of drawn frames; None where all are.

        Returns:
            Video tokens ``(B, T S, C)``.
        """
        modulation = [(self.scale_shift_table + one).unsqueeze(2).unbind(1) for one in c]
        still = self.norm1(x)
        found = _by_frame(drawn, [still * (1 + m[1]) + m[0] for m in modulation])
        grid = found.unflatten(1, (frames, -1))
        if self.temporal:
            grid = grid.transpose(1, 2)
        found = self.attn(grid.flatten(0, 1), turn if self.temporal else None)
        found = found.unflatten(0, (x.shape[0], -1))
        if self.temporal:
            found = found.transpose(1, 2)
        found = found.flatten(1, 2)
        x = x + _by_frame(drawn, [m[2] * found for m in modulation])
        x = x + self.cross_attn(x, y, mask)
        still = self.norm2(x)
        found = self.mlp(_by_frame(drawn, [still * (1 + m[4]) + m[3] for m in modulation]))
        return x + _by_frame(drawn, [m[5] * found for m in modulation])


class VideoFinalLayer(T2IFinalLayer):
    """Last modulation and projection; given frames pass the norm twice, as published."""

    def forward(self, x: Tensor, t: Times, drawn: Tensor | None) -> Tensor:  # type: ignore[override]
        """Tokens ``(B, N, C)``, embedded times ``(B, C)`` to ``(B, N, out_size)``."""
        found = [x]
        for one in t:
            shift, scale = (self.scale_shift_table + one.unsqueeze(1)).unbind(1)
            found.append(modulate(self.norm_final(found[-1]), shift, scale))
        return self.linear(_by_frame(drawn, found[1:]))


class PatchEmbed3D(nn.Module):
    """Cuts a video ``(B, C_in, T, H, W)`` into patches and embeds them: ``(B, N, C)``."""

    def __init__(self, patch_size: Sequence[int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        frames, height, width = patch_size
        size = (frames, height, width)
        self.proj = nn.Conv3d(in_channels, hidden_size, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, T, H, W)`` to ``(B, N, C)``."""
        return self.proj(x).flatten(2).transpose(1, 2)


class STDiT3(nn.Module):
    """Diffusion transformer: noisy video, timestep and text features to predicted velocity.

    The defaults are STDiT3-XL/2. Parameters get torch's usual random values. A video whose sides
    are no multiples of ``patch_size`` is padded, and its output cut, as published.

    Args:
        in_channels: channels of the latent video.
        patch_size: frames, height and width of the patch that becomes one token.
        hidden_size: token width C, a multiple of ``num_heads`` and of 4.
        depth: blocks in space, and as many in time.
        num_heads: attention heads.
        mlp_ratio: width inside an mlp over ``hidden_size``.
        caption_channels: width D of the text features.
        model_max_length: text tokens of the null caption.
        qk_norm: whether queries and keys are normed.
        input_sq_size: side in pixels of the square that positions are scaled by.
        pred_sigma: whether a variance is predicted in as many further channels.
        class_dropout_prob: how often training drops the caption.

    Raises:
        ModelError: the sizes do not divide as said.
    """

    def __init__(
        self,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        input_sq_size: int = 512,
        pred_sigma: bool = True,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        for name, by in (("num_heads", num_heads), ("the 4 parts of a position", 4)):
            if by < 1 or hidden_size % by:
                what = f"hidden_size {hidden_size} cannot be divided by {name}"
                raise ModelError(what, expected=f"a multiple of {by}", found=str(hidden_size))
        self.in_channels, self.caption_channels = in_channels, caption_channels
        self.out_channels = in_channels * (1 + pred_sigma)
        self.patch_size, self.input_sq_size = tuple(patch_size), input_sq_size
        self.hidden_size, self.model_max_length = hidden_size, model_max_length
        self.latent_size = LATENT
        size = ModelSize(depth, hidden_size, num_heads)
        letter = next((name for name, known in SIZES.items() if known == size), None)
        self.arch = f"STDiT3-{letter}/{self.patch_size[-1]}" if letter else "STDiT3 custom"
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, MODULATIONS * hidden_size))
        self.y_embedder = CaptionEmbedder(
            caption_channels, hidden_size, class_dropout_prob, model_max_length
        )
        self.rope = RotaryFrequencies(hidden_size // num_heads)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(
                STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal)
                for _ in range(depth)
            )
            for temporal in (False, True)
        )
        out_size = math.prod(self.patch_size) * self.out_channels
        self.final_layer = VideoFinalLayer(hidden_size, out_size)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> Tensor:
        """Predicts the velocity of ``x`` (and a variance in further channels if ``pred_sigma``).

        Args:
            x: noisy latent videos ``(B, in_channels, T, H, W)``.
            timestep: ``(B,)``.
            y: text features ``(B, 1, L, caption_channels)``; each caption padded to L tokens.
            mask: ``(B, L)``, not 0 for valid text tokens, of which every sample has at least one;
                with fewer rows, which divide B, they are repeated, as published. None where no
                text token is padding.
            x_mask: ``(B, T)``, not 0 for frames that are drawn, T counted in tokens; the others
                are given and take part as if at timestep 0. None where all are drawn.
            fps: frames a second ``(B,)``, or as many rows as ``mask``.
            height: of the video in pixels ``(B,)``; only the first counts, as published.
            width: likewise.

        Returns:
            ``(B, out_channels, T, H, W)`` in float32.

        Raises:
            ModelError: an input has another shape than said, or is missing.
        """
        self._check_inputs(x, y)
        if fps is None or height is None or width is None:
            what = f"{self.arch} needs fps, height and width"
            raise ModelError(what, expected="a tensor (B,) for each of them")
        dtype = self.x_embedder.proj.weight.dtype
        text = y.squeeze(1)
        valid = None if mask is None else attended(mask, text)
        sizes = x.shape[2:]
        x = F.pad(
            x,
            [
                n
                for s, p in zip(sizes[::-1], self.patch_size[::-1], strict=True)
                for n in (0, -s % p)
            ],
        ).to(dtype)
        frames, high, wide = (s // p for s, p in zip(x.shape[2:], self.patch_size, strict=True))
        tokens = self.x_embedder(x).unflatten(1, (frames, -1))
        tokens = (tokens + self._positions(high, wide, height, width).to(dtype)).flatten(1, 2)
        drawn = (
            None if x_mask is None else self._drawn(x_mask, tokens.shape[0], frames, high * wide)
        )
        rate = _repeated("fps", self.fps_embedder(fps), x.shape[0])
        moments = (timestep,) if drawn is None else (timestep, torch.zeros_like(timestep))
        t = tuple(self.t_embedder(moment) + rate for moment in moments)
        c = tuple(self.t_block(one).unflatten(1, (MODULATIONS, -1)) for one in t)
        text = self.y_embedder(text.to(dtype))
        turn = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, text, c, valid, frames, turn, drawn)
            tokens = temporal(tokens, text, c, valid, frames, turn, drawn)
        out = self._unpatchify(self.final_layer(tokens, t, drawn), frames, high, wide)
        return out[:, :, : sizes[0], : sizes[1], : sizes[2]].float()

    def example_inputs(self, batch: int = 2) -> tuple[tuple[()], dict[str, Tensor]]:
        """Arguments of one call by name, the same at every call: ``((), inputs)``."""
        weight = self.x_embedder.proj.weight
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator, device="cpu").to(weight)

        def all_of(number: float) -> Tensor:
            return torch.full((batch,), number, device=weight.device)

        text = self.model_max_length
        return (), {
            "x": drawn(self.in_channels, *self.latent_size),
            "timestep": all_of(500.0),
            "y": drawn(1, text, self.caption_channels),
            "mask": torch.ones(batch, text, dtype=torch.int64, device=weight.device),
            "fps": all_of(24.0),
            "height": all_of(PIXELS[0]),
            "width": all_of(PIXELS[1]),
        }

    def _drawn(self, x_mask: Tensor, batch: int, frames: int, places: int) -> Tensor:
        """``(B, T)`` as a bool ``(B, T S, 1)``."""
        if tuple(x_mask.shape) != (batch, frames):
            raise ModelError(
                f"mask of the frames of {self.arch} has the wrong shape",
                place="x_mask",
                expected=f"({batch}, {frames}): a row a sample, a number a frame of tokens",
                found=str(tuple(x_mask.shape)),
            )
        return (x_mask != 0).unsqueeze(2).expand(-1, -1, places).flatten(1).unsqueeze(2)

    def _positions(self, high: int, wide: int, height: Tensor, width: Tensor) -> Tensor:
        """Sines and cosines ``(S, C)`` of a frame's places, scaled by its size in pixels."""
        pixels = (height[0].double() * width[0].double()).sqrt()
        scale = (self.input_sq_size / pixels).float()
        base = round((high * wide) ** 0.5)
        omega = PERIOD ** -(
            torch.arange(0, self.hidden_size // 2, 2, device=height.device).float()
            / (self.hidden_size // 2)
        )
        lines = []
        for size in (wide, high):  # columns come first
            place = torch.arange(size, device=height.device).float() * scale * (base / size)
            angle = place[:, None] * omega
            lines.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
        column = lines[0].expand(high, -1, -1)
        row = lines[1][:, None].expand(-1, wide, -1)
        return torch.cat([column, row], dim=-1).flatten(0, 1)

    def _unpatchify(self, x: Tensor, frames: int, high: int, wide: int) -> Tensor:
        """Puts the values of every token where its patch is."""
        patch = self.patch_size
        x = x.unflatten(-1, (*patch, self.out_channels)).unflatten(1, (frames, high, wide))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _check_inputs(self, x: Tensor, y: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ModelError(
                f"input of {self.arch} has the wrong shape",
                expected=f"(B, {self.in_channels}, frames, height, width)",
                found=str(tuple(x.shape)),
            )
        if y.ndim != 4 or y.shape[1] != 1 or y.shape[-1] != self.caption_channels:
            raise ModelError(
                f"text of {self.arch} has the wrong shape",
                expected=f"(B, 1, L, {self.caption_channels})",
                found=str(tuple(y.shape)),
            )


def _by_frame(drawn: Tensor | None, found: Sequence[Tensor]) -> Tensor:
    """Tokens ``(B, N, C)`` as of drawn frames, or as of given ones where ``drawn`` is false."""
    return found[0] if drawn is None else torch.where(drawn, found[0], found[1])


def _repeated(name: str, rows: Tensor, batch: int) -> Tensor:
    """Rows ``(R, C)`` as often as it takes to be a batch."""
    if rows.shape[0] == batch:
        return rows
    if batch % rows.shape[0]:
        what = f"{name} has the wrong number of rows"
        raise ModelError(what, expected=f"a divisor of {batch}", found=str(rows.shape[0]))
    return rows.repeat(batch // rows.shape[0], 1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of neighbouring channels of ``(B, H, T, D)``, turned by its angle."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return pairs.flatten(-2)
