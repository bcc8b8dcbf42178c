"""TaylorSeer: extrapolate skipped steps from finite differences of computed ones.

Source: Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT/taylor_utils/__init__.py:5-47``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .differences import DifferenceMethod


class TaylorSeer(DifferenceMethod):
    """Taylor's polynomial: ``sum_j F_j x^j / j!``."""

    basis_name: ClassVar[str] = "taylor"

    method: Literal["taylorseer"]
