"""Tensors that live between steps, and numbers that differ from step to step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from cachegraph.spec import TensorSpec

# What a site keeps beside its values, in place of a value's index.
ORDER = -1  # (B, J, N) int64: tokens to recompute in the J partial steps that follow, best first
AGE = -2  # (B, N) float32: partial steps since each token was recomputed
SCORE = -3  # (B, N) float32: entropy of each token's row of the attention map
INNER = -4  # (B, N, C): of a fused site, the attention that its last projection takes
EXTRAS = {ORDER: "order", AGE: "age", SCORE: "score", INNER: "inner"}

Numbers = tuple["float | int | Numbers", ...]


@dataclass(frozen=True)
class Slot:
    """One tensor kept between steps, as a step's graph sees it: a value, or an order of tokens.

    Attributes:
        site: name of the site.
        value: which of the site's values (joint attention has one per stream), or one of EXTRAS.
        age: position among the values that the step uses, 0 = newest.
        spec: shape and dtype.
    """

    site: str
    value: int
    age: int
    spec: TensorSpec

    @classmethod
    def of(cls, key: str, age: int, spec: TensorSpec) -> Slot:
        """The slot of a key."""
        site, mark, part = key.rpartition("#")
        if mark:
            return cls(site, int(part), age, spec)
        site, _, part = key.rpartition(":")
        return cls(site, next(k for k, name in EXTRAS.items() if name == part), age, spec)

    @property
    def key(self) -> str:
        """What is kept, whichever step made it: ``blocks.3.attn#0``; ``blocks.3.mlp:order``."""
        return slot_key(self.site, self.value)

    @property
    def name(self) -> str:
        """The key, with ``@1`` for the second newest value."""
        return self.key + (f"@{self.age}" if self.age else "")

    @property
    def label(self) -> str:
        """The name as an identifier: ``blocks_3_attn_0``."""
        return re.sub(r"\W+", "_", self.name)


def slot_key(site: str, value: int) -> str:
    """What is kept of a site: one of its values, or one of EXTRAS."""
    return f"{site}:{EXTRAS[value]}" if value in EXTRAS else f"{site}#{value}"


class ConstantKind(StrEnum):
    """What the numbers of a step constant are."""

    COEFFICIENTS = "coefficients"  # (m,) float32: weights of a forecast
    TOKENS = "tokens"  # (k,) int64, 0 .. k-1: its length says how many tokens are recomputed;
    # a single one is (0, 0), for torch makes constants of sizes of 1
    AGE = "age"  # (1,) int64: how many partial steps came before this one
    STEP = "step"  # (1,) int64: number of the step, for random scores
    COUNTS = "counts"  # (L, J) int64: tokens of L sites in the J partial steps that follow


@dataclass(frozen=True)
class StepConstant:
    """An input that differs from step to step though the graph is the same.

    Attributes:
        name: of the graph input.
        sites: the sites that use it.
        values: step -> numbers, nested as the tensor is.
        kind: what the numbers are.
    """

    name: str
    sites: tuple[str, ...]
    values: dict[int, Numbers]
    kind: ConstantKind
