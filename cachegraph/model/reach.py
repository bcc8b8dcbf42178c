"""What can be reached from where: by the names in code, and tensors of a trace in what is kept."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
CACHE = type(functools.lru_cache(lambda: None))
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_FOREIGN = {"torch", "sympy", "numpy", *sys.stdlib_module_names}
_DEEP = 6  # containers within one another that what a cache keeps may have


def named(function: types.FunctionType) -> Iterator[Any]:
    """What a function's code may mean by its names, in its Python module and in those it names."""
    names, codes = set[str](), [function.__code__]
    for code in codes:
        names.update(code.co_names, (text for text in code.co_consts if isinstance(text, str)))
        codes.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
    packages = accumulate(str(function.__globals__.get("__package__")).split("."), "{}.{}".format)
    imported = [f"{package}.{name}" for package in packages for name in names]
    found = [sys.modules.get(name) for name in (*names, *imported)]
    spaces = [function.__globals__]
    seen = {id(function.__globals__)}
    for space in spaces:
        found += [space[name] for name in names & space.keys()]
        for one in found:
            if not isinstance(one, types.ModuleType):
                yield one
            elif not is_foreign(one.__name__) and id(vars(one)) not in seen:
                seen.add(id(vars(one)))
                spaces.append(vars(one))
        found = []


def is_symbolic(value: Any) -> bool:
    """Whether a value is a tensor without data, or one of its sizes."""
    kind = type(value)
    return issubclass(kind, _SYMBOLS) or (
        issubclass(kind, Tensor) and kind.__module__.startswith("torch._subclasses")
    )


def is_foreign(module: Any) -> bool:
    """Whether a Python module, by its name, is no model's own code."""
    return (module if isinstance(module, str) else "builtins").partition(".")[0] in _FOREIGN


def holds_symbols(holder: Any) -> bool:
    """Whether tensors of a trace, or its sizes, are in what an object is made of."""
    level = [vars(holder)] if isinstance(holder, CODE) else [holder]
    seen: dict[int, Any] = {}
    for _ in range(_DEEP):
        found = [one for one in gc.get_referents(*level) if not isinstance(one, (*PLAIN, *CODE))]
        if any(map(is_symbolic, found)):
            return True
        level = [one for one in {id(one): one for one in found}.values() if id(one) not in seen]
        level = [one for one in level if not isinstance(one, (Tensor, nn.Module))]
        seen |= {id(one): one for one in level}
    return False
