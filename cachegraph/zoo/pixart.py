"""The text-conditional diffusion transformer PixArt-alpha, with its published weight names.

Source: Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic
Text-to-Image Synthesis" (2023), and the code of PixArt-alpha/PixArt-alpha. Published checkpoints
load without renaming, and outputs agree to rounding. The variant for images of many shapes
(``PixArt-XL-2-1024-MS.pth``), which also embeds their size, is not built here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.errors import ModelError

from .layers import (
    Attention,
    Mlp,
    ModelSize,
    PatchTransformer,
    check_shape,
    modulate,
    plain_norm,
    position_embedding,
    random_normal,
)

SIZES = {"XL": ModelSize(28, 1152, 16)}
PATCH_SIZES = (2,)
MODULATIONS = 6  # shift, scale and gate, for self-attention and for the mlp


class CaptionEmbedder(nn.Module):
    """Embeds text features ``(B, L, D)`` as ``(B, L, C)``.

    ``y_embedding`` holds the features of the null caption, ``(model_max_length, D)``. In training
    each caption becomes the null caption with probability ``dropout_prob``.
    """

    y_embedding: Tensor

    def __init__(
        self, caption_channels: int, hidden_size: int, dropout_prob: float, model_max_length: int
    ) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        std = caption_channels**-0.5
        null = random_normal(model_max_length, caption_channels, std=std)
        self.register_buffer("y_embedding", null)

    def forward(self, y: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, C)``; in training L is ``model_max_length``."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], 1, 1, device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.y_embedding, y)
        return self.y_proj(y)


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens ``(B, N, C)`` to text tokens ``(B, L, C)``.

    The published code strings the valid text tokens of all samples together and lets each image
    token see those of its own sample (block-diagonal attention). Here the text stays a padded
    batch and the padding is masked: a masked token has weight 0 in the softmax, so the output is
    the same, and the shapes do not depend on the contents of the mask.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Attends to the text tokens that are valid.

        Args:
            x: image tokens ``(B, N, C)``.
            y: text tokens ``(B, L, C)``.
            mask: ``(B, 1, 1, L)``, true for valid text tokens; None where all are.

        Returns:
            ``(B, N, C)``.
        """
        batch, tokens, width = x.shape
        head_size = width // self.num_heads
        query = self.q_linear(x).reshape(batch, tokens, self.num_heads, head_size).transpose(1, 2)
        kv = self.kv_linear(y).reshape(batch, y.shape[1], 2, self.num_heads, head_size)
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, C / H)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and mlp, modulated by adaLN-single.

    The modulation of the timestep is computed once for all blocks; each adds its own table to it.
    Cross-attention has neither norm nor gate.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = Mlp(hidden_size, round(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = random_table(MODULATIONS, hidden_size)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        """One block.

        Args:
            x: image tokens ``(B, N, C)``.
            y: text tokens ``(B, L, C)``.
            c: modulation of the timestep ``(B, 6, C)``.
            mask: as of :meth:`CrossAttention.forward`.

        Returns:
            Image tokens ``(B, N, C)``.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + c).unbind(1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, y, mask)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class T2IFinalLayer(nn.Module):
    """Last modulation and the projection of a token to the pixels of its patch."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)
        self.scale_shift_table = random_table(2, hidden_size)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens ``(B, N, C)``, embedded timesteps ``(B, C)`` to ``(B, N, out_size)``."""
        shift, scale = (self.scale_shift_table + t.unsqueeze(1)).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PixArt(PatchTransformer):
    """Diffusion transformer: noisy image, timestep and text features to predicted noise.

    The defaults are PixArt-XL/2 for 256x256 images (latents of 32x32). Parameters get torch's
    usual random values; training from scratch wants the start of the publication instead.

    ``pos_embed`` counts tokens, as the published model for 256x256 images does: its base size is
    its grid size and its scale (``lewei_scale``) is 1. A checkpoint brings its own.

    Args:
        input_size: height and width of the (latent) image, a multiple of ``patch_size``.
        patch_size: height and width of the patch that becomes one token.
        in_channels: channels of the (latent) image.
        hidden_size: token width C, a multiple of ``num_heads`` and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width inside the mlp over ``hidden_size``.
        class_dropout_prob: how often training drops the caption.
        pred_sigma: whether a variance is predicted in as many further channels.
        caption_channels: width D of the text features.
        model_max_length: text tokens of the null caption.

    Raises:
        ModelError: the sizes do not divide as said.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 120,
    ) -> None:
        size = ModelSize(depth, hidden_size, num_heads)
        known = SIZES if mlp_ratio == 4 and patch_size in PATCH_SIZES else {}
        super().__init__(("PixArt", known), size, input_size, patch_size, in_channels, pred_sigma)
        self.caption_channels, self.model_max_length = caption_channels, model_max_length
        self.pred_sigma = pred_sigma
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, MODULATIONS * hidden_size))
        self.y_embedder = CaptionEmbedder(
            caption_channels, hidden_size, class_dropout_prob, model_max_length
        )
        side = input_size // patch_size
        self.register_buffer("pos_embed", position_embedding(hidden_size, side))
        self.blocks = nn.ModuleList(
            PixArtBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = T2IFinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predicts the noise in ``x`` (and a variance in further channels if ``pred_sigma``).

        Args:
            x: noisy images ``(B, in_channels, input_size, input_size)``.
            t: timesteps ``(B,)``, integer or fractional.
            y: text features ``(B, 1, L, caption_channels)``, as the published code has them, or
                ``(B, L, caption_channels)``; each caption padded to L tokens.
            mask: ``(B, L)``, not 0 for valid text tokens, of which every sample has at least one;
                with fewer rows, which divide B, they are repeated, as published. None where no
                text token is padding.

        Returns:
            ``(B, out_channels, input_size, input_size)``.

        Raises:
            ModelError: ``x``, ``y`` or ``mask`` has another shape than said.
        """
        wanted = (self.in_channels, self.input_size, self.input_size)
        check_shape(f"input of {self.arch}", x, wanted)
        text = self._text(y)
        valid = None if mask is None else attended(mask, text)
        x = self.x_embedder(x) + self.pos_embed
        t = self.t_embedder(t)
        c = self.t_block(t).unflatten(1, (MODULATIONS, -1))
        text = self.y_embedder(text)
        for block in self.blocks:
            x = block(x, text, c, valid)
        return self.unpatchify(self.final_layer(x, t))

    def example_condition(self, batch: int, generator: torch.Generator) -> Tensor:
        """Text features ``(B, 1, L, D)``; no token is padding."""
        text = (batch, 1, self.model_max_length, self.caption_channels)
        return torch.randn(text, generator=generator, device="cpu")

    def _text(self, y: Tensor) -> Tensor:
        """``(B, 1, L, D)`` or ``(B, L, D)`` to ``(B, L, D)``."""
        one_caption = y.ndim == 3 or (y.ndim == 4 and y.shape[1] == 1)
        if not one_caption or y.shape[-1] != self.caption_channels:
            width = self.caption_channels
            raise ModelError(
                f"text of {self.arch} has the wrong shape",
                expected=f"(B, 1, L, {width}) or (B, L, {width})",
                found=str(tuple(y.shape)),
            )
        return y if y.ndim == 3 else y.squeeze(1)


def attended(mask: Tensor, text: Tensor) -> Tensor:
    """``(B, L)`` as a bool ``(B, 1, 1, L)``, its rows repeated where there are fewer than B."""
    batch, tokens, _ = text.shape
    fits = mask.ndim == 2 and mask.shape[1] == tokens and mask.shape[0] > 0
    if not fits or batch % mask.shape[0]:
        longer = mask.ndim == 2 and tokens > mask.shape[1]
        raise ModelError(
            "the text is longer than its mask" if longer else "mask of the text has another shape",
            place="mask",
            expected=f"({batch}, {tokens}), or a divisor of {batch} rows",
            found=str(tuple(mask.shape)),
            remedy="cut the text, or say in the mask which of its tokens count" if longer else "",
        )
    if mask.shape[0] != batch:
        mask = mask.repeat(batch // mask.shape[0], 1)
    return (mask != 0)[:, None, None, :]


def random_table(rows: int, hidden_size: int) -> nn.Parameter:
    """A table ``(rows, C)`` of shifts and scales that blocks add to the timestep's."""
    return nn.Parameter(random_normal(rows, hidden_size, std=hidden_size**-0.5))
