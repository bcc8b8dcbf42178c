"""Signatures: a call becomes a flat list of tensors and back; every call that does not fit."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from cachegraph.artifact.data import from_data, to_data
from cachegraph.errors import SessionError, TraceError
from cachegraph.model.signature import CallSignature, Output, call_arguments, make_signature
from cachegraph.spec import TensorSpec

X, T, A, B = (torch.full((2, 3), float(i)) for i in range(4))


def forward(
    x: Tensor,
    t: Tensor,
    guidance: Tensor | None = None,
    parts: dict[str, Tensor] | None = None,
    *,
    pair: list[Tensor] | None = None,
    scale: float = 1.0,
    mode: str = "plain",
    return_dict: bool = True,
) -> Tensor:
    return x


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def signed(
    *args: Any, result: Any = X, function: Callable[..., Any] = forward, **kwargs: Any
) -> CallSignature:
    """The signature of a call, as tracing makes it."""
    arguments = call_arguments(Model(function), args, kwargs)
    tensors = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    leaves, out_spec = _pytree.tree_flatten(result)
    return make_signature(
        function,
        arguments,
        [TensorSpec.of(t) for t in tensors],
        out_spec,
        [None if leaf is None else TensorSpec.of(leaf) for leaf in leaves],
    )


def refused(signature: CallSignature, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SessionError) as caught:
        signature.flatten(args, kwargs)
    return str(caught.value)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return [id(t) for t in found] == [id(t) for t in wanted]


# --- calls that fit


def test_tensors_are_found_in_graph_order() -> None:
    signature = signed(X, T)
    assert [name for name, _ in signature.inputs] == ["x", "t"]
    assert same(signature.flatten((X, T), {}), [X, T])
    assert same(signature.flatten((X,), {"t": T}), [X, T])
    assert same(signature.flatten((), {"t": T, "x": X}), [X, T])
    assert signature.describe() == "(x: f32[2, 3], t: f32[2, 3])"


def test_defaults_may_be_said_or_left_out() -> None:
    signature = signed(X, T, guidance=None, scale=1.0)
    for kwargs in ({}, {"guidance": None}, {"scale": 1.0, "mode": "plain", "parts": None}):
        assert same(signature.flatten((X, T), kwargs), [X, T])


def test_no_options_may_be_said_either_way() -> None:
    """Pipelines pass an empty dict or None for them."""
    assert same(signed(X, T).flatten((X, T), {"parts": {}}), [X, T])
    assert same(signed(X, T, parts={}).flatten((X, T), {"parts": None}), [X, T])
    assert same(signed(X, T, parts={}).flatten((X, T), {"parts": {}}), [X, T])


def test_containers() -> None:
    signature = signed(X, T, parts={"b": A, "a": B}, pair=[A, X])
    assert [name for name, _ in signature.inputs] == [
        "x",
        "t",
        "parts.b",
        "parts.a",
        "pair.0",
        "pair.1",
    ]
    found = signature.flatten((X, T), {"pair": (B, T), "parts": {"a": A, "b": X}})
    assert same(found, [X, T, X, A, B, T])


def test_the_form_of_the_result_is_not_a_part_of_the_call() -> None:
    signature = signed(X, T, return_dict=True)
    assert same(signature.flatten((X, T), {"return_dict": False}), [X, T])


def test_arguments_through_keywords() -> None:
    signature = signed(X, extra=T, function=lambda x, **more: x)
    assert same(signature.flatten((X,), {"extra": T}), [X, T])


def test_it_survives_json() -> None:
    signature = signed(X, T, parts={"a": A}, scale=0.5, result={"out": [X, None]})
    text = json.dumps(to_data(signature, CallSignature))
    again = from_data(json.loads(text), CallSignature)
    assert again == signature
    assert same(again.flatten((X, T), {"parts": {"a": A}, "scale": 0.5}), [X, T, A])


# --- calls that do not fit


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, "the call lacks 't'; expected (x: f32[2, 3], t: f32[2, 3], parts.a: "),
        ((X, T), {}, "the call lacks 'parts'; expected (x: "),
        (
            (X, T, None, {"a": A}, A),
            {},
            "5 positional arguments; expected at most 4: ['x', 't', 'guidance', 'parts']",
        ),
        ((X, T), {"x": X, "parts": {"a": A}}, "argument 'x' is given twice"),
        (
            (X, T),
            {"parts": {"a": A}, "sclae": 2.0},
            "unknown argument 'sclae'; expected guidance, mode, pair, parts, return_dict, scale, "
            "t, x; did you mean 'scale'?",
        ),
        (
            (X, 3),
            {"parts": {"a": A}},
            "argument t is a int; expected a tensor; found 3; torch.tensor([3])",
        ),
        ((X, None), {"parts": {"a": A}}, "argument t is a NoneType; expected a tensor"),
        (
            (X, T, A),
            {"parts": {"a": A}},
            "argument guidance differs from the traced one; expected None; found f32[2, 3]; "
            "compile the model with this value",
        ),
        (
            (X, T),
            {"parts": {"a": A}, "scale": 1.5},
            "argument scale differs from the traced one; expected 1.0; found 1.5; "
            "compile the model with this value",
        ),
        (
            (X, T),
            {"parts": {"a": A}, "scale": 1},
            "argument scale differs from the traced one; expected 1.0; found 1; "
            "compile the model with this value",
        ),
        (
            (X, T),
            {"parts": {"a": A, "c": B}},
            "argument parts has another form; expected a dict with the keys ['a']; "
            "found {'a': f32[2, 3], 'c': f32[2, 3]}",
        ),
        (
            (X, T),
            {"parts": [A]},
            "argument parts has another form; expected a dict with the keys ['a']; "
            "found [f32[2, 3]]",
        ),
        (
            (X, T),
            {"parts": {"a": [A]}},
            "argument parts.a is a list; expected a tensor; found [f32[",
        ),
    ],
)
def test_call_that_does_not_fit(args: tuple, kwargs: dict[str, Any], message: str) -> None:
    assert refused(signed(X, T, parts={"a": A}), *args, **kwargs).startswith(message)


def test_list_of_another_length() -> None:
    signature = signed(X, T, pair=[A, B])
    message = "argument pair has another form; expected 2 values; found [f32[2, 3]]"
    assert refused(signature, X, T, pair=[A]) == message
    message = "argument pair[1] is a str; expected a tensor; found 'b'"
    assert refused(signature, X, T, pair=[A, "b"]) == message


def test_a_constant_without_a_default_has_to_be_said() -> None:
    signature = signed(X, 7, function=lambda x, n: x)
    assert same(signature.flatten((X, 7), {}), [X])
    assert refused(signature, X) == "the call lacks 'n'; expected (x: f32[2, 3])"


def test_a_default_that_was_overridden_has_to_be_said() -> None:
    signature = signed(X, T, scale=2.0)
    assert refused(signature, X, T) == "the call lacks 'scale'; expected " + signature.describe()


# --- what cannot be traced


def test_arguments_that_cannot_be_traced() -> None:
    with pytest.raises(TraceError) as caught:
        signed(X, T, parts={"a": {1, 2}})
    assert str(caught.value) == (
        "argument parts.a is a set; expected tensors, numbers, strings, None, or lists, tuples "
        "and dicts of these"
    )


def test_calls_that_do_not_fit_forward() -> None:
    with pytest.raises(TraceError, match=r"Model.forward takes \*images; wrap the model"):
        call_arguments(Model(lambda *images: images), (X,), {})
    with pytest.raises(TraceError, match=r"do not fit Model.forward; expected \(x\); found "):
        call_arguments(Model(lambda x: x), (), {"y": X})


def test_results_that_cannot_be_traced() -> None:
    with pytest.raises(TraceError, match="the model returns a deque; expected tensors, or lists"):
        signed(X, T, result=deque([X]))


# --- results


def test_results_are_built_again() -> None:
    signature = signed(X, T, result=[X, (T, None), {"a": A}])
    assert signature.result == {
        "list": [
            {"tensor": 0},
            {"tuple": [{"tensor": 1}, {"const": None}]},
            {"dict": {"a": {"tensor": 2}}},
        ]
    }
    assert len(signature.outputs) == 3
    found = signature.unflatten([B, A, X])
    assert (found[0], found[1], found[2]) == (B, (A, None), {"a": X})
    assert signature.unflatten([B, A, X], return_dict=True) is not None


@dataclass
class Sampled:
    sample: Tensor
    mask: Tensor | None = None
    other: Tensor | None = None


torch.export.register_dataclass(Sampled)


def test_objects() -> None:
    signature = signed(X, T, result=Sampled(X, None, T))
    result = signature.unflatten([A, B])
    assert isinstance(result, Output)
    assert result.sample is result[0] is result["sample"] is A
    assert result.other is result[1] is B
    assert result.to_tuple() == (A, B)
    assert result[:1] == (A,)
    assert signature.unflatten([A, B], return_dict=False) == (A, B)
    with pytest.raises(AttributeError, match="sampel"):
        _ = result.sampel
    with pytest.raises(IndexError):
        _ = result[2]


def test_a_tuple_cannot_become_an_object() -> None:
    signature = signed(X, T, result=(X,), return_dict=False)
    assert signature.unflatten([A], return_dict=False) == (A,)
    message = "the model was traced with return_dict=False; trace it with return_dict=True, or"
    assert refused(signature, X, T, return_dict=True).startswith(message)
    assert same(signature.flatten((X, T), {"return_dict": False}), [X, T])


@pytest.mark.parametrize("said", [{}, {"return_dict": True}])
def test_a_model_that_returns_a_tuple_whatever_is_asked(said: dict[str, bool]) -> None:
    signature = signed(X, T, result=(X,), **said)
    assert same(signature.flatten((X, T), {"return_dict": True}), [X, T])
    assert signature.unflatten([A], return_dict=True) == (A,)
