"""Families of models: what tells them from each other, and their sizes, in names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Architecture:
    """A family of models whose state dicts can be recognised.

    Attributes:
        name: the family as written in ``arch``, such as ``DiT``.
        options: what ``arch="NAME(option=1)"`` can say.
        model: the class of its models.
        variance: name of the argument that says whether a variance is predicted.
        published: its sizes by their letters.
        patch_sizes: that each of them comes with.
        marks: what begins names in all of its state dicts.
        tell: what arguments only this family has, from shapes and options.
    """

    name: str
    options: tuple[str, ...]
    model: type[nn.Module]
    variance: str
    published: Mapping[str, ModelSize]
    patch_sizes: tuple[int, ...]
    marks: tuple[str, ...]
    tell: Callable[[Shapes, Options], dict[str, Any]]

    @property
    def sizes(self) -> dict[str, Options]:
        """Published sizes by name, such as ``DiT-XL/2``, with the options that make them."""
        return {
            f"{self.name}-{letter}/{patch}": {"patch_size": patch, **size._asdict()}
            for letter, size in self.published.items()
            for patch in self.patch_sizes
        }

    def matches(self, shapes: Shapes) -> bool:
        """Whether a state dict with these names and shapes is of this family."""
        return all(any(key.startswith(mark) for key in shapes) for mark in self.marks)

    def infer(self, shapes: Shapes, metadata: Mapping[str, str], options: Options) -> nn.Module:
        """The model that the shapes tell of; ``options`` come before what is seen in them.

        Everything but the number of heads is in the shapes.
        """
        told = self.tell(shapes, options)
        seen = _seen(shapes) | told | dict(options)
        if "num_heads" not in seen:
            seen["num_heads"] = _heads(self.name, self.published, shapes, metadata)
        side = _grid_side(shapes)
        inner, hidden = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)
        outputs, _ = _shape(shapes, "final_layer.linear.weight", 2)
        _, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
        return self.model(
            input_size=side * seen["patch_size"],
            mlp_ratio=inner / hidden,
            # there are more outputs than a patch of noise has values
            **{self.variance: outputs != patch * patch * channels},
            **seen,
        )

    def create(self, input_size: int, options: Options) -> nn.Module:
        """A model from options alone; what they do not say is as in the largest size."""
        return self.model(input_size=input_size, **{self.variance: True}, **options)


def _tell_dit(shapes: Shapes, options: Options) -> dict[str, Any]:
    rows, _ = _shape(shapes, "y_embedder.embedding_table.weight", 2)
    classes = options.get("num_classes", rows - 1)  # the last row is the null class
    return {"num_classes": classes, "class_dropout_prob": 0.1 if rows > classes else 0.0}


def _tell_pixart(shapes: Shapes, options: Options) -> dict[str, Any]:
    if more := [key for key in shapes if key.startswith(SIZE_EMBEDDERS)]:
        raise ModelError(
            "these weights are of the multi-scale PixArt-alpha, which is not supported",
            expected="weights without csize_embedder and ar_embedder",
            found=list_names(more),
            remedy="use PixArt-XL-2-256x256.pth or PixArt-XL-2-512x512.pth",
        )
    _, channels = _shape(shapes, "y_embedder.y_proj.fc1.weight", 2)
    tokens, _ = _shape(shapes, "y_embedder.y_embedding", 2)
    return {"caption_channels": channels, "model_max_length": tokens}


_COMMON = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")
# A class table tells DiT from its text-conditioned relatives; Open-Sora's blocks have another name
# than those of PixArt.
ARCHITECTURES = (
    Architecture(
        "DiT",
        (*_COMMON, "num_classes"),
        DiT,
        "learn_sigma",
        dit.SIZES,
        dit.PATCH_SIZES,
        ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0."),
        _tell_dit,
    ),
    Architecture(
        "PixArt",
        (*_COMMON, "caption_channels", "model_max_length"),
        PixArt,
        "pred_sigma",
        pixart.SIZES,
        pixart.PATCH_SIZES,
        ("x_embedder.proj.weight", "y_embedder.y_proj.", "t_block.", "blocks.0.cross_attn."),
        _tell_pixart,
    ),
)


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


def _seen(shapes: Shapes) -> dict[str, Any]:
    """What the shapes tell of any transformer over patches."""
    hidden, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    sizes = {"patch_size": patch, "in_channels": channels, "hidden_size": hidden}
    # Blocks are counted, for the highest index of a hostile file may be any number.
    blocks = {match[0] for key in shapes if (match := re.match(r"blocks\.\d+\.", key))}
    return {**sizes, "depth": len(blocks)}


def _grid_side(shapes: Shapes) -> int:
    _, tokens, _ = _shape(shapes, "pos_embed", 3)
    side = math.isqrt(tokens)
    if side * side != tokens:
        what = "pos_embed is not of a square image"
        raise ModelError(what, expected="a square number of tokens", found=str(tokens))
    return side


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
