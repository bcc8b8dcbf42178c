"""What a training run was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from cachegraph.errors import InputError, nearest

Method = Literal["harmonica", "l2c"]
# As the published instructions have them; the defaults of the published codes (l1 and lr of 1,
# no threshold) do not train.
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "harmonica": {"l1": 7e-8, "lr": 0.01, "max_steps": 20_000, "ste_threshold": 0.1},
    "l2c": {"l1": 5e-6, "lr": 1e-3, "max_steps": 50_000, "ste_threshold": None},
}
_HARMONICA_ONLY = ("lambda_c", "cfg_scale")


@dataclass(frozen=True)
class Settings:
    """The options of a trainer, with the names of the published codes.

    Attributes:
        method: whose rules are followed.
        steps: model calls of a trajectory.
        l1: weight of the sum of the scores.
        lr: learning rate of AdamW.
        max_steps: training steps; HarmoniCa counts the first call of a trajectory too.
        epochs: passes over the data; HarmoniCa's are trajectories. None: as ``max_steps`` says.
        global_batch_size: rows of a model call over all processes; half of them are
            unconditional in HarmoniCa.
        global_seed: of everything random.
        ste_threshold: HarmoniCa: scores above it renew the cache; L2C: the forward pass takes
            them for 1 and others for 0, None leaves them as they are.
        cfg_scale: strength of guidance (HarmoniCa).
        lambda_c: training steps between two measurements of lambda (HarmoniCa).
        num_classes: labels are 0 to this less one; it is the null class itself.
        as_published: repeat what the published code does beside its rule.
    """

    method: Method
    steps: int
    l1: float
    lr: float
    max_steps: int
    ste_threshold: float | None
    epochs: int | None = None
    global_batch_size: int = 64
    global_seed: int = 0
    cfg_scale: float = 1.5
    lambda_c: int = 500
    num_classes: int = 1000
    as_published: bool = False

    @classmethod
    def of(cls, method: str, steps: int, options: Mapping[str, Any]) -> Self:
        """Settings where options that are left out are as published.

        Raises:
            InputError: there is no such method or option, or a value is out of range.
        """
        if method not in _PUBLISHED:
            raise InputError(
                f"unknown method {method!r} of training",
                expected=" or ".join(_PUBLISHED),
                remedy=nearest(method, _PUBLISHED),
            )
        known = [field.name for field in fields(cls)][2:]
        for name in options:
            if name not in known:
                raise InputError(
                    f"unknown option {name!r} of training",
                    expected=", ".join(known),
                    remedy=nearest(name, known),
                )
            if method == "l2c" and name in _HARMONICA_ONLY:
                raise InputError(f"method l2c has no option {name!r}", remedy="leave it out")
        found = cls(**{"method": method, "steps": steps, **_PUBLISHED[method], **options})
        found._check()
        return found

    @property
    def threshold(self) -> float:
        """Above it a score renews the cache while training."""
        return 0.1 if self.ste_threshold is None else self.ste_threshold

    def published(self) -> dict[str, Any]:
        """The options as a published checkpoint names them."""
        found = asdict(self)
        found["num_sampling_steps"] = found.pop("steps")
        return found

    def _check(self) -> None:
        even = self.method == "l2c"
        for name, wrong, expected in (
            ("steps", self.steps < 2 or (even and self.steps % 2), "2 or more, even for l2c"),
            ("lr", not self.lr > 0, "more than 0"),
            ("l1", not self.l1 >= 0, "0 or more"),
            ("max_steps", self.max_steps < 1, "1 or more"),
            ("epochs", self.epochs is not None and self.epochs < 1, "1 or more"),
            ("lambda_c", self.lambda_c < 1, "1 or more"),
            ("ste_threshold", not 0 <= self.threshold <= 1, "0 to 1"),
            (
                "global_batch_size",
                self.global_batch_size < 1 or (not even and self.global_batch_size % 2),
                "1 or more, even for harmonica",
            ),
        ):
            if wrong:
                raise InputError(
                    f"option {name} is out of range",
                    expected=expected,
                    found=str(getattr(self, name)),
                )
        if self.method == "harmonica" and self.ste_threshold is None:
            raise InputError("method harmonica needs ste_threshold", expected="0 to 1")
