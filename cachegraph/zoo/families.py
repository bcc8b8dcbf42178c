"""Families of models: what tells them from each other, and their sizes, in names and shapes."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cachegraph.errors import ModelError

from . import dit, flux, pixart, stdit
from .checkpoint import list_names
from .dit import DiT
from .flux import Flux
from .layers import ModelSize
from .pixart import PixArt
from .stdit import STDiT3

Shapes = Mapping[str, tuple[int, ...]]
Options = Mapping[str, Any]

SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.")


@dataclass(frozen=True)
class Architecture:
    """A family of models whose state dicts can be recognised.

    Attributes:
        name: the family as written in ``arch``, such as ``DiT``.
        options: what ``arch="NAME(option=1)"`` can say; arguments of the model.
        model: the class of its models.
        sizes: published sizes by name, such as ``DiT-XL/2``, with the options that make them.
        marks: what begins names in all of its state dicts.
        tell: the arguments that its weights, their metadata and the options tell of.
        size_key: the argument that is the height and width of the (latent) image; empty where any
            size goes, and an attribute ``latent_size`` says that of the example inputs.
    """

    name: str
    options: tuple[str, ...]
    model: type[nn.Module]
    sizes: Mapping[str, Options]
    marks: tuple[str, ...]
    tell: Callable[[Shapes, Mapping[str, str], Options], dict[str, Any]]
    size_key: str = ""

    def matches(self, shapes: Shapes) -> bool:
        """Whether a state dict with these names and shapes is of this family."""
        return all(any(key.startswith(mark) for key in shapes) for mark in self.marks)

    def infer(self, shapes: Shapes, metadata: Mapping[str, str], options: Options) -> nn.Module:
        """The model that the shapes tell of; ``options`` come before what is seen in them."""
        return self.model(**self.tell(shapes, metadata, options) | dict(options))

    def create(self, input_size: int | None, options: Options) -> nn.Module:
        """A model from options alone; what they do not say is as in the largest size."""
        if self.size_key:
            sized = {self.size_key: input_size} if input_size else {}
            return self.model(**sized, **options)
        model = self.model(**options)
        if input_size:
            given: Any = model.latent_size
            square = (*given[:-2], input_size, input_size) if isinstance(given, tuple) else None
            vars(model)["latent_size"] = square or input_size
        return model


def _patched(family: str, published: Mapping[str, ModelSize], patches: Sequence[int]) -> Any:
    """Sizes by name of a family that comes with several patch sizes."""
    return {
        f"{family}-{letter}/{patch}": {"patch_size": patch, **size._asdict()}
        for letter, size in published.items()
        for patch in patches
    }


def _tell_patches(shapes: Shapes, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell of any transformer over patches of an image, beside what is told."""
    hidden, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    seen = {"patch_size": patch, "in_channels": channels, "hidden_size": hidden}
    seen |= {"depth": _count(shapes, "blocks"), **told}
    side = _grid_side(shapes)
    inner, width = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)
    return {"input_size": side * seen["patch_size"], "mlp_ratio": inner / width, **seen}


def _has_variance(shapes: Shapes) -> bool:
    """Whether there are more outputs than a patch of noise has values."""
    outputs, _ = _shape(shapes, "final_layer.linear.weight", 2)
    patch = shapes["x_embedder.proj.weight"]
    return outputs != math.prod(patch[1:])


def _tell_dit(shapes: Shapes, metadata: Mapping[str, str], options: Options) -> dict[str, Any]:
    rows, _ = _shape(shapes, "y_embedder.embedding_table.weight", 2)
    classes = options.get("num_classes", rows - 1)  # the last row is the null class
    told = {
        "num_classes": classes,
        "class_dropout_prob": 0.1 if rows > classes else 0.0,
        "num_heads": _heads("DiT", dit.SIZES, shapes, metadata, options),
        **options,
    }
    return {**_tell_patches(shapes, told), "learn_sigma": _has_variance(shapes)}


def _tell_pixart(shapes: Shapes, metadata: Mapping[str, str], options: Options) -> dict[str, Any]:
    if more := [key for key in shapes if key.startswith(SIZE_EMBEDDERS)]:
        raise ModelError(
            "these weights are of the multi-scale PixArt-alpha, which is not supported",
            expected="weights without csize_embedder and ar_embedder",
            found=list_names(more),
            remedy="use PixArt-XL-2-256x256.pth or PixArt-XL-2-512x512.pth",
        )
    heads = _heads("PixArt", pixart.SIZES, shapes, metadata, options)
    told = {**_tell_caption(shapes), "num_heads": heads, **options}
    return {**_tell_patches(shapes, told), "pred_sigma": _has_variance(shapes)}


def _tell_caption(shapes: Shapes) -> dict[str, Any]:
    _, channels = _shape(shapes, "y_embedder.y_proj.fc1.weight", 2)
    tokens, _ = _shape(shapes, "y_embedder.y_embedding", 2)
    return {"caption_channels": channels, "model_max_length": tokens}


def _tell_stdit(shapes: Shapes, metadata: Mapping[str, str], options: Options) -> dict[str, Any]:
    hidden, channels, *patch = _shape(shapes, "x_embedder.proj.weight", 5)
    inner, width = _shape(shapes, "spatial_blocks.0.mlp.fc1.weight", 2)
    norm = "spatial_blocks.0.attn.q_norm.weight"
    qk_norm = options.get("qk_norm", norm in shapes)
    # A norm over the channels of a head tells their number.
    heads = {"num_heads": hidden // _shape(shapes, norm, 1)[0]} if norm in shapes else {}
    options = heads | dict(options)
    return {
        **_tell_caption(shapes),
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": _count(shapes, "spatial_blocks"),
        "mlp_ratio": inner / width,
        "qk_norm": qk_norm,
        "pred_sigma": _has_variance(shapes),
        "num_heads": _heads("STDiT3", stdit.SIZES, shapes, metadata, options),
    }


def _tell_flux(shapes: Shapes, metadata: Mapping[str, str], options: Options) -> dict[str, Any]:
    hidden, channels = _shape(shapes, "img_in.weight", 2)
    (head,) = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    inner, width = _shape(shapes, "double_blocks.0.img_mlp.0.weight", 2)
    if "axes_dim" not in options and head != sum(flux.AXES):
        raise ModelError(
            f"how {head} channels of a head are shared among position axes cannot be told from "
            "the weights",
            expected=f"heads of {sum(flux.AXES)} channels, as published, or the option axes_dim",
            remedy="say it, such as arch='FLUX(axes_dim=[4, 6, 6])'",
        )
    return {
        "in_channels": channels,
        "out_channels": _shape(shapes, "final_layer.linear.weight", 2)[0],
        "vec_in_dim": _shape(shapes, "vector_in.in_layer.weight", 2)[1],
        "context_in_dim": _shape(shapes, "txt_in.weight", 2)[1],
        "hidden_size": hidden,
        "mlp_ratio": inner / width,
        "num_heads": max(hidden // head, 1),
        "depth": _count(shapes, "double_blocks"),
        "depth_single_blocks": _count(shapes, "single_blocks"),
        "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
    }


def _arguments(model: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a model is made with."""
    return tuple(inspect.signature(model).parameters)


_COMMON = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")
# A class table tells DiT from its text-conditioned relatives; Open-Sora's blocks have another name
# than those of PixArt.
ARCHITECTURES = (
    Architecture(
        "DiT",
        (*_COMMON, "num_classes"),
        DiT,
        _patched("DiT", dit.SIZES, dit.PATCH_SIZES),
        ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0."),
        _tell_dit,
        "input_size",
    ),
    Architecture(
        "PixArt",
        (*_COMMON, "caption_channels", "model_max_length"),
        PixArt,
        _patched("PixArt", pixart.SIZES, pixart.PATCH_SIZES),
        ("x_embedder.proj.weight", "y_embedder.y_proj.", "t_block.", "blocks.0.cross_attn."),
        _tell_pixart,
        "input_size",
    ),
    Architecture(
        "FLUX",
        _arguments(Flux),
        Flux,
        {f"FLUX-{name}": size._asdict() for name, size in flux.SIZES.items()},
        ("img_in.", "txt_in.", "double_blocks.", "single_blocks."),
        _tell_flux,
    ),
    Architecture(
        "STDiT3",
        _arguments(STDiT3),
        STDiT3,
        {f"STDiT3-{name}/2": size._asdict() for name, size in stdit.SIZES.items()},
        ("x_embedder.proj.weight", "spatial_blocks.", "temporal_blocks.", "fps_embedder."),
        _tell_stdit,
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


def _count(shapes: Shapes, stack: str) -> int:
    """Blocks of a stack; counted, for the highest index of a hostile file may be any number."""
    return len({m[0] for key in shapes if (m := re.match(rf"{stack}\.\d+\.", key))})


def _grid_side(shapes: Shapes) -> int:
    _, tokens, _ = _shape(shapes, "pos_embed", 3)
    side = math.isqrt(tokens)
    if side * side != tokens:
        what = "pos_embed is not of a square image"
        raise ModelError(what, expected="a square number of tokens", found=str(tokens))
    return side


def _heads(
    family: str,
    sizes: Mapping[str, ModelSize],
    shapes: Shapes,
    metadata: Mapping[str, str],
    options: Options,
) -> int:
    """What is said, else the published number for the width."""
    if "num_heads" in options:
        return int(options["num_heads"])
    if (said := metadata.get("num_heads", "")).isdecimal():
        return int(said)
    hidden = shapes["x_embedder.proj.weight"][0]
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
