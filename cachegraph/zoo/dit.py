"""The class-conditional diffusion transformer DiT, with the weight names of its publication.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022), and the code of
facebookresearch/DiT. Published checkpoints load without renaming, and outputs agree to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import (
    Attention,
    Mlp,
    ModelSize,
    PatchEmbed,
    TimestepEmbedder,
    arch_name,
    check_divides,
    check_shape,
    guide,
    modulate,
    plain_norm,
    position_embedding,
    random_normal,
    unpatchify,
)

SIZES = {
    "S": ModelSize(12, 384, 6),
    "B": ModelSize(12, 768, 12),
    "L": ModelSize(24, 1024, 16),
    "XL": ModelSize(28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)


class LabelEmbedder(nn.Module):
    """Embeds class labels ``(B,)`` as ``(B, C)``; label ``num_classes`` is the null class.

    In training each label becomes the null class with probability ``dropout_prob``. Without
    dropout there is no null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        table = random_normal(num_classes + (dropout_prob > 0), hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y: Tensor) -> Tensor:
        """``(B,)`` to ``(B, C)``."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class Block(nn.Module):
    """Transformer block whose shifts, scales and gates come from the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = Mlp(hidden_size, round(hidden_size * mlp_ratio), hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` and condition ``(B, C)`` to tokens ``(B, N, C)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Last modulation and the projection of a token to the pixels of its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """``(B, N, C)`` and ``(B, C)`` to ``(B, N, patch * patch * C_out)``."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer: noisy image, timestep and class to predicted noise.

    The defaults are DiT-XL/2 for 256x256 images (latents of 32x32). Parameters get torch's usual
    random values; training from scratch wants the adaLN-Zero start of the publication instead.

    Args:
        input_size: height and width of the (latent) image, a multiple of ``patch_size``.
        patch_size: height and width of the patch that becomes one token.
        in_channels: channels of the (latent) image.
        hidden_size: token width C, a multiple of ``num_heads`` and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width inside the mlp over ``hidden_size``.
        class_dropout_prob: how often training drops the label; 0 means no null class.
        num_classes: classes; label ``num_classes`` is the null class.
        learn_sigma: whether a variance is predicted in as many further channels.

    Raises:
        ModelError: the sizes do not divide as said.
    """

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
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        check_divides("input_size", input_size, "patch_size", patch_size)
        check_divides("hidden_size", hidden_size, "num_heads", num_heads)
        check_divides("hidden_size", hidden_size, "the 4 parts of pos_embed", 4)
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.num_heads, self.learn_sigma = num_heads, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        size = ModelSize(depth, hidden_size, num_heads)
        known = mlp_ratio == 4 and patch_size in PATCH_SIZES
        self.arch = arch_name("DiT", SIZES if known else {}, size, patch_size)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            position_embedding(hidden_size, input_size // patch_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts the noise in ``x`` (and a variance in further channels if ``learn_sigma``).

        Args:
            x: noisy images ``(B, in_channels, input_size, input_size)``.
            t: timesteps ``(B,)``, integer or fractional.
            y: class labels ``(B,)``, int64.

        Returns:
            ``(B, out_channels, input_size, input_size)``.

        Raises:
            ModelError: ``x`` has another number of channels, height or width.
        """
        wanted = (self.in_channels, self.input_size, self.input_size)
        check_shape(f"input of {self.arch}", x, wanted)
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        side = self.input_size // self.patch_size
        return unpatchify(self.final_layer(x, c), self.patch_size, side)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance on a doubled batch [cond; uncond].

        Both halves see the first half of ``x``. As published, only the first three noise channels
        are guided; a model with fewer than four channels has all its noise channels guided.

        Args:
            x: ``(2 B, in_channels, input_size, input_size)``; the second half is not read.
            t: ``(2 B,)``.
            y: ``(2 B,)``, the null class in the second half.
            cfg_scale: 1 is no guidance.

        Returns:
            ``(2 B, out_channels, input_size, input_size)``; both halves hold the guided noise,
            each keeps its own further channels.

        Raises:
            ModelError: as for :meth:`forward`.
        """
        half = x[: x.shape[0] // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        return guide(out, self.in_channels, cfg_scale)

    def example_inputs(
        self, batch: int = 2, device: torch.device | str | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Arguments for one call, the same at every call: ``((x, t, y), {})``.

        Args:
            batch: B.
            device: where the tensors are, ``"meta"`` included; None means the model's.

        Returns:
            Positional arguments as of :meth:`forward`, and no keyword arguments.
        """
        weight = self.x_embedder.proj.weight
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.in_channels, self.input_size, self.input_size)
        x = torch.randn(shape, generator=generator, device="cpu")
        t = torch.full((batch,), 500, dtype=torch.int64, device="cpu")
        y = torch.arange(batch, dtype=torch.int64, device="cpu") % self.num_classes
        target = weight.device if device is None else torch.device(device)
        return (x.to(target, weight.dtype), t.to(target), y.to(target)), {}
