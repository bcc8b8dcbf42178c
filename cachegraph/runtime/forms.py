"""Forms of call, where an artifact has several: what tells them apart, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from cachegraph.errors import SessionError
from cachegraph.model.signature import Tree
from cachegraph.spec import shown

from .fit import check_sizes
from .program import Program


def forms_in_words(programs: Sequence[Program]) -> list[str]:
    """Each program's inputs and constants as far as they differ: ``x f32[batch, 4, 8, 8]``."""
    found = [_of_program(program) for program in programs]
    return [_text(words, differing(found)) for words in found]


def no_form(
    programs: Sequence[Program],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
) -> SessionError:
    """The error of a call that has none of the forms.

    Args:
        programs: one a form.
        args: of the call.
        kwargs: of the call.
        device: of the graphs.

    Raises:
        SessionError: what is the same in all forms is another.
    """
    names = differing([_of_program(program) for program in programs])
    for program in programs:
        try:
            inputs = program.signature.flatten(args, kwargs)
        except SessionError:
            continue
        check_sizes(program, inputs, device, but=names)
    leaves = _pytree.tree_leaves_with_path(programs[0].signature.bind(args, kwargs))
    words = _defaults(programs[0]) | {_path(path): shown(leaf) for path, leaf in leaves}
    return SessionError(
        "the call has none of the sizes that the loop was compiled for",
        expected=" or ".join(forms_in_words(programs)),
        found=_text(words, names),
        remedy="compile it with example inputs of these sizes, too: also=[...] (--also)",
    )


def differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of what is not the same in all forms."""
    names = dict.fromkeys(name for words in found for name in words)
    return [name for name in names if len({words.get(name) for words in found}) > 1]


def _of_program(program: Program) -> dict[str, str]:
    signature = program.signature
    words = {name: str(spec.renamed(program.names)) for name, spec in signature.inputs}
    return _defaults(program) | words | _constants(signature.arguments)


def _defaults(program: Program) -> dict[str, str]:
    """What arguments are where a call leaves them out."""
    return _constants({p.name: p.default for p in program.signature.parameters if p.default})


def _constants(trees: Mapping[str, Tree]) -> dict[str, str]:
    return {at: shown(one) for name, tree in trees.items() for at, one in _leaves(name, tree)}


def _leaves(path: str, tree: Tree) -> Iterator[tuple[str, Any]]:
    """What an argument holds beside tensors, under the names that tensors would have."""
    match tree:
        case {"const": value}:
            yield path, value
        case {"each": child}:
            yield from _leaves(f"{path}.0", child)
        case {"dict": dict(children)}:
            for key, child in children.items():
                yield from _leaves(f"{path}.{key}", child)
        case {"list": list(children)} | {"tuple": list(children)}:
            for number, child in enumerate(children):
                yield from _leaves(f"{path}.{number}", child)


def _path(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)


def _text(words: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {words.get(name, 'left out')}" for name in names)
