"""The scores that are learned, their optimiser, and what is told of each of its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cachegraph.errors import InputError, TrainingError
from cachegraph.world import World

LIMIT = 5.0  # scores are clamped to [-5, 5]


@dataclass(frozen=True)
class Record:
    """One step of the optimiser.

    Attributes:
        index: respaced index whose router was trained.
        loss: ``lam * data_loss + l1 * l1_loss``.
        data_loss: mean square of teacher less student.
        l1_loss: sum of the scores after the sigmoid.
        lam: weight of the image error; None for L2C.
        grad: ``(2L,)``, of the index's router.
        step: training steps so far, this one counted.
        epoch: trajectory or pass over the data.
    """

    index: int
    loss: float
    data_loss: float
    l1_loss: float
    lam: float | None
    grad: Tensor
    step: int = 0
    epoch: int = 0


class Scores:
    """Routers ``[T, 2L]``, one parameter an index: each has its own moments and step count.

    Args:
        initial: ``[T, 2L]``.
        lr: learning rate.
        world: gradients are averaged over it.
    """

    def __init__(self, initial: Tensor, lr: float, world: World) -> None:
        self.routers = [nn.Parameter(row.clone()) for row in initial]
        self.optimiser = torch.optim.AdamW(self.routers, lr=lr, weight_decay=0)
        self._world = world

    def __len__(self) -> int:
        return len(self.routers)

    def w(self, i: int) -> Tensor:
        """``sigmoid(R[i])``, with gradients."""
        return torch.sigmoid(self.routers[i])

    def table(self) -> Tensor:
        """A copy of all routers, ``[T, 2L]``."""
        return torch.stack([router.detach().clone() for router in self.routers])

    def learn(self, i: int, loss: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """A step of the optimiser on router ``i``, averaged over all processes.

        Each process may train another index; a gradient is divided by their number even so.

        Args:
            i: respaced index.
            loss: of this process.
            told: numbers to average likewise.

        Returns:
            The averaged gradients of router ``i`` and the averaged numbers.

        Raises:
            TrainingError: the loss or a gradient is not finite; no score has changed.
        """
        [own] = torch.autograd.grad(loss, [self.routers[i]])
        count = len(self.routers)
        gradients = torch.zeros(count, len(own) + 1, device=own.device, dtype=own.dtype)
        gradients[i, :-1], gradients[i, -1] = own, 1.0  # the last column: somebody trains it
        shared = torch.cat([gradients.flatten(), told.detach().to(own)])
        mean = self._world.sum(shared) / self._world.size
        if not mean.isfinite().all():
            raise TrainingError(
                f"the loss or a gradient of router {i} is not finite",
                expected="finite numbers",
                found=f"a loss of {loss.item():g}",
                remedy="look at the model's outputs; train in float32, or with a smaller lr",
            )
        gradients = mean[: gradients.numel()].view_as(gradients)
        for router, row in zip(self.routers, gradients, strict=True):
            router.grad = row[:-1].clone() if row[-1] > 0 else None
        self.optimiser.step()
        with torch.no_grad():
            for router in self.routers:
                router.clamp_(-LIMIT, LIMIT)
        return gradients[i, :-1].clone(), mean[gradients.numel() :]


def initial_scores(steps: int, width: int, seed: int) -> Tensor:
    """Scores from N(0, 1), ``[steps, width]``."""
    return torch.randn(steps, width, generator=torch.Generator().manual_seed(seed))


def fix_first(scores: Tensor) -> Tensor:
    """The scores where those of the first call, the highest index, are 5."""
    scores = scores.clone()
    scores[-1] = LIMIT
    return scores


def check_scores(scores: Tensor, steps: int, width: int, place: str) -> Tensor:
    """Scores that fit the model and the number of steps, as float32.

    Raises:
        InputError: they are of another model or number of steps, or not finite.
    """
    if scores.ndim != 2 or len(scores) != steps:
        raise InputError(
            "the router is of another number of steps",
            place=place,
            expected=f"{steps} steps",
            found=f"shape {tuple(scores.shape)}",
        )
    if scores.shape[1] != width:
        raise InputError(
            "the router is of another model",
            place=place,
            expected=f"{width} scores a step, one a site",
            found=str(scores.shape[1]),
        )
    if not scores.isfinite().all():
        raise InputError("the router holds numbers that are not finite", place=place)
    return scores.detach().float()
