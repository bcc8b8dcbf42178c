"""The keys of methods that recompute some tokens of a site: ToCa and DuCa.

What stands for a key that is left out depends on ``rules``: it is what the published code for that
model uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, field_serializer, field_validator, model_validator

from cachegraph.config.problems import Problem, describe, one_of, refuse
from cachegraph.config.sections import Section
from cachegraph.errors import nearest

from .method import Method
from .rules import Published, Rules

RatioSchedule = Literal[
    "constant",
    "linear",
    "exp",
    "linear-mode",
    "layerwise",
    "linear-layerwise",
    "ddim50",
    "ddpm250",
    "pixart",
    "flux",
    "opensora",
    "toca",
]
ScoreName = Literal["attention", "cross-attention", "kv-norm", "similarity", "norm", "random"]

_GRID = "two whole numbers, at least 1: height and width in tokens"
_COMMON = ("constant", "exp", "layerwise", "linear", "linear-mode")  # ratio schedules of all rules
_LAYERWISE = "linear-layerwise"  # of most


class Bonus(Section):
    """The best token of each ``cell`` x ``cell`` tokens gets ``weight`` times its score added."""

    weight: FiniteFloat = Field(default=0.6, ge=0, description="a number, at least 0; 0 for none")
    cell: int = Field(default=2, ge=1, description="a whole number, at least 1: side in tokens")


class TokenKeys(Method):
    """What ToCa and DuCa have in common.

    Steps at which everything is computed stand about ``interval`` apart; in between, ``attn`` is
    reused and a share of the tokens of the other sites recomputed. ``rules`` says whose reference
    code decides, by name, or as what differs from it; see :mod:`.rules`.
    """

    published: ClassVar[Mapping[str, Published]]  # by the name of the rules
    chooses_tokens: ClassVar[bool] = True
    example: ClassVar = {"interval": 4, "fresh_ratio": 0.3, "quirks": False}

    interval: int = Field(
        ge=1, description="a whole number, at least 1: steps from one full step to the next"
    )
    fresh_ratio: FiniteFloat = Field(
        default=0.07, ge=0, le=1, description="a number from 0 to 1: share of the tokens"
    )
    ratio_schedule: RatioSchedule = Field(
        default="ddim50", description="the name of a schedule: how the share changes"
    )
    score: ScoreName = Field(
        default="attention", description="what the choice of tokens goes by: the name of a score"
    )
    age_weight: FiniteFloat = Field(
        default=0.25, ge=0, description="a number, at least 0: what age adds to the score"
    )
    bonus: Bonus = Field(default=Bonus(), description="a mapping with any of weight, cell")
    rules: str | Rules = Field(default="dit", description="the name of a set of rules, or one")
    quirks: bool = Field(
        default=True, description="true or false: whether the code's steps of mixed types are kept"
    )
    grid: tuple[int, ...] | None = Field(default=None, description=_GRID)
    seed: int | None = Field(
        default=None, ge=0, description="a whole number, at least 0, for 'score: random'"
    )

    @model_validator(mode="before")
    @classmethod
    def _published_defaults(cls, data: object) -> object:
        """Fills in what the published code for ``rules`` uses; errors come from the fields."""
        if not isinstance(data, Mapping):
            return data
        rules = data.get("rules", "dit")
        name = rules.get("like", "dit") if isinstance(rules, Mapping) else rules
        if isinstance(rules, Rules):
            name = rules.like
        known = cls.published.get(name) if isinstance(name, str) else None
        # Unknown rules are refused; what they would stand for is not missed.
        defaults = known.defaults if known is not None else {"interval": 1}
        filled = {**defaults, **data}
        usual, bonus = defaults.get("bonus"), data.get("bonus")
        if isinstance(bonus, Mapping) and isinstance(usual, Mapping):
            filled["bonus"] = {**usual, **bonus}
        if data.get("score") == "random":
            filled.setdefault("seed", 0)
        return filled

    @field_validator("rules", mode="plain")
    @classmethod
    def _known_rules(cls, value: Any) -> str | Rules:
        """A name, or rules completed by those that they are like."""
        if isinstance(value, Rules):
            return value
        words = list(cls.published)
        if not isinstance(value, str | Mapping):
            what, expected = "'rules' has the wrong type", f"{one_of(words)}, or a mapping"
            refuse("rules", [Problem((), what, expected, describe(value))])
        named = isinstance(value, str)
        like = value if isinstance(value, str) else dict(value).get("like", "dit")
        if isinstance(like, str) and like not in words:
            what = f"unknown word {like!r} for {'rules' if named else 'like'!r}"
            path = () if named else ("like",)
            refuse("rules", [Problem(path, what, one_of(words), remedy=nearest(like, words))])
        if isinstance(value, str):
            return value
        base = cls.published[like].rules if isinstance(like, str) else Rules()
        filled = {**dict(base), **dict(value)}
        if isinstance(own := filled["ratios"], Mapping):
            filled["ratios"] = {**base.ratios, **own}
        return Rules.model_validate(filled)

    @field_serializer("rules")
    def _written(self, rules: str | Rules) -> object:
        if isinstance(rules, str):
            return rules
        return rules.model_dump(mode="json", exclude_none=True)

    @property
    def rule_set(self) -> Rules:
        """The rules themselves."""
        if isinstance(self.rules, Rules):
            return self.rules
        return self.published[self.rules].rules

    def problems(self, steps: int) -> Iterator[Problem]:
        """Keys that do not fit together."""
        yield from self._ratio_problems()
        if self.seed is not None and self.score != "random":
            what = f"'seed' with 'score: {self.score}', which draws nothing"
            yield Problem(("seed",), what, "no seed, or 'score: random'", f"{self.seed}")
        yield from self._grid_problems()
        if len(own := self.rule_set.sensitive) == 1:
            what, path = "'sensitive' is no pair", ("rules", "sensitive")
            yield Problem(path, what, "two shares of the trajectory, or none", describe(own))

    def _ratio_problems(self) -> Iterator[Problem]:
        name, rules = self.ratio_schedule, self.rule_set
        if name in _COMMON or name in rules.ratios:
            return
        word = self.rules if isinstance(self.rules, str) else rules.like
        others = (known for known, one in self.published.items() if name in one.rules.ratios)
        other = next(others, None)
        what = f"'ratio_schedule: {name}' with 'rules: {word}'"
        remedy = f"that schedule is for 'rules: {other}'" if other else ""
        yield Problem(("ratio_schedule",), what, self._fitting(), name, remedy)

    def _fitting(self) -> str:
        """The ratio schedules that fit the rules, for errors."""
        own = [name for name in self.rule_set.ratios if name not in ("toca", _LAYERWISE)]
        layerwise = {_LAYERWISE} & set(self.rule_set.ratios)
        return f"one of {', '.join((*own, *sorted({*_COMMON, *layerwise})))}"

    def _grid_problems(self) -> Iterator[Problem]:
        grid, cell = self.grid, self.bonus.cell
        if grid is None:
            return
        if len(grid) != 2:
            yield Problem(("grid",), "'grid' is no pair", _GRID, describe(grid))
            return
        for at, side in enumerate(grid):
            if side < 1:
                yield Problem(("grid", at), f"'grid[{at}]' is too small", _GRID, f"{side}")
            elif self.bonus.weight and side % cell:
                what = f"'grid[{at}]' does not divide into cells of {cell} x {cell} tokens"
                remedy = "choose another 'bonus: {cell: ...}', or 'bonus: {weight: 0}' for none"
                yield Problem(("grid", at), what, f"a multiple of {cell}", f"{side}", remedy)
