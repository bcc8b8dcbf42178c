"""The keys of methods that recompute some tokens of a site: ToCa and DuCa.

What stands for a key that is left out depends on ``rules``: it is what the published code for that
model uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from cachegraph.config.problems import Problem, describe
from cachegraph.config.sections import Section

from .method import Method

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
    "toca",
]
ScoreName = Literal["attention", "cross-attention", "kv-norm", "similarity", "norm", "random"]

_GRID = "two whole numbers, at least 1: height and width in tokens"
_ONLY_FOR = {"ddim50": "dit", "ddpm250": "dit", "pixart": "pixart"}  # ratio schedule -> rules


class Bonus(Section):
    """The best token of each ``cell`` x ``cell`` tokens gets ``weight`` times its score added."""

    weight: FiniteFloat = Field(default=0.6, ge=0, description="a number, at least 0; 0 for none")
    cell: int = Field(default=2, ge=1, description="a whole number, at least 1: side in tokens")


class TokenKeys(Method):
    """What ToCa and DuCa have in common.

    Steps at which everything is computed stand about ``interval`` apart; in between, ``attn`` is
    reused and a share of the tokens of the other sites recomputed. ``rules`` says whose reference
    code decides: that for DiT counts steps down, that for PixArt counts up.
    """

    published: ClassVar[Mapping[str, Mapping[str, object]]]  # rules -> defaults
    pixart_interval_weight: ClassVar[float]  # how much later full steps differ, with those rules
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
    rules: Literal["dit", "pixart"] = Field(default="dit", description="one of dit, pixart")
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
        rules = data.get("rules")
        defaults = cls.published.get(rules if isinstance(rules, str) else "dit", {})
        filled = {**defaults, **data}
        usual, bonus = defaults.get("bonus"), data.get("bonus")
        if isinstance(bonus, Mapping) and isinstance(usual, Mapping):
            filled["bonus"] = {**usual, **bonus}
        if data.get("score") == "random":
            filled.setdefault("seed", 0)
        return filled

    def problems(self, steps: int) -> Iterator[Problem]:
        """Keys that do not fit together."""
        yield from self._ratio_problems()
        if self.seed is not None and self.score != "random":
            what = f"'seed' with 'score: {self.score}', which draws nothing"
            yield Problem(("seed",), what, "no seed, or 'score: random'", f"{self.seed}")
        yield from self._grid_problems()

    def _ratio_problems(self) -> Iterator[Problem]:
        name = self.ratio_schedule
        rules = _ONLY_FOR.get(name, self.rules)
        if rules != self.rules:
            what = f"'ratio_schedule: {name}' with 'rules: {self.rules}'"
            remedy = f"that schedule is for 'rules: {rules}'"
            yield Problem(("ratio_schedule",), what, fitting(self.rules), name, remedy)

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


def fitting(rules: str) -> str:
    """The ratio schedules that fit the rules, for errors."""
    named = [name for name, own in _ONLY_FOR.items() if own == rules]
    common = ("constant", "exp", "layerwise", "linear", "linear-layerwise", "linear-mode")
    return f"one of {', '.join((*named, *common))}"
