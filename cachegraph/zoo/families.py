"""Families of models: what tells them from each other, and their sizes, in names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from cachegraph.errors import ModelError

from . import dit, pixart
from .checkpoint import list_names
from .dit import DiT
from .layers import ModelSize
from .pixart import PixArt

Shapes = Mapping[str, tuple[int, ...]]
Options = Mapping[str, int]

SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.")


class Architecture(Protocol):
    """A family of models whose state dicts can be recognised."""

    @property
    def name(self) -> str:
        """The family as written in ``arch``, such as ``DiT``."""
        ...

    @property
    def sizes(self) -> Mapping[str, Options]:
        """Published sizes by name, such as ``DiT-XL/2``, with the options that make them."""
        ...

    @property
    def options(self) -> tuple[str, ...]:
        """What ``arch="NAME(option=1)"`` can say."""
        ...

    def matches(self, shapes: Shapes) -> bool:
        """Whether a state dict with these names and shapes is of this family."""
        ...

    def infer(self, shapes: Shapes, metadata: Mapping[str, str], options: Options) -> nn.Module:
        """The model that the shapes tell of; ``options`` come before what is seen in them."""
        ...

    def create(self, input_size: int, options: Options) -> nn.Module:
        """A model from options alone; the rest is as the family's code has it by default."""
        ...


@dataclass(frozen=True)
class DiTArchitecture:
    """State dicts with the names of facebookresearch/DiT."""

    name: str = "DiT"
    options: tuple[str, ...] = (
        *("patch_size", "in_channels", "hidden_size"),
        *("depth", "num_heads", "num_classes"),
    )

    @property
    def sizes(self) -> Mapping[str, Options]:
        """S, B, L and XL with patches of 2, 4 and 8."""
        return _sizes("DiT", dit.SIZES, dit.PATCH_SIZES)

    def matches(self, shapes: Shapes) -> bool:
        """By the three embedders; a class table tells DiT from its text-conditioned relatives."""
        marks = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0.")
        return _has(shapes, marks)

    def infer(self, shapes: Shapes, metadata: Mapping[str, str], options: Options) -> DiT:
        """Everything but the number of heads is in the shapes."""
        classes, _ = _shape(shapes, "y_embedder.embedding_table.weight", 2)
        # the last row of the table is the null class
        seen = _seen(shapes) | {"num_classes": classes - 1} | dict(options)
        if "num_heads" not in seen:
            seen["num_heads"] = _heads("DiT", dit.SIZES, shapes, metadata)
        return DiT(
            input_size=_grid_side(shapes) * seen["patch_size"],
            mlp_ratio=_mlp_ratio(shapes),
            class_dropout_prob=0.1 if classes > seen["num_classes"] else 0.0,
            learn_sigma=_predicts_variance(shapes),
            **seen,
        )

    def create(self, input_size: int, options: Options) -> DiT:
        """What the options do not say is as in DiT-XL/2."""
        return DiT(input_size=input_size, learn_sigma=True, **options)


@dataclass(frozen=True)
class PixArtArchitecture:
    """State dicts with the names of PixArt-alpha/PixArt-alpha."""

    name: str = "PixArt"
    options: tuple[str, ...] = (
        *("patch_size", "in_channels", "hidden_size", "depth", "num_heads"),
        *("caption_channels", "model_max_length"),
    )

    @property
    def sizes(self) -> Mapping[str, Options]:
        """XL with patches of 2."""
        return _sizes("PixArt", pixart.SIZES, pixart.PATCH_SIZES)

    def matches(self, shapes: Shapes) -> bool:
        """By the embedders and cross-attention; Open-Sora's blocks have another name."""
        marks = ("x_embedder.proj.weight", "y_embedder.y_proj.", "t_block.", "blocks.0.cross_attn.")
        return _has(shapes, marks)

    def infer(self, shapes: Shapes, metadata: Mapping[str, str], options: Options) -> PixArt:
        """Everything but the number of heads is in the shapes.

        Raises:
            ModelError: the weights are of the variant that embeds the size of the image, too.
        """
        if more := [key for key in shapes if key.startswith(SIZE_EMBEDDERS)]:
            raise ModelError(
                "these weights are of the multi-scale PixArt-alpha, which is not supported",
                expected="weights without csize_embedder and ar_embedder",
                found=list_names(more),
                remedy="use PixArt-XL-2-256x256.pth or PixArt-XL-2-512x512.pth",
            )
        _, caption_channels = _shape(shapes, "y_embedder.y_proj.fc1.weight", 2)
        tokens, _ = _shape(shapes, "y_embedder.y_embedding", 2)
        text = {"caption_channels": caption_channels, "model_max_length": tokens}
        seen = _seen(shapes) | text | dict(options)
        if "num_heads" not in seen:
            seen["num_heads"] = _heads("PixArt", pixart.SIZES, shapes, metadata)
        return PixArt(
            input_size=_grid_side(shapes) * seen["patch_size"],
            mlp_ratio=_mlp_ratio(shapes),
            pred_sigma=_predicts_variance(shapes),
            **seen,
        )

    def create(self, input_size: int, options: Options) -> PixArt:
        """What the options do not say is as in PixArt-XL/2."""
        return PixArt(input_size=input_size, pred_sigma=True, **options)


ARCHITECTURES: tuple[Architecture, ...] = (DiTArchitecture(), PixArtArchitecture())


def _shape(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ModelError("the weights lack a tensor that tells the model's size", expected=key)
    if len(shapes[key]) != dimensions or 0 in shapes[key]:
        raise ModelError(
            f"tensor {key} has the wrong shape",
            expected=f"{dimensions} dimensions, none of them 0",
            found=str(shapes[key]),
        )
    return shapes[key]


def _depth(shapes: Shapes) -> int:
    """The number of blocks; counted, for the highest index of a hostile file may be any number."""
    return len({match[0] for key in shapes if (match := re.match(r"blocks\.\d+\.", key))})


def _seen(shapes: Shapes) -> dict[str, int]:
    """What the shapes tell of any transformer over patches."""
    hidden, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    return {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": _depth(shapes),
    }


def _grid_side(shapes: Shapes) -> int:
    _, tokens, _ = _shape(shapes, "pos_embed", 3)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ModelError(
            "pos_embed is not of a square image",
            expected="a square number of tokens",
            found=str(tokens),
        )
    return side


def _mlp_ratio(shapes: Shapes) -> float:
    inner, hidden = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)
    return inner / hidden


def _predicts_variance(shapes: Shapes) -> bool:
    """Whether there are more outputs than a patch of noise has values."""
    outputs, _ = _shape(shapes, "final_layer.linear.weight", 2)
    _, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    return outputs != patch * patch * channels


def _heads(
    family: str, sizes: Mapping[str, ModelSize], shapes: Shapes, metadata: Mapping[str, str]
) -> int:
    if (said := metadata.get("num_heads", "")).isdecimal():
        return int(said)
    hidden = _shape(shapes, "x_embedder.proj.weight", 4)[0]
    for size in sizes.values():
        if size.hidden_size == hidden:
            return size.num_heads
    raise ModelError(
        f"the number of attention heads of a {family} of width {hidden} cannot be told from its "
        "weights",
        expected=f"a published width ({', '.join(str(s.hidden_size) for s in sizes.values())}), "
        "or the metadata key num_heads in a .safetensors file",
        remedy=f"say it, such as arch='{family}(num_heads=4)'",
    )


def _sizes(
    family: str, sizes: Mapping[str, ModelSize], patch_sizes: tuple[int, ...]
) -> dict[str, Options]:
    return {
        f"{family}-{letter}/{patch}": {"patch_size": patch, **size._asdict()}
        for letter, size in sizes.items()
        for patch in patch_sizes
    }


def _has(shapes: Shapes, marks: tuple[str, ...]) -> bool:
    """Whether every mark begins a name."""
    return all(any(key.startswith(mark) for key in shapes) for mark in marks)
