"""What a skipped step uses in place of its own value: a weighted sum of values of earlier steps.

The weights depend on the numbers of the steps alone. A basis is a function that gives them;
``BASES`` is all there is to change for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import factorial, prod

import numpy as np

Weights = dict[int, Fraction]  # step that made a value -> its weight

_CENTRE = 25  # of Spectrum's time: step 0 is -1, step 50 is 1, whatever the number of steps


@dataclass(frozen=True)
class Shape:
    """What a forecast is told beside the steps.

    Attributes:
        order: highest difference, or degree of the polynomial.
        sigma: scale of Hermite's polynomials.
        ridge: weight of the ridge.
        blend: share of the ridge, against Newton's local form.
        history: how many full steps are fitted; None for all of them.
    """

    order: int = 0
    sigma: float = 0.5
    ridge: float = 0.1
    blend: float = 1.0
    history: int | None = None


@dataclass(frozen=True)
class History:
    """The steps before a skipped one.

    Attributes:
        step: the skipped one.
        full: full steps, newest first.
        used: for every step so far, the one that made the value that it used.
    """

    step: int
    full: Sequence[int]
    used: Sequence[int]

    @property
    def distance(self) -> int:
        """Steps since the last full one."""
        return self.step - self.full[0]


def differences(full: Sequence[int], order: int) -> list[Weights]:
    """TaylorSeer's ``F_0 .. F_order``, as weights of what the full steps made.

    Each is the change of the one before it since the last full step, divided by the gap.
    Source: ``TaylorSeer-DiT/taylor_utils/__init__.py:5-30``.

    Args:
        full: full steps, newest first.
        order: the highest.
    """
    old: list[Weights] = []
    gaps = [newer - older for newer, older in pairwise(full)]
    for step, gap in zip(reversed(full), [1, *reversed(gaps)], strict=True):
        new: list[Weights] = [{step: Fraction(1)}]
        for j in range(min(order, len(old))):
            steps = sorted({*new[j], *old[j]}, reverse=True)
            new.append({s: (new[j].get(s, 0) - old[j].get(s, Fraction())) / gap for s in steps})
        old = new
    return old


def taylor(given: History, shape: Shape) -> Weights:
    """TaylorSeer: ``sum_j F_j x^j / j!``, ``x`` steps after the last full one."""
    return _of_differences(given, shape.order, lambda j: Fraction(given.distance**j, factorial(j)))


def hermite(given: History, shape: Shape) -> Weights:
    """HiCache: ``sum_j F_j s^j H_j(s x) / j!``; ``s`` is sigma, ``H`` the physicists' polynomials.

    Its code takes differences as if full steps were neighbours; here, as in TaylorSeer, they are
    divided by the gap between them.
    """

    def factor(order: int) -> Fraction:
        scale = Fraction(shape.sigma)
        before, here = Fraction(0), Fraction(1)
        for n in range(order):  # H_{n+1}(y) = 2 y H_n(y) - 2 n H_{n-1}(y)
            before, here = here, 2 * scale * given.distance * here - 2 * n * before
        return scale**order * here / factorial(order)

    return _of_differences(given, shape.order, factor)


def lagrange(given: History, shape: Shape) -> Weights:
    """The polynomial through the last ``order + 1`` full steps, at their true distances."""
    nodes, one = given.full[: shape.order + 1], Fraction(1)
    return {
        node: prod((Fraction(given.step - o, node - o) for o in nodes if o != node), start=one)
        for node in nodes
    }


def adams(given: History, shape: Shape) -> Weights:
    """Adams and Bashforth with steps of any width: the last value and the integral of its slope.

    The slope is the polynomial through those between neighbouring full steps, ``order`` of them,
    each at the newer of its two steps. Source: Hairer, Norsett, Wanner, "Solving Ordinary
    Differential Equations I", III.1 and III.5; slopes of values stand for the right-hand side.
    """
    last = given.full[0]
    weights: Weights = {last: Fraction(1)}
    pairs = list(pairwise(given.full))[: shape.order]
    for newer, older in pairs:
        others = [node - last for node, _ in pairs if node != newer]
        area = _integral(others, given.distance) / prod(newer - last - o for o in others)
        slope = area / (newer - older)
        weights[newer] = weights.get(newer, Fraction()) + slope
        weights[older] = weights.get(older, Fraction()) - slope
    return weights


def foca(given: History, shape: Shape) -> Weights:
    """FoCa as cache-dit computes it (1.5.3): both slopes are per full or per used step.

    ``A + min(e, 3) / 2 ((A - A') + (k - k'))`` with the last two full values and the last two that
    were used, ``e`` steps after the last full one; beyond 3 the rise shrinks as ``3 / e``.
    """
    weights: Weights = {given.full[0]: Fraction(1)}
    if len(given.full) < 2 or len(given.used) < 2:
        return weights
    e = given.distance
    rise = Fraction(min(e, 3), 2) * Fraction(3, max(e, 3))
    parts = (*zip(given.full[:2], (rise, -rise), strict=True),)
    for source, weight in (*parts, (given.used[-1], rise), (given.used[-2], -rise)):
        weights[source] = weights.get(source, Fraction()) + weight
    return weights


def chebyshev(given: History, shape: Shape) -> Weights:
    """Spectrum: ``T(s) (X'X + ridge I)^-1 X'``, with Chebyshev's polynomials at full steps as X.

    With ``blend`` below 1, the rest is Newton's form of second order through the last full steps,
    taken as equally far apart as the last two.
    """
    nodes = np.array(given.full[: shape.history])
    made = np.polynomial.chebyshev.chebvander((nodes - _CENTRE) / _CENTRE, shape.order)
    [at] = np.polynomial.chebyshev.chebvander([(given.step - _CENTRE) / _CENTRE], shape.order)
    fitted = at @ np.linalg.solve(made.T @ made + shape.ridge * np.eye(shape.order + 1), made.T)
    pairs = zip(given.full, fitted.tolist(), strict=False)
    share = Fraction(shape.blend)
    weights = {node: share * Fraction(weight) for node, weight in pairs}
    for node, weight in _newton(given).items() if share != 1 else ():
        weights[node] = weights.get(node, Fraction()) + (1 - share) * weight
    return weights


@dataclass(frozen=True)
class Basis:
    """A way to forecast.

    Attributes:
        weights: of the values that a skipped step uses.
        order: where none is given; None where there is no choice of it.
        keys: of a schedule that belong to it alone.
        keeps: later forecasts use the forecast itself.
        differs: it takes differences, whose published code begins with the last step of a warmup.
        fits: it fits a polynomial, whose degree may be above the number of full steps.
    """

    weights: Callable[[History, Shape], Weights]
    order: int | None
    keys: tuple[str, ...] = ()
    keeps: bool = False
    differs: bool = False
    fits: bool = False


BASES = {
    "taylor": Basis(taylor, 2, differs=True),
    "lagrange": Basis(lagrange, 2),
    "hermite": Basis(hermite, 2, ("sigma",), differs=True),
    "chebyshev": Basis(chebyshev, 4, ("ridge", "blend", "history"), fits=True),
    "foca": Basis(foca, None, keeps=True),
    "adams": Basis(adams, 2),
}


def _of_differences(given: History, order: int, factor: Callable[[int], Fraction]) -> Weights:
    """The sum of the differences, each times its factor."""
    total: Weights = {}
    for j, difference in enumerate(differences(given.full, order)):
        for step, weight in difference.items():
            total[step] = total.get(step, Fraction()) + factor(j) * weight
    return total


def _newton(given: History) -> Weights:
    """``v0 + k d1 + k (k - 1) / 2 d2`` of the last full steps, as far as there are three."""
    if len(given.full) < 2:
        return {given.full[0]: Fraction(1)}
    first, second, *older = given.full[:3]
    k = Fraction(given.distance, first - second)
    bend = k * (k - 1) / 2 if older else Fraction()
    weights = {first: 1 + k + bend, second: -k - 2 * bend}
    return {**weights, **dict.fromkeys(older, bend)}


def _integral(roots: Sequence[int], upper: int) -> Fraction:
    """Of the polynomial with these roots, from 0 to ``upper``."""
    coefficients = [Fraction(1)]  # of x^0, x^1, ...
    for root in roots:
        pairs = zip([Fraction(), *coefficients], [*coefficients, Fraction()], strict=True)
        coefficients = [lower - root * here for lower, here in pairs]
    terms = (c * Fraction(upper ** (n + 1), n + 1) for n, c in enumerate(coefficients))
    return sum(terms, Fraction())
