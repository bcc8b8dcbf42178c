"""HiCache's forecast: TaylorSeer's finite differences, weighted with scaled Hermite polynomials.

It is the basis ``hermite`` of the forecast policy, with TaylorSeer's keys.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from .bases import Shape
from .differences import DifferenceMethod


class Hermite(DifferenceMethod):
    """``sum_j F_j s^j H_j(s x) / j!``: ``s`` is sigma, ``H`` the physicists' polynomials."""

    basis_name: ClassVar[str] = "hermite"

    method: Literal["hermite"]
    sigma: FiniteFloat = Field(
        default=0.5, gt=0, le=1, description="a number above 0, at most 1: scale of the polynomials"
    )

    def shape(self) -> Shape:
        """What the basis is told."""
        return Shape(self.order, sigma=self.sigma)
