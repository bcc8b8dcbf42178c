"""Shape and dtype of a tensor whose batch may be symbolic."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
DTYPES = {  # by the name used in text
    _SHORT.get(d, str(d).removeprefix("torch.")): d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype)
}
_TEXT = re.compile(r"(\w+)\[(.*)\]")
_SYMBOL = re.compile(r"[A-Za-z_]\w*\b(?!\()")  # not the name of a function

# What torch.export writes into the sizes of tensors. An artifact brings its expressions along, so
# they are read as arithmetic and never as code.
_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "BitwiseFn_bitwise_and": operator.and_,
    "BitwiseFn_bitwise_or": operator.or_,
    "BitwiseFn_bitwise_xor": operator.xor,
}

_ITEMS, _CHARACTERS = 8, 80  # of a value that is shown
_LONGEST = 2_000  # characters of an expression
_LARGEST_EXPONENT = 64

BATCH = "batch"
SIZES = (BATCH, "frames", "height", "width", "text")  # that may be asked to vary

Dim = int | str  # a number, or an expression in shape symbols such as "s0" or "2*s0"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and dtype; its text form is ``f32[s0, 256, 1152]``."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a real or fake tensor; symbolic sizes become expressions."""
        return cls(tuple(map(_dim, tensor.shape)), tensor.dtype)

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """The inverse of ``str``.

        Raises:
            ValueError: the text is not of the form ``f32[2, 16]``.
        """
        match = _TEXT.fullmatch(text)
        if match is None or match[1] not in DTYPES:
            raise ValueError(f"not a tensor spec: {text!r}")
        dims = (d.strip() for d in _split(match[2]) if d.strip())
        return cls(tuple(map(_dim, dims)), DTYPES[match[1]])

    def __str__(self) -> str:
        """Such as ``f32[s0, 256, 1152]``."""
        return f"{short_dtype(self.dtype)}[{', '.join(map(str, self.shape))}]"

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, with every symbol replaced by its value."""
        return tuple(d if isinstance(d, int) else evaluate(d, symbols) for d in self.shape)

    def nbytes(self, symbols: Mapping[str, int]) -> int:
        """Bytes of a dense tensor of this spec."""
        count = 1
        for size in self.sizes(symbols):
            count *= size
        return count * self.dtype.itemsize

    def symbols(self) -> set[str]:
        """The names of the symbols in the shape."""
        return {s for dim in self.shape if isinstance(dim, str) for s in _SYMBOL.findall(dim)}

    def renamed(self, names: Mapping[str, str]) -> TensorSpec:
        """The same with other names for some symbols."""
        dims = (
            d if isinstance(d, int) else _SYMBOL.sub(lambda m: names.get(m[0], m[0]), d)
            for d in self.shape
        )
        return TensorSpec(tuple(dims), self.dtype)


def _dim(size: object) -> Dim:
    """A size as a number where it is one; torch may know a symbol's value and keep the symbol."""
    text = str(size)
    return int(text) if text.lstrip("-").isdigit() else text


def evaluate(expression: str, symbols: Mapping[str, int]) -> int:
    """The value of a shape expression such as ``2*s0``.

    Raises:
        KeyError: a symbol without a value.
        ValueError: not arithmetic on symbols and whole numbers, or on too large ones.
        ZeroDivisionError: it divides by a size of 0.
    """
    if expression in symbols:
        return symbols[expression]
    if len(expression) > _LONGEST:
        raise ValueError(f"not a size: a text of {len(expression)} characters")
    try:
        return _value(ast.parse(expression, mode="eval").body, symbols)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"not a size: {expression!r}") from None


def _split(dims: str) -> Iterator[str]:
    """The parts between commas that stand outside of parentheses."""
    depth = start = 0
    for i, character in enumerate(dims):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            yield dims[start:i]
            start = i + 1
    yield dims[start:]


def _value(node: ast.expr, symbols: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return symbols[name]
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, symbols))
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            base, other = _value(left, symbols), _value(right, symbols)
            if isinstance(op, ast.Pow) and not 0 <= other <= _LARGEST_EXPONENT:
                raise ValueError(f"not a size: an exponent of {other}")
            return _bounded(_OPERATORS[type(op)](base, other))
        case ast.Call(ast.Name(id=name), args, []) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(a, symbols) for a in args))
    raise ValueError(f"not a size: {ast.unparse(node)!r}")


def _bounded(value: int) -> int:
    if abs(value) >= 2**63:
        raise ValueError(f"not a size: a number of {value.bit_length()} bits")
    return value


def short_dtype(dtype: torch.dtype) -> str:
    """The short name used in graph text, such as ``f32``."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def spec_text(value: Any) -> str:
    """Text of a node's recorded value: a spec, a symbolic number, or a tuple of these."""
    if isinstance(value, torch.Tensor):
        return str(TensorSpec.of(value))
    if isinstance(value, list | tuple):
        return "(" + ", ".join(spec_text(v) for v in value) + ")"
    return str(value)


def shown(value: Any) -> str:
    """A value as messages show it, tensors by shape: ``[f32[2, 3], 1.5]``."""
    match value:
        case torch.Tensor():
            return str(TensorSpec.of(value))
        case list() | tuple():
            items = [shown(item) for item in value[:_ITEMS]]
            items += [f"... {len(value)} in all"] if len(value) > _ITEMS else []
            text = ", ".join(items)
            return f"[{text}]" if isinstance(value, list) else f"({text})"
        case dict():
            pairs = [f"{key!r}: {shown(value[key])}" for key in list(value)[:_ITEMS]]
            pairs += [f"... {len(value)} in all"] if len(value) > _ITEMS else []
            return f"{{{', '.join(pairs)}}}"
        case bool() | int() | float() | str() | None:
            text = repr(value)
            return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."
    shape = getattr(value, "shape", None)  # numpy's arrays
    return (
        f"{type(value).__name__}{list(shape)}" if isinstance(shape, tuple) else type(value).__name__
    )


def version_of(tensor: torch.Tensor) -> int:
    """Counts writes to a tensor; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version
