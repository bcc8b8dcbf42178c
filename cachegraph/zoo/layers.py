"""Layers that the known diffusion transformers have in common, under their published names.

Source: the code of facebookresearch/DiT, from which PixArt-alpha took them over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.errors import ModelError

MAX_PERIOD = 10000.0  # of the timestep embedding, in timesteps over 2 pi
FREQUENCIES = 256  # width of the sinusoidal timestep embedding, in all published sizes
CFG_CHANNELS = 3  # the published code guides three of the four latent channels


class ModelSize(NamedTuple):
    """One published model size."""

    depth: int
    hidden_size: int
    num_heads: int


def random_normal(*shape: int, std: float = 1.0) -> Tensor:
    """Normal numbers around 0; on the meta device none are drawn.

    There torch would import its compiler for it, which takes a second.
    """
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_(std=std)


def position_embedding(width: int, grid_size: int) -> Tensor:
    """Fixed sine-cosine embedding of a square token grid, in row-major order.

    The first half of the features encodes the column, the second half the row; each half holds
    sines, then cosines.

    Args:
        width: number of features, a multiple of 4.
        grid_size: tokens along one side.

    Returns:
        ``(1, grid_size**2, width)`` in float32; without contents on the meta device, as for
        :func:`random_normal`.
    """
    empty = torch.empty(1, grid_size**2, width)
    if empty.is_meta:
        return empty
    quarter = width // 4
    # float64 as in the published code: float32 angles would differ in the last digits
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = line.repeat(grid_size, 1)
    row = line.repeat_interleave(grid_size, dim=0)
    return torch.cat([column, row], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` with ``x (B, N, C)`` and per-sample ``(B, C)`` modulation."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Cuts an image ``(B, C_in, H, W)`` into patches and embeds them: ``(B, N, C)``."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, N, C)``."""
        return self.proj(x).flatten(2).transpose(1, 2)


def sinusoids(t: Tensor) -> Tensor:
    """Cosines, then sines ``(B, 256)`` of numbers ``(B,)`` at geometrically spaced frequencies."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    # The exponential of float32 differs in its last bit from one processor to the next, which a
    # timestep of 999 makes larger than all that a model rounds; that of float64, rounded, does not.
    frequency = torch.exp((-math.log(MAX_PERIOD) * exponent).double()).float()
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Embeds timesteps as cosines, then sines, at geometrically spaced frequencies."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps ``(B,)``, integer or fractional, to ``(B, C)``."""
        embedding = sinusoids(t)
        dtype = next(self.mlp.parameters()).dtype
        # a cast that does nothing would still be a node of the traced graph
        return self.mlp(embedding if dtype == torch.float32 else embedding.to(dtype))


class Attention(nn.Module):
    """Multi-head self-attention over ``(B, N, C)``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, C / H)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between, per token."""

    def __init__(self, in_size: int, inner_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_size)`` to ``(..., out_size)``."""
        return self.fc2(self.act(self.fc1(x)))


def plain_norm(hidden_size: int) -> nn.LayerNorm:
    """A LayerNorm without parameters: scale and shift come from the condition instead."""
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


def check_shape(what: str, x: Tensor, wanted: tuple[int, ...]) -> None:
    """Refuses a tensor that is not ``(B, *wanted)``."""
    if tuple(x.shape[1:]) != wanted:
        raise ModelError(
            f"{what} has the wrong shape",
            expected=f"(B, {', '.join(map(str, wanted))})",
            found=str(tuple(x.shape)),
        )


class PatchTransformer(nn.Module):
    """What the known diffusion transformers over patches of an image have in common.

    A subclass adds blocks and what embeds its condition y, and is called with ``(x, t, y)``.

    Args:
        names: of the family and of its published sizes; ``arch`` is ``DiT-XL/2`` for one of them,
            else ``DiT custom``.
        size: of the transformer.
        input_size: height and width of the (latent) image, a multiple of ``patch_size``.
        patch_size: height and width of the patch that becomes one token.
        in_channels: channels of the (latent) image.
        variance: whether a variance is predicted in as many further channels.

    Raises:
        ModelError: the sizes do not divide as said.
    """

    def __init__(
        self,
        names: tuple[str, Mapping[str, ModelSize]],
        size: ModelSize,
        input_size: int,
        patch_size: int,
        in_channels: int,
        variance: bool,
    ) -> None:
        super().__init__()
        for name, value, by_name, by in (
            ("input_size", input_size, "patch_size", patch_size),
            ("hidden_size", size.hidden_size, "num_heads", size.num_heads),
            ("hidden_size", size.hidden_size, "the 4 parts of pos_embed", 4),
        ):
            if by < 1 or value < 1 or value % by:
                what = f"{name} {value} cannot be divided by {by_name}"
                raise ModelError(what, expected=f"a positive multiple of {by}", found=str(value))
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_heads, self.out_channels = size.num_heads, in_channels * (1 + variance)
        family, sizes = names
        letter = next((letter for letter, known in sizes.items() if known == size), None)
        self.arch = f"{family} custom" if letter is None else f"{family}-{letter}/{patch_size}"
        self.x_embedder = PatchEmbed(patch_size, in_channels, size.hidden_size)
        self.t_embedder = TimestepEmbedder(size.hidden_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Puts the pixels of every token, ``(B, N, patch_size**2 * C_out)``, where its patch is."""
        batch, patch, side = x.shape[0], self.patch_size, self.input_size // self.patch_size
        channels = x.shape[2] // patch**2
        x = x.reshape(batch, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, channels, side * patch, side * patch)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, *more: Any, **named: Any
    ) -> Tensor:
        """Classifier-free guidance on a doubled batch [cond; uncond].

        Both halves see the first half of ``x``. As published, only the first three noise channels
        are guided; a model with fewer than four channels has all its noise channels guided.

        Args:
            x: ``(2 B, in_channels, input_size, input_size)``; the second half is not read.
            t: ``(2 B,)``.
            y: as ``forward`` takes it, the null class or caption in the second half.
            cfg_scale: 1 is no guidance.
            more: further arguments of ``forward``.
            named: the same by name.

        Returns:
            ``(2 B, out_channels, input_size, input_size)``; both halves hold the guided noise,
            each keeps its own further channels.

        Raises:
            ModelError: as for ``forward``.
        """
        half = x[: x.shape[0] // 2]
        out = self.forward(torch.cat([half, half]), t, y, *more, **named)
        guided = min(CFG_CHANNELS, self.in_channels)
        cond, uncond = out[:, :guided].chunk(2)
        noise = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([noise, noise]), out[:, guided:]], dim=1)

    def example_inputs(
        self, batch: int = 2, device: torch.device | str | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Arguments for one call, the same at every call: ``((x, t, y), {})``.

        Args:
            batch: B.
            device: where the tensors are, ``"meta"`` included; None means the model's.

        Returns:
            Positional arguments as of ``forward``, and no keyword arguments.
        """
        weight = self.x_embedder.proj.weight
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.in_channels, self.input_size, self.input_size)
        x = torch.randn(shape, generator=generator, device="cpu")
        t = torch.full((batch,), 500, dtype=torch.int64, device="cpu")
        y = self.example_condition(batch, generator)
        target = weight.device if device is None else torch.device(device)
        x, y = (v.to(target, weight.dtype if v.is_floating_point() else v.dtype) for v in (x, y))
        return (x, t.to(target), y), {}

    def example_condition(self, batch: int, generator: torch.Generator) -> Tensor:
        """The y of :meth:`example_inputs`, on the CPU."""
        raise NotImplementedError
