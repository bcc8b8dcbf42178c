"""The text-to-image transformer FLUX.1, with the weight names of its publication.

Source: the code of black-forest-labs/flux (``model.py`` and ``modules/layers.py``). Published
checkpoints (``flux1-dev.safetensors``, ``flux1-schnell.safetensors``) load without renaming, and
outputs agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.errors import ModelError

from .layers import FREQUENCIES, plain_norm, sinusoids

TIME_SCALE = 1000.0  # timesteps and guidance are embedded in thousandths
LATENT_SIZE = 128  # height and width of the latent of 1024 x 1024 pixels
PATCH = 2  # sides of the patch of latent pixels that becomes a token


class FluxSize(NamedTuple):
    """One published size."""

    guidance_embed: bool
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38


SIZES = {"dev": FluxSize(True), "schnell": FluxSize(False)}
AXES = (16, 56, 56)  # of a head of 128 channels, the published width
TEXT_TOKENS = {True: 512, False: 256}  # by whether guidance is embedded


class Embedder(nn.Module):
    """Two linear layers with SiLU in between: ``(B, D)`` to ``(B, C)``."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_size, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with a scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """Norms of queries and keys, each over the channels of a head."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(head_size), RMSNorm(head_size)


class StreamAttention(nn.Module):
    """What one stream brings to a joint attention, and the projection of what it takes back."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)


class Modulation(nn.Module):
    """Shift, scale and gate from the condition, once or twice."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden_size, parts * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """``(B, C)`` to as many ``(B, 1, C)`` as there are parts."""
        return self.lin(F.silu(vec)).unsqueeze(1).chunk(self.parts, dim=-1)


Rotation = tuple[Tensor, Tensor]  # cosines and sines (B, 1, N, D / 2) of a token's positions


class DoubleBlock(nn.Module):
    """A joint attention of image and text, and an mlp for either."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = int(hidden_size * mlp_ratio)
        self.img_mod, self.txt_mod = (Modulation(hidden_size, 6) for _ in range(2))
        self.img_norm1, self.txt_norm1 = plain_norm(hidden_size), plain_norm(hidden_size)
        self.img_attn, self.txt_attn = (
            StreamAttention(hidden_size, num_heads, qkv_bias) for _ in range(2)
        )
        self.img_norm2, self.txt_norm2 = plain_norm(hidden_size), plain_norm(hidden_size)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(
                nn.Linear(hidden_size, inner),
                nn.GELU(approximate="tanh"),
                nn.Linear(inner, hidden_size),
            )
            for _ in range(2)
        )

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, turn: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Image tokens ``(B, N, C)`` and text tokens ``(B, L, C)`` to the same."""
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        sides = (
            (self.txt_attn, _modulated(self.txt_norm1, txt, *txt_mod[:2])),
            (self.img_attn, _modulated(self.img_norm1, img, *img_mod[:2])),
        )
        heads = [_heads(part.qkv(x), self.num_heads, part.norm) for part, x in sides]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        found = _attend(query, key, value, turn)
        text = txt.shape[1]
        img = img + img_mod[2] * self.img_attn.proj(found[:, text:])
        img = img + img_mod[5] * self.img_mlp(_modulated(self.img_norm2, img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(found[:, :text])
        txt = txt + txt_mod[5] * self.txt_mlp(_modulated(self.txt_norm2, txt, *txt_mod[3:5]))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and mlp side by side: both from one projection, and both into one."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.inner = num_heads, int(hidden_size * mlp_ratio)
        self.hidden_size = hidden_size
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + self.inner)
        self.linear2 = nn.Linear(hidden_size + self.inner, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = plain_norm(hidden_size)
        self.modulation = Modulation(hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, turn: Rotation) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        shift, scale, gate = self.modulation(vec)
        both = self.linear1(_modulated(self.pre_norm, x, shift, scale))
        qkv, mlp = both.split([3 * self.hidden_size, self.inner], dim=-1)
        found = _attend(*_heads(qkv, self.num_heads, self.norm), turn)
        joined = torch.cat([found, F.gelu(mlp, approximate="tanh")], dim=2)
        return x + gate * self.linear2(joined)


class LastLayer(nn.Module):
    """Last modulation and the projection of a token to its patch."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """``(B, N, C)`` and ``(B, C)`` to ``(B, N, out_channels)``."""
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(_modulated(self.norm_final, x, shift, scale))


class Flux(nn.Module):
    """Transformer for flow matching over image and text tokens.

    The defaults are FLUX.1-dev. Parameters get torch's usual random values.

    Args:
        in_channels: of an image token: a packed patch of 2 x 2 latent pixels.
        out_channels: of an output token.
        vec_in_dim: width of the pooled text embedding.
        context_in_dim: width of the text features.
        hidden_size: token width C.
        mlp_ratio: width inside an mlp over ``hidden_size``.
        num_heads: attention heads; divides ``hidden_size``.
        depth: blocks with two streams.
        depth_single_blocks: blocks with one stream.
        axes_dim: channels of a head that each position axis turns; together a whole head.
        theta: longest period of the rotation.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        guidance_embed: whether a guidance strength is embedded (dev) or there is none (schnell).

    Raises:
        ModelError: the sizes do not divide as said.
    """

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int = 64,
        vec_in_dim: int = 768,
        context_in_dim: int = 4096,
        hidden_size: int = 3072,
        mlp_ratio: float = 4.0,
        num_heads: int = 24,
        depth: int = 19,
        depth_single_blocks: int = 38,
        axes_dim: Sequence[int] = AXES,
        theta: int = 10_000,
        qkv_bias: bool = True,
        guidance_embed: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_heads, axes_dim)
        self.axes_dim, self.theta, self.guidance_embed = tuple(axes_dim), theta, guidance_embed
        self.in_channels, self.vec_in_dim = in_channels, vec_in_dim
        self.context_in_dim, self.latent_size = context_in_dim, LATENT_SIZE
        size = FluxSize(guidance_embed, hidden_size, num_heads, depth, depth_single_blocks)
        name = next((name for name, known in SIZES.items() if known == size), None)
        self.arch = f"FLUX-{name}" if name else "FLUX custom"
        self.img_in = nn.Linear(in_channels, hidden_size)
        self.time_in = Embedder(FREQUENCIES, hidden_size)
        self.vector_in = Embedder(vec_in_dim, hidden_size)
        if guidance_embed:
            self.guidance_in = Embedder(FREQUENCIES, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(hidden_size, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden_size, out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicts the velocity of ``img``.

        Args:
            img: image tokens ``(B, N, in_channels)``.
            img_ids: their positions ``(B, N, axes)``.
            txt: text features ``(B, L, context_in_dim)``.
            txt_ids: their positions ``(B, L, axes)``.
            timesteps: ``(B,)``, 1 for noise and 0 for an image.
            y: pooled text embedding ``(B, vec_in_dim)``.
            guidance: strength ``(B,)``; only where ``guidance_embed``.

        Returns:
            ``(B, N, out_channels)``.

        Raises:
            ModelError: an input has another shape, or guidance is missing or not taken.
        """
        self._check_inputs(img, img_ids, txt, txt_ids, guidance)
        vec = self.time_in(_thousandths(timesteps, img))
        if guidance is not None:
            vec = vec + self.guidance_in(_thousandths(guidance, img))
        vec = vec + self.vector_in(y)
        turn = self._rotation(torch.cat([txt_ids, img_ids], dim=1))
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turn)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec, turn)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def example_inputs(self, batch: int = 1) -> tuple[tuple[()], dict[str, Tensor]]:
        """Arguments of one call by name, the same at every call: ``((), inputs)``."""
        side, text = self.latent_size // PATCH, TEXT_TOKENS[self.guidance_embed]
        weight = self.img_in.weight
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator, device="cpu").to(weight)

        # In float32 whatever the weights are: bfloat16 has no whole numbers above 256.
        ids = torch.zeros(batch, side**2, len(self.axes_dim), device=weight.device)
        ids[..., -2] = torch.arange(side**2, device=ids.device) // side
        ids[..., -1] = torch.arange(side**2, device=ids.device) % side
        found = {
            "img": drawn(side**2, self.in_channels),
            "img_ids": ids,
            "txt": drawn(text, self.context_in_dim),
            "txt_ids": torch.zeros(batch, text, len(self.axes_dim), device=weight.device),
            "timesteps": torch.full((batch,), 0.5, device=weight.device),
            "y": drawn(self.vec_in_dim),
        }
        if self.guidance_embed:
            found["guidance"] = torch.full((batch,), 3.5, device=weight.device)
        return (), found

    def _rotation(self, ids: Tensor) -> Rotation:
        """Cosines and sines ``(B, 1, N, D / 2)`` of positions ``(B, N, axes)``.

        Angles are float64, as published: float32 would differ in the last digits.
        """
        angles = []
        for axis, size in enumerate(self.axes_dim):
            exponent = torch.arange(0, size, 2, dtype=torch.float64, device=ids.device) / size
            angles.append(ids[..., axis, None].double() * self.theta**-exponent)
        angle = torch.cat(angles, dim=-1).unsqueeze(1)
        return angle.cos().float(), angle.sin().float()

    def _check_inputs(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, guidance: Tensor | None
    ) -> None:
        for name, x, ids, width in (
            ("img", img, img_ids, self.in_channels),
            ("txt", txt, txt_ids, self.context_in_dim),
        ):
            axes = len(self.axes_dim)
            fits = x.ndim == 3 and x.shape[-1] == width
            if not fits or ids.ndim != 3 or ids.shape[1:] != (x.shape[1], axes):
                raise ModelError(
                    f"{name} and {name}_ids of {self.arch} have the wrong shape",
                    expected=f"(B, tokens, {width}) and (B, tokens, {axes})",
                    found=f"{tuple(x.shape)} and {tuple(ids.shape)}",
                )
        if (guidance is not None) != self.guidance_embed:
            raise ModelError(
                f"{self.arch} {'lacks' if guidance is None else 'takes no'} guidance",
                expected="a strength (B,)" if self.guidance_embed else "guidance left out",
            )


def _check_sizes(hidden_size: int, num_heads: int, axes_dim: Sequence[int]) -> None:
    if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
        what = f"hidden_size {hidden_size} cannot be divided by num_heads"
        raise ModelError(what, expected=f"a multiple of {num_heads}", found=str(hidden_size))
    head = hidden_size // num_heads
    if sum(axes_dim) != head or any(size < 2 or size % 2 for size in axes_dim):
        raise ModelError(
            f"axes_dim do not fill a head of {head} channels",
            expected=f"even numbers whose sum is {head}",
            found=str(list(axes_dim)),
        )


def _thousandths(x: Tensor, like: Tensor) -> Tensor:
    """Sinusoids ``(B, 256)`` of timesteps or guidance ``(B,)``."""
    return sinusoids(TIME_SCALE * x).to(like.dtype)


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * norm(x) + shift


def _heads(qkv: Tensor, num_heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, N, 3 C)`` to normed queries, normed keys and values, each ``(B, H, N, D)``."""
    split = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)
    return norm.query_norm(query), norm.key_norm(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor, turn: Rotation) -> Tensor:
    """Attention with rotated queries and keys ``(B, H, N, D)``, as ``(B, N, C)``."""
    found = F.scaled_dot_product_attention(_turned(query, turn), _turned(key, turn), value)
    return found.transpose(1, 2).flatten(2)


def _turned(x: Tensor, turn: Rotation) -> Tensor:
    """Each pair of neighbouring channels, turned by its angle."""
    cos, sin = turn
    first, second = x.unflatten(-1, (-1, 2)).to(cos.dtype).unbind(-1)
    pairs = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)
    return pairs.flatten(-2).to(x.dtype)
