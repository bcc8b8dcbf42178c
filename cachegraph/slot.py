"""Tensors that live between steps, and numbers that differ from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import TensorSpec


@dataclass(frozen=True)
class Slot:
    """One tensor kept between steps: a value of a site, as a step's graph sees it.

    Attributes:
        site: name of the site.
        value: which of the site's values (joint attention has one per stream).
        age: position among the values that the step uses, 0 = newest.
        spec: shape and dtype.
    """

    site: str
    value: int
    age: int
    spec: TensorSpec

    @property
    def name(self) -> str:
        """``blocks.3.attn#0``, with ``@1`` for the second newest value."""
        return f"{self.site}#{self.value}" + (f"@{self.age}" if self.age else "")


@dataclass(frozen=True)
class StepConstant:
    """An input that differs from step to step though the graph is the same.

    Attributes:
        name: of the graph input.
        sites: the sites that use it.
        values: step -> numbers, all of one length; float32 in the graph.
    """

    name: str
    sites: tuple[str, ...]
    values: dict[int, tuple[float, ...]]
