"""TaylorSeer: extrapolate skipped steps from finite differences of computed ones.

Source: Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT/taylor_utils/__init__.py:5-47``.
"""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from typing import Literal

from .differences import DifferenceMethod


class TaylorSeer(DifferenceMethod):
    """Taylor's polynomial: ``sum_j F_j x^j / j!``."""

    method: Literal["taylorseer"]

    def factor(self, order: int, distance: int) -> Fraction:
        """``x^j / j!``."""
        return Fraction((-distance) ** order, factorial(order))
