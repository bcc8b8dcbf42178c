"""Find full steps and forecasts whose final images are closest to those of the uncached model.

Local errors mislead: what a step's forecast misses says little about the image. So candidates are
judged by finished images of the same noise: many on a few noises, the better ones on more
(successive halving), then one full step after the other is moved (coordinate search), then the best
are mixed and mutated (evolutionary search).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .images import Reference, Sampler, images_of
from .player import Player
from .space import Candidate, Family, Way, again, mutated, neighbours, same_cost, starts
from .trials import Trials

Progress = Callable[[str, int, int], object]

_KEPT = 3  # one in so many goes on to more noises
_MARGIN = 0.2  # dB that a candidate may be behind on the first noise and still be tried on others
_PARENTS = 4
_TRIED_FIRST = (("lagrange", 1), ("lagrange", 2))  # bases that all lists are tried with
_LISTS = 2  # that all bases are tried with
_BEHIND = 3.0  # dB by which a place is too far behind


@dataclass
class Search:
    """One search: its model, its noises, and what was found out so far.

    Attributes:
        player: runs candidates.
        sampler: makes images.
        steps: of a trajectory.
        seeds: noises to choose by.
        reference: images of the uncached model for these.
        trials: what was measured.
        limit: the most trajectories to sample.
        chance: of all random choices.
        progress: is told what is being done.
    """

    player: Player
    sampler: Sampler
    steps: int
    seeds: Sequence[int]
    reference: Reference
    trials: Trials
    limit: int
    chance: random.Random
    progress: Progress
    best: Candidate | None = None
    asked: set[tuple[str, int]] = field(default_factory=set)
    idle: int = 0  # children that were none

    def run(
        self, found: Sequence[Family], counts: dict[Way, int], others: Iterable[Candidate] = ()
    ) -> Candidate:
        """The best candidate.

        Args:
            found: families to choose from.
            counts: how many full steps each can afford.
            others: candidates whose full steps are not free, to be judged in the end.
        """
        leaders = self._halve(self._begin(found, counts))
        self.best = leaders[0]
        self._move(leaders[:2])
        self._breed(found, counts, leaders)
        self._move([self.best])
        for one in others:
            self._keep(one)
        return self.best

    def _begin(self, found: Sequence[Family], counts: dict[Way, int]) -> list[Candidate]:
        """Every list of full steps in a few families, and every family with the best lists.

        A place to skip steps at that is far behind another is not looked at any further.
        """
        pool = list[Candidate]()
        for place in dict.fromkeys(family.sites for family in found):
            alike = [family for family in found if family.sites == place]
            first = [family for family in alike if (family.basis, family.order) in _TRIED_FIRST]
            lists = starts(self.steps, counts[alike[0]])
            known = list(dict.fromkeys(one.full for one in pool if one.full in lists))
            tried = self._sorted(Candidate(f, full) for f in first for full in known[:1] or lists)
            ahead = self._sorted(pool)
            pool += tried
            if ahead and self.score(tried[0], 1) < self.score(ahead[0], 1) - _BEHIND:
                continue
            best = list(dict.fromkeys(one.full for one in tried))[:_LISTS]
            pool += [Candidate(f, full) for f in alike for full in best if f not in first]
        return pool

    def _sorted(self, pool: Iterable[Candidate], seeds: int = 1) -> list[Candidate]:
        """The best first."""
        return sorted(pool, key=lambda one: -self.score(one, seeds))

    def score(self, one: Candidate, seeds: int) -> float:
        """Mean PSNR on the first noises, in dB."""
        return sum(self._on(one, seed) for seed in self.seeds[:seeds]) / seeds

    def _on(self, one: Candidate, seed: int) -> float:
        self.asked.add((one.key, seed))  # so that a search that is resumed takes the same course
        known = self.trials.get(one.key, seed)
        if known is not None:
            return known
        schedule = one.family.schedule(self.steps, one.full)
        made = images_of(self.sampler(self.player.runner(schedule, seed), seed))
        decibels = self.reference.psnr(seed, made)
        psnr = sum(decibels) / len(decibels)
        self.trials.add(one.key, seed, psnr)
        said = "" if self.best is None else f", best {self.score(self.best, 1):.1f} dB"
        self.progress(f"{one.family.name}{said}", min(self.sampled, self.limit), self.limit)
        return psnr

    @property
    def sampled(self) -> int:
        """Trajectories so far, those of a log that was resumed among them."""
        return len(self.asked) + self.idle

    @property
    def spent(self) -> bool:
        """True where no more trajectories may be sampled."""
        return self.sampled >= self.limit

    def _halve(self, pool: list[Candidate]) -> list[Candidate]:
        """The best of many: on one noise all, on twice as many the best third, and so on."""
        seeds = 1
        while True:
            pool = self._sorted(pool, seeds)
            if seeds == len(self.seeds) or self.spent:
                return pool
            pool = pool[: max(len(pool) // _KEPT, _PARENTS)]
            seeds = min(2 * seeds, len(self.seeds))

    def _better(self, one: Candidate, than: Candidate) -> bool:
        """Whether a candidate wins on all noises; one that is behind on the first is given up."""
        for seeds in (*range(1, len(self.seeds)), len(self.seeds)):
            gain = self.score(one, seeds) - self.score(than, seeds)
            if gain < (-_MARGIN if seeds == 1 < len(self.seeds) else 0):
                return False
        return self.score(one, len(self.seeds)) > self.score(than, len(self.seeds))

    def _move(self, begun: Sequence[Candidate]) -> None:
        """Move one full step at a time while that helps, from each of some candidates."""
        for start in begun:
            queue = neighbours(start, self.steps, self.chance)
            best = start
            while queue and not self.spent:
                one = queue.pop(0)
                if self._better(one, best):
                    queue = again(best, one, self.steps)
                    best = one
                    queue += neighbours(best, self.steps, self.chance)
            self._keep(best)

    def _breed(
        self, found: Sequence[Family], counts: dict[Way, int], leaders: list[Candidate]
    ) -> None:
        """Mix and mutate the best until no trajectories are left for it."""
        parents = [self.best, *leaders] if self.best is not None else leaders
        last = (self.limit - self.sampled) // 3  # for moving steps once more
        while self.sampled < self.limit - last:
            alike = [p for p in parents[: _PARENTS + 1] if counts[p.family] == len(parents[0].full)]
            among = list(same_cost(found, parents[0].family))
            child = mutated(alike, self.steps, among, self.chance)
            fits = len(child.full) == counts[child.family]
            if not fits or (child.key, self.seeds[0]) in self.asked:
                self.idle += 1  # so that a search without new children ends
                continue
            if self._better(child, parents[0]):
                parents.insert(0, child)
                self._keep(child)

    def _keep(self, one: Candidate) -> None:
        count = len(self.seeds)
        if self.best is None or self.score(one, count) > self.score(self.best, count):
            self.best = one
