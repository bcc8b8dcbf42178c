"""Example inputs: said on the command line as ``NAME=SHAPE:DTYPE``, with seeded random contents."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.errors import InputError, ModelError, nearest
from cachegraph.spec import DTYPES, TensorSpec

from .signature import TIMESTEP_NAMES, call_arguments

FORM = "NAME=SHAPE:DTYPE, such as x=2,4,32,32:f32"
CONSTANT = "or NAME=VALUE for a constant in JSON, such as height=32"

_NAMED = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_SHORT = {name: dtype for name, dtype in DTYPES.items() if name not in _NAMED}
_DTYPES = _SHORT | {name: dtype for name, dtype in _NAMED.items() if dtype in _SHORT.values()}
_TIME = 500  # of a batch whose timestep nobody said: amid the usual 1000


def parse_input(text: str, option: str = "--input") -> tuple[str, Any]:
    """Name and value of an example input: shape and dtype of a tensor, or a constant.

    Args:
        text: as on the command line.
        option: that has it, for errors.

    Raises:
        InputError: the text has another form, or one of its parts cannot be read.
    """
    place = f"{option} {text}"
    match = re.fullmatch(r"([^=]+)=([^:]*):([^:]+)", text)
    if match is None:
        name, _, value = text.partition("=")
        with suppress(ValueError):
            if name.strip():
                return name.strip(), json.loads(value)
        raise InputError("not an input", place=place, expected=f"{FORM}; {CONSTANT}")
    name, shape, dtype = (part.strip() for part in match.groups())
    sizes = [part.strip() for part in shape.split(",")] if shape else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(
            "the shape cannot be read",
            place=place,
            expected="whole numbers above 0, such as 2,4,32,32",
            found=shape,
        )
    if (known := _DTYPES.get(dtype.removeprefix("torch."))) is None:
        raise InputError(
            f"unknown dtype {dtype!r}",
            place=place,
            expected=f"one of {', '.join(_SHORT)}, or torch's names of these",
            remedy=nearest(dtype, _DTYPES),
        )
    return name, TensorSpec(tuple(map(int, sizes)), known)


def parse_inputs(texts: Iterable[str], option: str = "--input") -> dict[str, Any]:
    """Every input of an option by name, see :func:`parse_input`.

    Raises:
        InputError: one cannot be read, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, value = parse_input(text, option)
        if name in found:
            raise InputError(f"input {name!r} is given twice", place=f"{option} {text}")
        found[name] = value
    return found


def random_tensor(
    name: str, sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Contents that a model can take, drawn on the CPU.

    Floats are normal, integers 0 or 1 (so that they are valid classes and tokens), masks all true,
    and a timestep is the same for the whole batch.

    Args:
        name: of the input; tells timesteps and masks.
        sizes: of the tensor.
        dtype: of the tensor.
        generator: on the CPU.
    """
    if name.rpartition(".")[2] in TIMESTEP_NAMES:
        return torch.full(sizes, _TIME, dtype=dtype)
    if dtype == torch.bool or ("mask" in name and not dtype.is_floating_point):
        return torch.ones(sizes, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(sizes, generator=generator, dtype=wide).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator, dtype=dtype)


def complete(
    model: nn.Module,
    example: tuple[Sequence[Any], Mapping[str, Any]] | None,
    asked: Mapping[str, Any],
    place: str,
) -> dict[str, Any]:
    """The arguments of an example call by name: those asked for, then the model's own.

    Args:
        model: for the names that ``forward`` takes, and its device.
        example: positional and keyword arguments that it came with, or None.
        asked: what ``--input`` says.
        place: the model as the user names it, for errors.

    Raises:
        ModelError: a name that ``forward`` does not have, or one that it needs is missing.
    """
    parameters = inspect.signature(model.forward).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in asked:
        if name not in named and not anything:
            raise ModelError(
                f"unknown input {name!r}",
                place=place,
                expected=f"one of {', '.join(named)}",
                remedy=nearest(name, named),
            )
    own = call_arguments(model, *example) if example is not None else {}
    missing = [n for n, p in named.items() if p.default is p.empty and n not in {*own, *asked}]
    if missing or not (own or asked):
        known = {*missing, *own, *asked}
        others = [n for n, p in named.items() if n not in known and p.default is None]
        raise ModelError(
            f"inputs are missing: {', '.join(missing or named)}",
            place=place,
            expected=f"--input {FORM}, for each of them",
            remedy=f"it also takes {', '.join(others)}" if others else "",
        )
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, value in asked.items():
        own[name] = value
        if isinstance(value, TensorSpec):
            own[name] = random_tensor(name, value.sizes({}), value.dtype, generator).to(device)
    return {name: own[name] for name in (*named, *own) if name in own}
