"""Loads weights of known architectures, recognised from names and shapes alone."""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachegraph.errors import ModelError, nearest

from .checkpoint import SUFFIXES, list_names
from .digits import load_digits_model
from .families import ARCHITECTURES, Architecture, Options, Shapes
from .prefixes import without_prefix
from .shards import INDEX, is_weights, read_weights

PRESETS = {"digits": load_digits_model}


def load_model(
    path: str | Path,
    arch: str | None = None,
    device: torch.device | str = "cpu",
    **options: object,
) -> nn.Module:
    """Loads weights into a model of the architecture that their names and shapes tell of.

    All sizes are read from the shapes, except the number of attention heads, which leaves no
    trace in them. It is, in this order: what ``arch`` says, the metadata key ``num_heads`` of a
    ``.safetensors`` file, the published number for the widths of DiT-S, B, L and XL and PixArt-XL.
    Any other width without either is refused, for a guess would give wrong images. Where queries
    and keys are normed (FLUX, STDiT3), their norms tell the number; how FLUX shares the channels of
    a head among position axes leaves no trace but in published widths.

    Args:
        path: ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file with a state dict, plain or under
            the key ``ema``, ``model`` or ``state_dict`` (the first of these that is there); the
            ``.index.json`` of several; or the name of a shipped model: ``digits``. Names may begin
            with what the model was an attribute of, such as ``module.``.
        arch: what the weights must be: a published size (``"DiT-XL/2"``), or single values that
            the shapes do not tell (``"DiT(num_heads=4)"``), or a family (``"FLUX"``). None
            recognises them.
        device: where the weights are put.
        options: single values that the shapes do not tell, as in ``arch`` and in place of it:
            ``axes_dim=[16, 56, 56]``.

    Returns:
        The model in eval mode, its parameters without gradients and of the dtype they were
        stored in (the shipped model: float32).

    Raises:
        ModelError: the file cannot be read or holds more than weights, the architecture is
            unknown, or a key is missing, unknown or of another shape.

    Warns:
        UserWarning: what was left out of the names.
    """
    if (preset := PRESETS.get(str(path))) is not None:
        if arch is not None or options:
            what = f"the shipped model {str(path)!r} takes no architecture"
            found = f"arch={arch!r}" if arch is not None else ", ".join(options)
            raise ModelError(what, expected="arch left out", found=found)
        return preset(device)
    path = Path(path)
    if not is_weights(path):
        raise _no_weights_file(path)
    read, metadata = read_weights(path)
    state = without_prefix(read, {known.marks[0] for known in ARCHITECTURES}, path)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    told: Options = {}
    if arch is None:
        architecture = _recognise(shapes, path)
    else:
        architecture, told = _parse_arch(arch)
    given = {name: _option(architecture, name, value) for name, value in options.items()}
    try:
        with torch.device("meta"):
            model = architecture.infer(shapes, metadata, {**told, **given})
    except ModelError as error:
        parts = {"expected": error.expected, "found": error.found, "remedy": error.remedy}
        raise ModelError(error.what, place=str(path), **parts) from error
    _check_shapes(model, shapes, path)
    # assign: the tensors read become the parameters, so that nothing is held twice
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


def build_model(
    arch: str,
    input_size: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """Makes a model by name with random weights, the same for the same seed.

    Every weight is small and none is zero. An adaLN-Zero start, as for training, would make all
    blocks the identity, and nothing could be seen of what caching does to them.

    Args:
        arch: ``"DiT-XL/2"``, or ``"DiT(hidden_size=64, depth=2, num_heads=4)"``: what is not
            said is as in the largest published size, so ``"FLUX"`` is FLUX.1-dev.
        input_size: height and width of the (latent) image; by default 32 (images of 256x256), for
            FLUX 128 (1024x1024), for STDiT3 2 seconds at 480p.
        device: where the weights are put; ``"meta"`` for shapes without any.
        seed: of the weights.

    Returns:
        The model in eval mode, its parameters without gradients.

    Raises:
        ModelError: the name is unknown, or the sizes do not divide.
    """
    architecture, options = _parse_arch(arch)
    device = torch.device(device)
    if device.type == "meta":
        with device:
            model = architecture.create(input_size, options)
    else:
        # Only the CPU's generator is borrowed, and given back as it was. Its numbers are the same
        # on every machine, which those of GPUs are not.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model = architecture.create(input_size, options)
    return model.to(device).eval().requires_grad_(False)


def _parse_arch(arch: str) -> tuple[Architecture, dict[str, Any]]:
    """``DiT-XL/2``, ``FLUX`` or ``DiT(num_heads=4)`` as the family and its options."""
    for architecture in ARCHITECTURES:
        if arch in architecture.sizes:
            return architecture, dict(architecture.sizes[arch])
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", arch)
    families = {architecture.name: architecture for architecture in ARCHITECTURES}
    if match is None or match[1] not in families:
        names = [name for architecture in ARCHITECTURES for name in architecture.sizes]
        raise ModelError(
            f"unknown architecture {arch!r}",
            expected=f"one of {', '.join(names)}, or a family with options such as "
            f"{ARCHITECTURES[0].name}(num_heads=4)",
            remedy=nearest(arch, names),
        )
    architecture = families[match[1]]
    options = {}
    for pair in re.split(r",(?![^\[(]*[\])])", match[2] or ""):  # not those within a list
        if pair.strip():
            name, _, text = (part.strip() for part in pair.partition("="))
            options[name] = _option(architecture, name, _literal(text))
    return architecture, options


def _literal(text: str) -> object:
    """A number, truth value or list as Python writes it; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _option(architecture: Architecture, name: str, value: object) -> Any:
    """An option's value, of the kind that the model takes."""
    if name not in architecture.options:
        raise ModelError(
            f"unknown option {name!r} of {architecture.name}",
            expected=f"one of {', '.join(architecture.options)}",
            remedy=nearest(name, architecture.options),
        )
    match inspect.signature(architecture.model).parameters[name].default:
        case bool():
            fits, expected = isinstance(value, bool), "True or False"
        case float():
            fits, expected = _is_number(value, int | float), "a positive number"
        case tuple():
            items = list(value) if isinstance(value, list | tuple) else []
            fits = bool(items) and all(_is_number(item, int) for item in items)
            expected = "a list of positive whole numbers"
        case _:
            fits, expected = _is_number(value, int), "a positive whole number"
    if not fits:
        what = f"option {name!r} of {architecture.name} has no usable value"
        raise ModelError(what, expected=expected, found=repr(value))
    return value


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def _no_weights_file(path: Path) -> ModelError:
    """For what is neither a weights file nor a shipped model, with what may have been meant."""
    name = path.as_posix()
    remedy = nearest(name, PRESETS)
    if any(name in (one.name, *one.sizes) for one in ARCHITECTURES):
        remedy = f"build_model({name!r}) makes one with random weights"
    names, shipped = ", ".join((*SUFFIXES, INDEX)), ", ".join(PRESETS)
    return ModelError(
        f"{name!r} is no weights file",
        expected=f"a name in {names}, or a shipped model ({shipped})",
        remedy=remedy,
    )


def _recognise(shapes: Shapes, path: Path) -> Architecture:
    for architecture in ARCHITECTURES:
        if architecture.matches(shapes):
            return architecture
    raise ModelError(
        "these weights are of no known architecture",
        place=str(path),
        expected=" or ".join(architecture.name for architecture in ARCHITECTURES),
        found=f"{len(shapes)} tensors: {list_names(shapes)}",
        remedy="compile other models as a torch.export program (.pt2) or as module:factory",
    )


def _check_shapes(model: nn.Module, shapes: Shapes, path: Path) -> None:
    """Refuses with everything that does not fit, not only the first."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    problems = {
        "missing": [key for key in wanted if key not in shapes],
        "unknown": [key for key in shapes if key not in wanted],
        "of another shape": [
            f"{key} {shapes[key]} instead of {shape}"
            for key, shape in wanted.items()
            if key in shapes and shapes[key] != shape
        ],
    }
    found = "; ".join(f"{kind}: {list_names(names)}" for kind, names in problems.items() if names)
    if found:
        raise ModelError(
            "the weights do not fit the model",
            place=str(path),
            expected=f"{len(wanted)} tensors of {getattr(model, 'arch', type(model).__name__)}",
            found=found,
        )
