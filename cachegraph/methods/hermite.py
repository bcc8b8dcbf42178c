"""HiCache's forecast: TaylorSeer's finite differences, weighted with scaled Hermite polynomials.

The paper's code takes differences as if computed steps were neighbours; here, as in TaylorSeer,
they are divided by the gap between them.
"""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from typing import Literal

from pydantic import Field, FiniteFloat

from .differences import DifferenceMethod


class Hermite(DifferenceMethod):
    """``sum_j F_j s^j H_j(s x) / j!``: ``s`` is sigma, ``H`` the physicists' polynomials."""

    method: Literal["hermite"]
    sigma: FiniteFloat = Field(
        default=0.5, gt=0, le=1, description="a number above 0, at most 1: scale of the polynomials"
    )

    def factor(self, order: int, distance: int) -> Fraction:
        """``s^j H_j(s x) / j!`` by ``H_{n+1}(y) = 2 y H_n(y) - 2 n H_{n-1}(y)``."""
        scale = Fraction(self.sigma)
        y = scale * -distance
        before, here = Fraction(0), Fraction(1)
        for n in range(order):
            before, here = here, 2 * y * here - 2 * n * before
        return scale**order * here / factorial(order)
