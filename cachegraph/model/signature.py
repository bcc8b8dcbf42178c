"""How a model is called: which arguments hold tensors, which are constants, what it returns.

A traced graph takes and returns flat lists of tensors. The signature turns a call of the model
into that list and the list back into what the model returns, without the model's code.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from cachegraph.errors import SessionError, TraceError, nearest
from cachegraph.spec import TensorSpec, shown

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "time_step")

# {"tensor": i} | {"const": v} | {"list"|"tuple": [...]} | {"dict": {...}} | {"each": tree}, a list
# of as many as the batch
Tree = dict[str, Any]
_CONSTANTS = (bool, int, float, str, type(None))
_CONTAINER_SWITCH = "return_dict"  # diffusers: the same values in a tuple or in an object


class Output(OrderedDict[str, Any]):
    """What a model returns that answers with an object: by attribute, by key and by position."""

    def __getattr__(self, name: str) -> Any:
        """The field of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        """The field of that name or position; absent fields do not count in positions."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """All fields that are not None."""
        return tuple(value for value in self.values() if value is not None)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's ``forward``; ``default`` is a constant's tree or None."""

    name: str
    positional: bool
    default: Tree | None


@dataclass(frozen=True)
class CallSignature:
    """The traced call.

    Attributes:
        parameters: of ``forward``, in order.
        arguments: parameter -> tree of the traced argument.
        inputs: name and spec of every tensor, in graph order.
        result: tree of what the model returns.
        outputs: spec of every returned tensor, in graph order.
    """

    parameters: tuple[Parameter, ...]
    arguments: Mapping[str, Tree]
    inputs: tuple[tuple[str, TensorSpec], ...]
    result: Tree
    outputs: tuple[TensorSpec, ...]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The call's tensors in graph order.

        Raises:
            SessionError: the call does not have the traced form.
        """
        given = self.bind(args, kwargs)
        found: dict[int, Tensor] = {}
        for parameter in self.parameters:
            name = parameter.name
            traced = self.arguments.get(name, parameter.default)
            if name in given:
                _match(name, traced or {"const": None}, given[name], found)
            elif traced != parameter.default or traced is None:
                raise SessionError(f"the call lacks {name!r}", expected=self.describe())
            if name == _CONTAINER_SWITCH:
                self._check_container(traced, given.get(name))
        self._check_lists(given, found[0])
        return [found[i] for i in range(len(self.inputs))]

    def unflatten(self, outputs: Sequence[Tensor], return_dict: bool | None = None) -> Any:
        """The model's return value from the graph's outputs."""
        result = fill(self.result, outputs)
        if return_dict is False and isinstance(result, Output):
            return result.to_tuple()
        return result

    def describe(self) -> str:
        """``(x: f32[s0, 4, 32, 32], t: i64[s0])``."""
        return "(" + ", ".join(f"{name}: {spec}" for name, spec in self.inputs) + ")"

    def _check_lists(self, given: Mapping[str, Any], first: Tensor) -> None:
        for name, tree in self.arguments.items():
            if "each" in tree and len(given[name]) != len(first):
                raise SessionError(
                    f"argument {name} has not one value for each item of the batch",
                    expected=f"{len(first)} values",
                    found=shown(given[name]),
                )

    def _check_container(self, traced: Tree | None, wanted: Any) -> None:
        """Refuse to make an object of a tuple, whose fields nobody knows."""
        if wanted is True and traced != {"const": True} and "tuple" in self.result:
            raise SessionError(
                "the model was traced with return_dict=False",
                remedy="trace it with return_dict=True, or call it with return_dict=False",
            )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name.

        Raises:
            SessionError: there are too many, or one is unknown or given twice.
        """
        names = [p.name for p in self.parameters if p.positional]
        if len(args) > len(names):
            raise SessionError(
                f"{len(args)} positional arguments", expected=f"at most {len(names)}: {names}"
            )
        given = dict(zip(names, args, strict=False))
        known = {p.name for p in self.parameters}
        for name, value in kwargs.items():
            if name in given:
                raise SessionError(f"argument {name!r} is given twice")
            if name not in known:
                raise SessionError(
                    f"unknown argument {name!r}",
                    expected=", ".join(sorted(known)),
                    remedy=nearest(name, known),
                )
            given[name] = value
        return given


def call_arguments(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    forward: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """The call's arguments by name, in the order of ``forward``.

    Args:
        model: that is called.
        args: of the call.
        kwargs: of the call.
        forward: the model's own, where something else stands in its place.

    Raises:
        TraceError: the arguments do not fit ``forward``, or it takes ``*args``.
    """
    signature = inspect.signature(forward or model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        what = f"the example inputs do not fit {type(model).__name__}.forward"
        raise TraceError(what, expected=str(signature), found=str(error)) from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TraceError(
                f"{type(model).__name__}.forward takes *{name}",
                remedy="wrap the model in a module whose forward names its arguments",
            )
        arguments.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return arguments


def make_signature(
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    input_specs: Sequence[TensorSpec],
    out_spec: Any,
    outputs: Sequence[TensorSpec | None],
    lists: Collection[str] = (),
) -> CallSignature:
    """Describe a traced call.

    Args:
        forward: the model's, for names and defaults.
        arguments: of the traced call, by name.
        input_specs: of the graph's tensor inputs, in graph order.
        out_spec: the pytree spec of what ``forward`` returned.
        outputs: per returned leaf its spec, or None where the leaf is None.
        lists: names of arguments that are a list of the same constant for each item of the batch.
    """
    counter = iter(range(len(input_specs) + 1))
    trees = {
        name: {"each": _describe(f"{name}[0]", value[0], counter)}
        if name in lists
        else _describe(name, value, counter)
        for name, value in arguments.items()
    }
    names = [name for name, tree in trees.items() for name in _tensor_names(name, tree)]
    return CallSignature(
        parameters=tuple(_parameters(forward, arguments)),
        arguments=trees,
        inputs=tuple(zip(names, input_specs, strict=True)),
        result=_result_tree(out_spec, outputs),
        outputs=tuple(spec for spec in outputs if spec is not None),
    )


def _parameters(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[Parameter]:
    seen = set()
    for name, p in inspect.signature(forward).parameters.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        seen.add(name)
        yield Parameter(name, p.kind is not p.KEYWORD_ONLY, _constant(p.default))
    for name in arguments:
        if name not in seen:  # through **kwargs
            yield Parameter(name, False, None)


def _constant(default: Any) -> Tree | None:
    """The tree of a default that is a constant, or a tuple of some; else None."""
    if isinstance(default, tuple):
        children = [_constant(one) for one in default]
        return {"tuple": children} if None not in children else None
    return {"const": default} if isinstance(default, _CONSTANTS) else None


def _describe(path: str, value: Any, counter: Iterator[int]) -> Tree:
    if isinstance(value, Tensor):
        return {"tensor": next(counter)}
    if isinstance(value, _CONSTANTS):
        return {"const": value}
    if isinstance(value, dict):
        return {"dict": {k: _describe(f"{path}.{k}", v, counter) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_describe(f"{path}[{i}]", v, counter) for i, v in enumerate(value)]}
    raise TraceError(
        f"argument {path} is a {type(value).__name__}",
        expected="tensors, numbers, strings, None, or lists, tuples and dicts of these",
    )


def _tensor_names(path: str, tree: Tree) -> Iterator[str]:
    match tree:
        case {"tensor": _}:
            yield path
        case {"dict": children}:
            for key, child in children.items():
                yield from _tensor_names(f"{path}.{key}", child)
        case {"list": children} | {"tuple": children}:
            for i, child in enumerate(children):
                yield from _tensor_names(f"{path}.{i}", child)


def _match(path: str, tree: Tree, value: Any, found: dict[int, Tensor]) -> None:
    """Put the tensors of a call's argument where the traced one had them."""
    match tree:
        case {"tensor": index}:
            if not isinstance(value, Tensor):
                number = isinstance(value, int | float)
                raise SessionError(
                    f"argument {path} is a {type(value).__name__}",
                    expected="a tensor",
                    found=shown(value),
                    remedy=f"torch.tensor([{value}])" if number else "",
                )
            found[index] = value
        case {"const": traced}:
            _match_constant(path, traced, value)
        case {"dict": children}:
            # Keys that are numbers are texts in a manifest.
            value = {} if value is None else value
            given = {str(k): v for k, v in value.items()} if isinstance(value, dict) else None
            if given is None or given.keys() != set(map(str, children)):
                raise _other_form(path, f"a dict with the keys {sorted(children)}", value)
            for key, child in children.items():
                _match(f"{path}.{key}", child, given[str(key)], found)
        case {"each": child}:
            _match_list(path, [child] * len(value) if isinstance(value, list) else [], value, found)
        case {"list": children} | {"tuple": children}:
            _match_list(path, children, value, found)


def _match_list(path: str, children: Sequence[Tree], value: Any, found: dict[int, Tensor]) -> None:
    if not isinstance(value, list | tuple) or len(value) != len(children):
        raise _other_form(path, f"{len(children)} values", value)
    for i, child in enumerate(children):
        _match(f"{path}[{i}]", child, value[i], found)


def _match_constant(path: str, traced: Any, value: Any) -> None:
    same = type(value) is type(traced) and value == traced
    same = same or (traced is None and value == {})  # pipelines pass either for "no options"
    if not same and path != _CONTAINER_SWITCH:
        raise SessionError(
            f"argument {path} differs from the traced one",
            expected=repr(traced),
            found=shown(value),
            remedy="compile the model with this value",
        )


def _other_form(path: str, expected: str, value: Any) -> SessionError:
    return SessionError(f"argument {path} has another form", expected=expected, found=shown(value))


def _result_tree(out_spec: Any, outputs: Sequence[TensorSpec | None]) -> Tree:
    count = 0
    leaves: list[Any] = []
    for spec in outputs:
        leaves.append({"const": None} if spec is None else {"tensor": count})
        count += spec is not None
    # Leaves travel as positions, so that containers which look into their fields accept them.
    structure = _pytree.tree_unflatten(list(range(len(leaves))), out_spec)
    return _result_node(structure, leaves)


def _result_node(value: Any, leaves: Sequence[Tree]) -> Tree:
    if isinstance(value, int):
        return leaves[value]
    if is_dataclass(value):
        present = [f.name for f in fields(value) if getattr(value, f.name) is not None]
        return {"object": {k: _result_node(getattr(value, k), leaves) for k in present}}
    if isinstance(value, Mapping):
        return {"dict": {k: _result_node(v, leaves) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_result_node(v, leaves) for v in value]}
    raise TraceError(
        f"the model returns a {type(value).__name__}",
        expected="tensors, or lists, tuples, dicts and dataclasses of these",
    )


def fill(tree: Tree, outputs: Sequence[Tensor]) -> Any:
    """What a tree stands for, with these tensors in their places."""
    match tree:
        case {"tensor": index}:
            return outputs[index]
        case {"object": children}:
            return Output((k, fill(v, outputs)) for k, v in children.items())
        case {"dict": children}:
            return {k: fill(v, outputs) for k, v in children.items()}
        case {"each": child}:
            return [fill(child, outputs) for _ in range(len(outputs[0]))]
        case {"list": children}:
            return [fill(v, outputs) for v in children]
        case {"tuple": children}:
            return tuple(fill(v, outputs) for v in children)
    return tree["const"]
