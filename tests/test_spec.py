"""Specs of tensors: text and back, symbolic sizes, and that a size is never run as code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cachegraph.artifact.data import DataError, from_data, to_data
from cachegraph.spec import TensorSpec, evaluate, short_dtype, shown, spec_text

EXPRESSIONS = {  # what torch 2.13 writes, and what it is for a batch of 6
    "s77": 6,
    "2*s77": 12,
    "s77 - 1": 5,
    "-s77 + 8": 2,
    "(s77//4)": 1,
    "((s77 + 1)//2)": 3,
    "-(((-s77)//4))": 2,
    "Max(4, s77)": 6,
    "Min(4, (s77//2))": 3,
    "Mod(s77**2, 7)": 1,
    "PythonMod(s77, 4)": 2,
    "CeilDiv(s77, 4)": 2,
    "BitwiseFn_bitwise_and(s77, 3)": 2,
    "256": 256,
}
DTYPES = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
dims = st.integers(0, 10**6) | st.sampled_from(sorted(set(EXPRESSIONS) - {"256"}))
specs = st.builds(
    TensorSpec, st.lists(dims, max_size=5).map(tuple), st.sampled_from(sorted(DTYPES, key=str))
)


@given(specs)
def test_text_and_back(spec: TensorSpec) -> None:
    assert TensorSpec.parse(str(spec)) == spec


@given(specs)
def test_json_and_back(spec: TensorSpec) -> None:
    text = json.dumps(to_data(spec, TensorSpec))
    assert from_data(json.loads(text), TensorSpec) == spec


def test_text() -> None:
    assert str(TensorSpec(("s0", 256, 1152), torch.float32)) == "f32[s0, 256, 1152]"
    assert str(TensorSpec((), torch.bool)) == "b8[]"
    assert TensorSpec.parse("i64[]") == TensorSpec((), torch.int64)


@pytest.mark.parametrize("text", ["", "f32", "f32[2", "f33[2]", "[2]", "f32[2] ", "f32(2)"])
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match="not a tensor spec"):
        TensorSpec.parse(text)
    with pytest.raises(DataError, match="expected a spec such as"):
        from_data(text, TensorSpec)


@pytest.mark.parametrize(("expression", "value"), EXPRESSIONS.items())
def test_sizes_are_worked_out(expression: str, value: int) -> None:
    assert evaluate(expression, {"s77": 6}) == value
    assert TensorSpec((expression, 2), torch.float32).sizes({"s77": 6}) == (value, 2)


def test_sizes_are_what_torch_means_by_them() -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            b = x.shape[0]
            lengths = (b // 2, (b + 1) // 2, 2 * b, b - 1, max(b, 4), -(-b // 4), b * b % 7, b & 3)
            return tuple(x.new_zeros(n) for n in lengths)

    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Sizes(), (torch.zeros(6),), dynamic_shapes=(batch,))
    found = [TensorSpec.of(n.meta["val"]) for n in program.graph.output_node().args[0]]
    [symbol] = {name for spec in found for name in spec.symbols()}
    for size in (2, 3, 5, 9):
        wanted = [len(t) for t in Sizes()(torch.zeros(size))]
        again = [TensorSpec.parse(str(spec)) for spec in found]
        assert [spec.sizes({symbol: size})[0] for spec in again] == wanted


def test_bytes_and_symbols() -> None:
    spec = TensorSpec.parse("bf16[Max(2, s0), 2*s1, 3]")
    assert spec.symbols() == {"s0", "s1"}
    assert spec.nbytes({"s0": 5, "s1": 7}) == 5 * 14 * 3 * 2
    with pytest.raises(KeyError, match="s1"):
        spec.nbytes({"s0": 5})


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('made').touch()",
        "open('made', 'w')",
        "().__class__",
        "s0.real",
        "[s0][0]",
        "s0 if s0 else 1",
        "s0; s0",
        "Max(*s0)",
        "Max(a=s0)",
        "'2'",
        "2.5",
        "",
    ],
)
def test_a_size_is_arithmetic_and_never_run(
    expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, KeyError)):
        evaluate(expression, {"s0": 2})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "expression", ["1**65", "9**9**9**9", "s0**-1", "9**63", "Max(s0, 9**21)", "s0" + "+s0" * 999]
)
def test_sizes_are_bounded(expression: str) -> None:
    """Numbers that nobody has time or memory for are not worked out."""
    with pytest.raises(ValueError, match="not a size: a"):
        evaluate(expression, {"s0": 2})


def test_spec_text_of_recorded_values() -> None:
    pair = (torch.zeros(2, 3), [torch.zeros((), dtype=torch.int64)])
    assert spec_text(pair) == "(f32[2, 3], (i64[]))"
    assert spec_text(3) == "3"
    assert short_dtype(torch.float8_e4m3fn) == "float8_e4m3fn"


def test_values_in_messages() -> None:
    many = [torch.zeros(2, 3), 1.5, None, "a" * 200, {"x": (torch.zeros(4),)}, np.zeros((2, 2))]
    assert shown(many) == (
        f"[f32[2, 3], 1.5, None, '{'a' * 79}..., {{'x': (f32[4])}}, ndarray[2, 2]]"
    )
    assert shown([torch.zeros(1)] * 1000).endswith("f32[1], ... 1000 in all]")
    assert shown(object()) == "object"
