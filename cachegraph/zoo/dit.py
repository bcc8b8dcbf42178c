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
    PatchTransformer,
    check_shape,
    modulate,
    plain_norm,
    position_embedding,
    random_normal,
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


class DiT(PatchTransformer):
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
        size = ModelSize(depth, hidden_size, num_heads)
        known = SIZES if mlp_ratio == 4 and patch_size in PATCH_SIZES else {}
        super().__init__(("DiT", known), size, input_size, patch_size, in_channels, learn_sigma)
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
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
        return self.unpatchify(self.final_layer(x, c))

    def example_condition(self, batch: int, generator: torch.Generator) -> Tensor:
        """Labels ``(B,)``: 0, 1, 2 and so on."""
        return torch.arange(batch, dtype=torch.int64, device="cpu") % self.num_classes
