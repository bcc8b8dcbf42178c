"""Spaced timesteps, and what one step of DDIM or DDPM makes of a model's output.

Sources: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021); Song et
al., "Denoising Diffusion Implicit Models" (2020), with sigma 0; the code of facebookresearch/DiT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cachegraph.errors import InputError

TRAINED = 1000  # timesteps of training
GUIDED = 3  # channels that DiT guides; the others keep their half's own prediction


def spaced_timesteps(steps: int) -> tuple[int, ...]:
    """Timesteps of ``steps`` model calls, ascending: 0 to 999 as evenly as rounding allows.

    Raises:
        InputError: ``steps`` is out of range.
    """
    if not 1 <= steps <= TRAINED:
        raise InputError(
            "number of steps is out of range", expected=f"1 to {TRAINED}", found=str(steps)
        )
    return tuple(round((TRAINED - 1) * i / max(steps - 1, 1)) for i in range(steps))


@dataclass(frozen=True)
class Process:
    """The linear noise schedule of DiT over chosen timesteps.

    Respaced index i counts down while sampling: ``steps - 1`` first, 0 last.

    Attributes:
        timesteps: of training, ascending; index i stands for ``timesteps[i]``.
    """

    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if not self.timesteps or not ascending or not self.timesteps[0] >= 0:
            raise InputError("timesteps are not in ascending order", found=str(self.timesteps))
        if self.timesteps[-1] >= TRAINED:
            raise InputError(
                "a timestep is out of range",
                expected=f"less than {TRAINED}",
                found=str(self.timesteps[-1]),
            )

    @classmethod
    def of(cls, steps: int, timesteps: Sequence[int] | None = None) -> Process:
        """The published spacing, or timesteps in any monotonous order.

        Raises:
            InputError: they are not as many as steps, or out of order or range.
        """
        if timesteps is None:
            return cls(spaced_timesteps(steps))
        if len(timesteps) != steps:
            raise InputError(
                "not one timestep a step", expected=f"{steps}", found=str(len(timesteps))
            )
        rising = sorted(timesteps)
        if list(timesteps) not in (rising, rising[::-1]):
            raise InputError("timesteps are neither rising nor falling", found=str(timesteps))
        return cls(tuple(int(t) for t in rising))

    @property
    def steps(self) -> int:
        """Model calls of one trajectory."""
        return len(self.timesteps)

    def ddim(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        """The next ``x (B, C, H, W)`` after index ``i``, without noise.

        The first C channels of the output are the predicted noise.
        """
        image = self._image(x, output, i)
        noise = (self._recip(i) * x - image) / self._recip_minus(i)
        after = self._signal[i].float()  # rounded first, as published
        return after.sqrt() * image + (1 - after).sqrt() * noise

    def ddpm(self, x: Tensor, output: Tensor, i: int, noise: Tensor) -> Tensor:
        """The next ``x (B, C, H, W)`` after index ``i``; ``noise`` like ``x`` has no say at 0.

        C further channels of the output choose the variance between its bounds; without them it
        is the larger one.
        """
        image = self._image(x, output, i)
        here, after = self._signal[i + 1], self._signal[i]
        beta = 1 - here / after
        mean = (beta * after.sqrt() / (1 - here)).float() * image
        mean = mean + ((1 - after) * (1 - beta).sqrt() / (1 - here)).float() * x
        if i == 0:
            return mean
        low = (beta * (1 - after) / (1 - here)).log().float()
        high = beta.log().float()
        channels = x.shape[1]
        if output.shape[1] == 2 * channels:
            share = (output[:, channels:] + 1) / 2
            spread = torch.exp(0.5 * (share * high + (1 - share) * low))
        else:
            spread = torch.exp(0.5 * high)
        return mean + spread * noise

    def noised(self, image: Tensor, noise: Tensor, i: int) -> Tensor:
        """A clean image ``(B, C, H, W)`` with the noise of index ``i``."""
        signal = self._signal[i + 1]
        return signal.sqrt().float() * image + (1 - signal).sqrt().float() * noise

    def _image(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        return self._recip(i) * x - self._recip_minus(i) * output[:, : x.shape[1]]

    def _recip(self, i: int) -> Tensor:
        return (1 / self._signal[i + 1]).sqrt().float()

    def _recip_minus(self, i: int) -> Tensor:
        return (1 / self._signal[i + 1] - 1).sqrt().float()

    @cached_property
    def _signal(self) -> Tensor:
        """Share of signal variance before index 0, which is 1, then at every index; float64."""
        betas = torch.linspace(1e-4, 2e-2, TRAINED, dtype=torch.float64)
        signal = (1 - betas).cumprod(0)[list(self.timesteps)]
        return torch.cat([torch.ones(1, dtype=torch.float64), signal])


def guide(output: Tensor, scale: float, channels: int = GUIDED) -> Tensor:
    """Classifier-free guidance over a doubled batch ``[cond; uncond]``.

    The first channels are guided and put in both halves, the others stay.

    Args:
        output: of the model, ``(2 N, C, H, W)``.
        scale: its strength; 1 leaves the conditional prediction.
        channels: how many are guided; DiT guides 3 of 4.
    """
    cond, uncond = output[:, :channels].chunk(2)
    half = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([half, half]), output[:, channels:]], dim=1)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A model whose outputs are guided; of ``x (2 N, ...)`` only the first half is looked at."""

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        return guide(model(torch.cat([half, half]), t, y), scale)

    return call
