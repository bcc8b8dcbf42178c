"""How tokens are chosen for a partial refresh."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cachegraph.errors import SessionError


class Score(StrEnum):
    """What a token's score is made of; the highest are recomputed."""

    # attention it received: column sums of the softmax map, mean over heads
    ATTENTION = "attention"
    CROSS_ATTENTION = "cross-attention"  # entropy of its row, mean of the two halves of the batch
    KV_NORM = "kv-norm"  # small norm of its value vector, summed over heads
    SIMILARITY = "similarity"  # how little its input resembles the kept value
    NORM = "norm"  # norm of its input
    RANDOM = "random"  # seeded, equal for both halves of the batch


@dataclass(frozen=True)
class Selection:
    """The choice of tokens, the same at every site.

    Attributes:
        score: what the score is made of, normalised to length 1 over the tokens.
        age_weight: added per partial step that a token was not recomputed in; the published
            ``soft_fresh_weight / fresh_threshold``.
        bonus: the best token of each cell gets its score times this added.
        cell: side of a cell in tokens.
        grid: height and width of the token grid; None where sites differ and nothing needs it.
        seed: of random scores.
    """

    score: Score
    age_weight: float
    bonus: float
    cell: int
    grid: tuple[int, int] | None
    seed: int = 0

    @property
    def foreseen(self) -> bool:
        """True where the choice depends on the last computed step alone."""
        return self.score in (Score.ATTENTION, Score.KV_NORM)

    def check_call(self, batch: int, branch: str = "") -> None:
        """Refuse a call whose samples cannot choose together, where the score wants them to.

        Args:
            batch: of the call.
            branch: name of the branch that the call belongs to, where there are several.

        Raises:
            SessionError: half of the call is missing.
        """
        if self.score is not Score.CROSS_ATTENTION or (batch % 2 == 0 and not branch):
            return
        raise SessionError(
            f"the score {self.score} wants both halves of guidance in one call",
            expected="a batch of an even number of samples, a half each for cond and uncond",
            found=f"a call for {branch!r} alone" if branch else f"a batch of {batch}",
            remedy="call the model once a step with a doubled batch, or choose another score",
        )
