"""Where a model comes from: what MODEL on the command line can be."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cachegraph.errors import InputError, ModelError, nearest
from cachegraph.model.inputs import complete, parse_inputs
from cachegraph.zoo import build_model, load_model
from cachegraph.zoo.checkpoint import SUFFIXES
from cachegraph.zoo.recognise import ARCHITECTURES, PRESETS
from cachegraph.zoo.shards import INDEX, is_weights, weights_files

from .program_files import opening, quiet

FORMS = (
    f"a weights file ({', '.join((*SUFFIXES, INDEX))}), a torch.export program (.pt2), "
    f"a diffusers model folder, module:factory, or a shipped model ({', '.join(PRESETS)})"
)
_CONSTANTS = (bool, int, float, str, type(None))
_SIZES = [size for architecture in ARCHITECTURES for size in architecture.sizes]


@dataclass(frozen=True)
class Source:
    """A model and how it is called.

    Attributes:
        model: in eval mode, unless a factory left it otherwise.
        args: example inputs, or None where the model has its own ``example_inputs()`` or none.
        kwargs: example inputs by name, or None likewise.
        name: short, for titles and file names.
    """

    model: nn.Module
    args: Sequence[Any] | None
    kwargs: Mapping[str, Any] | None
    name: str


def open_model(
    text: str,
    *,
    arch: str | None = None,
    inputs: Sequence[str] = (),
    shapes_only: bool = False,
    random_weights: bool = False,
    input_size: int | None = None,
    need_inputs: bool = True,
) -> Source:
    """Opens whatever MODEL names.

    A ``.pt2`` program and a factory are code, which runs here: open only those that you trust.

    Args:
        text: a weights file, ``.pt2`` program, diffusers folder, ``module:factory`` or shipped
            model; with ``shapes_only`` or ``random_weights`` also an architecture such as
            ``DiT-XL/2``.
        arch: architecture of a weights file.
        inputs: example inputs, each ``NAME=SHAPE:DTYPE``, or ``NAME=VALUE`` for a constant.
        shapes_only: no weights are needed: the model may be on the meta device.
        random_weights: an architecture gets random weights.
        input_size: height and width of the (latent) image of an architecture.
        need_inputs: refuse a model without example inputs.

    Raises:
        InputError: it is none of these, cannot be read, or an option does not go with it.
    """
    asked = parse_inputs(inputs)
    source = _open(text, arch, shapes_only, random_weights, input_size)
    has_own = source.args is None and source.kwargs is None
    own = getattr(source.model, "example_inputs", None) if has_own else None
    if not asked and (own is not None or not has_own or not need_inputs):
        return source
    example = (source.args or (), source.kwargs or {}) if not has_own else own() if own else None
    return Source(source.model, (), complete(source.model, example, asked, text), source.name)


def more_examples(source: Source, also: Sequence[str]) -> list[dict[str, Any]]:
    """Calls of other sizes: inputs that differ from a source's own, a text for each.

    Args:
        source: the model with an example call.
        also: for each call such inputs as for :func:`open_model`, with spaces between them.

    Raises:
        InputError: one cannot be read, or the model has no such input.
    """
    own = getattr(source.model, "example_inputs", None)
    has_none = source.args is None and source.kwargs is None
    example = own() if has_none and own is not None else (source.args or (), source.kwargs or {})
    found = []
    for text in also:
        asked = parse_inputs(text.split(), "--also")
        whole = complete(source.model, example, asked, f"--also {text}")
        found.append({name: whole[name] for name in asked})
    return found


def model_files(text: str) -> list[Path] | None:
    """The files that hold all of a model, shipped ones aside; None where other code makes it."""
    path = Path(text)
    if text in PRESETS:
        return []
    files = weights_files(path) if is_weights(path) and path.is_file() else [path]
    known = is_weights(path) or path.suffix == ".pt2"
    return files if known and all(file.is_file() for file in files) else None


def check_model_file(text: str) -> None:
    """Refuse a file that by its name holds something else.

    Raises:
        ModelError: it holds no model.
    """
    path = Path(text)
    if text in PRESETS or is_weights(path) or path.suffix == ".pt2" or not path.is_file():
        return
    schedule = path.suffix in (".yaml", ".yml")
    raise ModelError(
        "the file holds no model",
        place=text,
        expected=FORMS,
        remedy="a schedule goes with --schedule" if schedule else "",
    )


def is_architecture(text: str) -> bool:
    """True for ``DiT-XL/2``, ``FLUX`` and ``DiT(depth=2)``; such a model has no weights."""
    families = "|".join(re.escape(architecture.name) for architecture in ARCHITECTURES)
    return text in _SIZES or re.fullmatch(rf"\s*({families})\s*(\(.*\))?\s*", text) is not None


def _open(
    text: str, arch: str | None, shapes_only: bool, random_weights: bool, input_size: int | None
) -> Source:
    path = Path(text)
    stored = text in PRESETS or (is_weights(path) and not path.is_dir())
    if arch is not None and not stored:
        raise ModelError("--arch goes with a weights file only", place=text)
    if input_size is not None and not is_architecture(text):
        raise ModelError("--input-size goes with an architecture only", place=text)
    if stored:
        return Source(load_model(text, arch), None, None, path.stem)
    if path.is_dir():
        return Source(_from_diffusers(path, shapes_only), None, None, path.resolve().name)
    if path.suffix == ".pt2":
        return _from_program(path)
    if is_architecture(text):
        if shapes_only or random_weights:
            device = "meta" if shapes_only else "cpu"
            return Source(build_model(text, input_size, device=device), None, None, text)
        what = f"{text!r} is an architecture, without weights"
        raise ModelError(what, expected=FORMS, remedy="only plan, inspect and bench do without")
    if ":" in text:
        return _from_factory(text)
    check_model_file(text)
    raise ModelError(
        f"there is no model {text!r}",
        expected=f"{FORMS}; for plan, inspect and bench also an architecture, such as {_SIZES[0]}",
        remedy=nearest(text, [*PRESETS, *_SIZES]),
    )


def _from_program(path: Path) -> Source:
    """A ``torch.export`` program with its modules as they were, so that sites keep their names."""
    if not path.is_file():
        raise ModelError("there is no such file", place=str(path))
    with opening(path):
        program = torch.export.load(path)
        model = torch.export.unflatten(program)
    args, kwargs = program.example_inputs or ((), {})
    _name_arguments(model, program.module(check_guards=False), kwargs)
    for module in model.modules():
        module.training = False  # an exported graph has no modes, and refuses eval()
    if not program.example_inputs:
        return Source(model, None, None, path.stem)
    return Source(model, args, kwargs, path.stem)


def _name_arguments(model: nn.Module, flat: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Give a module that takes ``*args, **kwargs`` the arguments that were exported."""
    call = model.forward
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    parameters = []
    for name, parameter in inspect.signature(flat.forward).parameters.items():
        if name in kwargs:
            constant = isinstance(kwargs[name], _CONSTANTS)
            default = kwargs[name] if constant else inspect.Parameter.empty
            parameter = inspect.Parameter(name, keyword_only, default=default)
        parameters.append(parameter)
    signature = inspect.Signature(parameters)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return call(*bound.args, **bound.kwargs)

    vars(forward)["__signature__"] = signature
    vars(model)["forward"] = forward


def import_module(text: str, refusal: type[InputError]) -> tuple[ModuleType, str]:
    """The module of ``module:name``, also one in the current folder, and the name.

    Raises:
        InputError: there is no such module; of the type ``refusal``.
    """
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module), name
    except ImportError as error:
        what = f"module {module!r} cannot be imported"
        raise refusal(what, place=text, found=str(error)) from error


def import_function(text: str, what: str, takes: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Args:
        text: as on the command line.
        what: it is to be, for errors.
        takes: what it is called with, likewise.

    Raises:
        InputError: there is no such module or function.
    """
    if not all(text.partition(":")):
        raise InputError(f"not a {what}", place=text, expected="module:function")
    module, name = import_module(text, InputError)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise InputError(
            f"module {module.__name__!r} has no function {name!r}",
            place=text,
            expected=takes,
            remedy=nearest(name, known),
        )
    return found


def _from_factory(text: str) -> Source:
    """What ``module:factory`` returns: a module, or it with args, or with args and kwargs."""
    module, name = import_module(text, ModelError)
    factory = getattr(module, name, None)
    if factory is None:
        known = [n for n in vars(module) if not n.startswith("_")]
        raise ModelError(
            f"module {module.__name__!r} has no {name!r}", place=text, remedy=nearest(name, known)
        )
    made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    parts = made if isinstance(made, tuple) else (made,)
    match parts:
        case (nn.Module() as model,):
            return Source(model, None, None, name)
        case (nn.Module() as model, list() | tuple() as args):
            return Source(model, args, {}, name)
        case (nn.Module() as model, list() | tuple() as args, dict() as kwargs):
            return Source(model, args, kwargs, name)
    raise ModelError(
        "the factory returns no model",
        place=text,
        expected="a torch module, (module, args) or (module, args, kwargs)",
        found=", ".join(type(part).__name__ for part in parts),
    )


def _from_diffusers(folder: Path, shapes_only: bool) -> nn.Module:
    """The model of a folder that ``save_pretrained`` wrote; for shapes its config is enough."""
    config = _read_config(folder)
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(
            "a diffusers model folder needs diffusers",
            place=str(folder),
            remedy="pip install 'cachegraph[diffusers]'",
        ) from error
    name = config["_class_name"]
    cls: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelError(
            f"diffusers {diffusers.__version__} has no model {name!r}",
            place=str(folder / "config.json"),
            remedy=nearest(name, [n for n in dir(diffusers) if "Transformer" in n]),
        )
    with quiet("diffusers"):
        if shapes_only:
            with torch.device("meta"):
                made = cls.from_config(config)
            return made.to("meta").eval()
        try:
            return cls.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ModelError(
                "the weights of the folder cannot be read", place=str(folder), found=str(error)
            ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    place = str(folder)
    if (folder / "manifest.json").is_file():
        raise ModelError("a compiled artifact instead of a model", place=place, expected=FORMS)
    if (folder / "model_index.json").is_file():
        raise ModelError(
            "a diffusers pipeline instead of a model",
            place=place,
            remedy=f"give the model in it, such as {folder / 'transformer'}",
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            "not a diffusers model folder",
            place=place,
            expected="a config.json that can be read",
            found=str(error),
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        what = "the config names no model class"
        raise ModelError(what, place=str(folder / "config.json"), expected="the key _class_name")
    return config
