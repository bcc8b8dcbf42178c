"""Full steps, and steps in between that recompute some tokens or skip all blocks (ToCa, DuCa).

Sources: Shenyi-Z/ToCa and Shenyi-Z/DuCa, what runs the blocks of each model (``models.py``,
``PixArt.py``, ``model.py`` or ``stdit3.py``) and ``cache_functions``; :mod:`.rules` has what
differs.

The code for DiT and PixArt decides at every block anew what the step is, and a full pass of the
first block changes the interval. So a step can be full in the first block and something else in all
others: a mixed step. ``quirks: false`` decides once a step, before anything changes. All else stays
as the code has it: the interval that varies along a trajectory, the ratios, truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from cachegraph.errors import PlanError
from cachegraph.model.site import Site, SiteKind, block_of, blocks_of, describe
from cachegraph.plan.action import Action, Compute, Refresh, Reuse, Row
from cachegraph.plan.selection import Selection

from . import ratios
from .method import Ruled, resolve
from .rules import kind_of
from .token_choice import choose, token_counts
from .token_keys import TokenKeys


class StepType(Enum):
    """What a step does in a block."""

    FULL = auto()  # everything is computed
    PARTIAL = auto()  # attention is reused, some tokens of the rest are recomputed
    SKIP = auto()  # nothing is run; the last block hands out what it did a step before


StepTypes = tuple[StepType, StepType]  # in the first block, and in all others


class TokenMethod(TokenKeys):
    """What follows from the keys of ToCa and DuCa."""

    def make_selection(self, sites: Ruled) -> Selection | None:
        """How tokens are chosen, where a share of them is."""
        return choose(self, sites) if self.fresh_ratio else None

    def make_rows(self, steps: int, sites: Ruled) -> tuple[Row, ...]:
        """What every step does at the ruled sites."""
        kinds = {kind_of(site) for site in sites.model}
        types = {kind: self.step_types(steps, kind) for kind in kinds}
        every = [pair for pairs in types.values() for pair in pairs]
        choice, counts = None, dict[str, int]()
        if any(StepType.PARTIAL in pair for pair in every):
            choice = self.make_selection(sites)
        if choice is not None:
            counts = token_counts(self, sites)
        if any(StepType.SKIP in pair for pair in every):
            self._check_stack(sites)
        columns: dict[str, list[Action]] = {}
        groups = blocks_of(sites.model)
        for number, (block, place) in enumerate(zip(groups, _places(groups), strict=True)):
            for site in block:
                n, kind = counts.get(site.name, 0), kind_of(site)
                here = [pair[min(number, 1)] for pair in types[kind]]
                shares = [
                    ratios.ratio(self, kind, at, steps, *place) for at in self._numbers(steps)
                ]
                fresh = [ratios.token_count(share, n) if n else 0 for share in shares]
                # Where attention stays what it was, all tokens are not the whole site.
                whole = n * (not site.fused)
                columns[site.name] = self._column(choice, site.name, here, fresh, whole)
        last = [pair[min(len(groups), 2) - 1] for pair in types[kind_of(groups[-1][-1])]]
        columns |= {s.name: _stack_column(last) for s in sites if s.kind == SiteKind.STACK}
        return tuple(tuple(columns[site.name][step] for site in sites) for step in range(steps))

    def step_types(self, steps: int, kind: str = "mlp") -> tuple[StepTypes, ...]:
        """What each step is in the first block, and in the others, at sites of a kind.

        Source: ``cal_type.py`` or ``global_force_fresh.py``.
        """
        types = []
        rules = self.rule_set
        interval = rules.periods.get(kind, self.interval)  # type: ignore[call-overload]
        full = 0
        for step, at in enumerate(self._numbers(steps)):
            first = others = self._type(step, at, interval, full)
            if first is StepType.FULL:
                full = step
                if kind not in rules.periods:
                    interval = ratios.interval(self, at, steps)
                if self.quirks and rules.by_block:
                    others = self._type(step, at, interval, full)
            types.append((first, others))
        return tuple(types)

    def _numbers(self, steps: int) -> range:
        """The steps as the published code numbers them."""
        return range(steps - 1, -1, -1) if self.rule_set.count == "down" else range(steps)

    def _type(self, step: int, at: int, interval: int, full: int) -> StepType:
        """What a step is, ``interval`` being that since the ``full`` step."""
        rules = self.rule_set
        since = step - full if rules.full == "counter" else at
        begins = rules.first if self.fresh_ratio else rules.first_without_tokens
        if step < begins or since % interval == 0:
            return StepType.FULL
        shortest = min(rules.periods.values(), default=interval)
        if self.skips_stack and since % shortest and since % shortest % 2 == 0:
            return StepType.SKIP
        return StepType.PARTIAL

    def _column(
        self,
        choice: Selection | None,
        name: str,
        types: Sequence[StepType],
        fresh: Sequence[int],
        tokens: int,
    ) -> list[Action]:
        """What the steps do at one site; ``fresh`` of its tokens are recomputed if partial.

        A partial step without tokens reuses, yet all tokens grow older; one with all of them
        computes and makes them young (``tokens`` are all, 0 where that is no computing). A score
        that only full steps make is as old as the last of them even then.
        """
        newest = scored = age = 0
        seen: set[tuple[int, int]] = set()
        actions: list[Action] = []
        for step, (kind, count) in enumerate(zip(types, fresh, strict=True)):
            if kind is StepType.FULL or (kind is StepType.PARTIAL and 0 < tokens <= count):
                actions.append(Compute())
                newest, age = step, 0
                if kind is StepType.FULL or (choice is not None and not choice.foreseen):
                    scored = step
            elif kind is StepType.PARTIAL and count:
                if (scored, age) in seen and choice is not None and choice.foreseen:
                    raise self._reordered(name, step)
                seen.add((scored, age))
                actions.append(Refresh(newest, count, scored, age))
                newest, age = step, age + 1
            else:
                actions.append(Reuse(newest))
                age += kind is StepType.PARTIAL
        return actions

    def _check_stack(self, sites: Ruled) -> None:
        if all(site.kind != SiteKind.STACK for site in sites.model):
            raise PlanError(
                "the policy skips all blocks, but the model has no site for all of them together",
                place=self.where(),
                expected="a chain of blocks, each taking what the one before it hands out",
                found=describe(sites.model),
                remedy="'method: toca' works without",
            )
        ruled = {site.name for site in sites}
        if left_out := [site.name for site in sites.model if site.name not in ruled]:
            raise PlanError(
                "the policy skips all blocks, so it cannot leave out sites",
                place=sites.place,
                expected="no filter of sites, or one that lets all of them through",
                found=", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else ""),
            )

    def _reordered(self, name: str, step: int) -> PlanError:
        return PlanError(
            f"{name} is computed whole between two partial steps, which makes all its tokens "
            f"young: their order at step {step} cannot be made at the last full step",
            place=self.where("fresh_ratio"),
            expected="ratios that reach 1 only before or after the partial steps of an interval",
            remedy="lower 'fresh_ratio', or choose another 'ratio_schedule'",
        )


def _places(groups: Sequence[Sequence[Site]]) -> list[tuple[int, int]]:
    """Of each block, its index in its stack, and how many blocks that has.

    FLUX has a stack of blocks with two streams, and one of blocks with one.
    """
    stacks = [block_of(block[0]).rpartition(".")[0] for block in groups]
    return [(stacks[:i].count(stack), stacks.count(stack)) for i, stack in enumerate(stacks)]


def _stack_column(types: Sequence[StepType]) -> list[Action]:
    """What the steps do with all blocks together, by what they do in the last block."""
    return [action for (action,) in resolve([[kind is not StepType.SKIP] for kind in types])]
