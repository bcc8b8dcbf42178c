"""What a search may choose: how steps are skipped, and which steps are full."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cachegraph.errors import InputError
from cachegraph.methods.bases import BASES
from cachegraph.model.site import SiteKind
from cachegraph.model.trace import TracedModel
from cachegraph.plan.action import Compute
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import FORMAT, Schedule, load_schedule

_WARPS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)  # full steps crowd at the end, or at the beginning
_ORDERS = (0, 1, 2, 3)
_MOVES = (-1, 1, -2, 2, -4, 4)
_RATIOS = (0.05, 0.1, 0.2, 0.35)  # of tokens that a step recomputes
_INTERVALS = range(2, 11)


@dataclass(frozen=True)
class Family:
    """Schedules that differ in their full steps alone.

    Attributes:
        sites: of the schedule, such as ``{"kinds": ["stack"]}``.
        basis: of its forecasts.
        order: of its forecasts, where the basis has one.
    """

    sites: tuple[tuple[str, Any], ...]
    basis: str
    order: int | None = None

    @property
    def name(self) -> str:
        """``stack lagrange 2``."""
        where = dict(self.sites)
        place = where["include"][0] if "include" in where else "+".join(where["kinds"])
        return " ".join([place, self.basis, *([] if self.order is None else [str(self.order)])])

    def schedule(self, steps: int, full: Sequence[int]) -> Schedule:
        """The schedule with these full steps."""
        policy: dict[str, Any] = {"method": "forecast", "basis": self.basis}
        if self.order is not None:
            policy["order"] = min(self.order, len(full) - 1)
        policy["full_steps"] = list(full)
        sites = {key: list(value) for key, value in self.sites}
        keys = {"cachegraph": FORMAT, "steps": steps, "policy": policy, "sites": sites}
        return load_schedule(keys)

    def values(self, count: int) -> int:
        """How many kept values a skipped step uses, after so many full steps."""
        if self.basis in ("foca", "chebyshev"):
            return min(4 if self.basis == "foca" else count, count)
        return min((self.order or 0) + 1, count)


@dataclass(frozen=True)
class Tokens:
    """ToCa: steps that are not full recompute a share of the tokens; full ones are its own choice.

    Attributes:
        ratio: that share, of which ToCa makes one for each step, block and kind.
        interval: between full steps, about.
    """

    ratio: float
    interval: int

    @property
    def sites(self) -> tuple[tuple[str, Any], ...]:
        """What its steps cost by: the share alone."""
        return (("toca", (self.ratio,)),)

    @property
    def name(self) -> str:
        """``toca 0.1 interval 3``."""
        return f"toca {self.ratio:g} interval {self.interval}"

    def schedule(self, steps: int, _full: Sequence[int] = ()) -> Schedule:
        """The schedule; its full steps are its own."""
        policy = {"method": "toca", "interval": self.interval, "fresh_ratio": self.ratio}
        return load_schedule({"cachegraph": FORMAT, "steps": steps, "policy": policy})

    def values(self, _count: int) -> int:
        """How many kept values a site uses, as a forecast of first order does."""
        return 2


Way = Family | Tokens


@dataclass(frozen=True)
class Candidate:
    """One schedule: a way to skip steps, and the steps that are full."""

    family: Way
    full: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the log of trials."""
        return f"{self.family.name}: {' '.join(map(str, self.full))}"


def families(traced: TracedModel, *, ranges: bool) -> list[Family]:
    """The ways to skip steps that fit a model.

    Args:
        traced: the model.
        ranges: also stacks that leave the first and last blocks to every step, which costs more.
    """
    kinds = tuple(dict.fromkeys(str(site.kind) for site in traced.sites))
    places: list[tuple[tuple[str, Any], ...]] = [(("kinds", kinds),)]
    if traced.stack is not None:
        places.insert(0, (("kinds", (str(SiteKind.STACK),)),))
        names = [] if not ranges else _inner_blocks(traced)
        places += [(("kinds", (str(SiteKind.STACK),)), ("include", (name,))) for name in names]
    found = []
    for sites in places:
        for name, basis in BASES.items():
            orders: Sequence[int | None] = _ORDERS[1:] if basis.order is not None else (None,)
            orders = (basis.order,) if basis.fits else orders
            found += [Family(sites, name, order) for order in orders]
        found.append(Family(sites, "lagrange", 0))
    return found


def token_candidates(traced: TracedModel, steps: int) -> list[Candidate]:
    """ToCa with several shares of tokens and intervals; none for a model that it does not fit."""
    found = []
    for ratio in _RATIOS:
        for interval in _INTERVALS:
            family = Tokens(ratio, interval)
            try:
                rows = plan_of(family.schedule(steps), traced).rows
            except InputError:
                return []
            full = [s for s, row in enumerate(rows) if all(isinstance(a, Compute) for a in row)]
            found.append(Candidate(family, tuple(full)))
    return found


def _inner_blocks(traced: TracedModel) -> list[str]:
    """Ranges without the first block, and without the first and the last."""
    lists: dict[str, set[int]] = {}
    for site in traced.sites:
        parts = site.name.replace(":", ".").split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            lists.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
    [(path, numbers)] = lists.items() if len(lists) == 1 else [("", set[int]())]
    if len(numbers) < 4:
        return []
    return [f"{path}[1:]", f"{path}[1:{max(numbers)}]"]


def starts(steps: int, count: int) -> list[tuple[int, ...]]:
    """Lists of full steps to begin from: even ones, and ones that crowd at either end."""
    if count == 1:
        return [(0,)]
    found = []
    for warp in _WARPS:
        for end in (steps - 1, round((steps - 1) * (1 - 1 / (2 * count)))):
            spread = [round(end * (i / (count - 1)) ** warp) for i in range(count)]
            found.append(_distinct(spread, steps))
    return list(dict.fromkeys(found))


def _distinct(wanted: Sequence[int], steps: int) -> tuple[int, ...]:
    """The nearest list without a step twice."""
    taken: set[int] = set()
    for step in sorted(wanted):
        free = [s for s in range(steps) if s not in taken]
        taken.add(min(free, key=lambda s: (abs(s - step), s)))
    return (0, *sorted(taken - {min(taken)})) if 0 not in taken else tuple(sorted(taken))


def again(before: Candidate, after: Candidate, steps: int) -> list[Candidate]:
    """The move from one candidate to the next made once more, where it can be."""
    [gone], [new] = set(before.full) - set(after.full), set(after.full) - set(before.full)
    further = 2 * new - gone
    if not 0 < further < steps or further in after.full:
        return []
    return [Candidate(after.family, tuple(sorted({*after.full, further} - {new})))]


def neighbours(one: Candidate, steps: int, chance: random.Random) -> list[Candidate]:
    """Candidates with one full step moved, the nearest moves first, in a random order of steps."""
    found = []
    places = list(range(1, len(one.full)))
    for move in _MOVES:
        chance.shuffle(places)
        for place in places:
            moved = one.full[place] + move
            if 0 < moved < steps and moved not in one.full:
                rest = (*one.full[:place], *one.full[place + 1 :], moved)
                found.append(Candidate(one.family, tuple(sorted(rest))))
    return found


def mutated(
    parents: Sequence[Candidate], steps: int, among: Sequence[Family], chance: random.Random
) -> Candidate:
    """A child: the steps of two parents mixed, some of them moved, now and then another family."""
    mother, father = chance.choice(parents), chance.choice(parents)
    count = len(mother.full)
    common = set(mother.full) & set(father.full)
    others = sorted((set(mother.full) | set(father.full)) - common)
    full = {0, *common, *chance.sample(others, min(len(others), max(count - len(common), 0)))}
    for step in chance.sample(sorted(full - {0}), min(chance.randint(1, 3), len(full) - 1)):
        moved = step + chance.choice((-3, -2, -1, 1, 2, 3))
        if 0 < moved < steps and moved not in full:
            full = full - {step} | {moved}
    family = chance.choice(among) if chance.random() < 0.2 else mother.family
    return Candidate(family, tuple(sorted(full)[:count]))


def same_cost(found: Sequence[Family], one: Way) -> Iterator[Family]:
    """The families that rule the same sites."""
    yield from (family for family in found if family.sites == one.sites)
