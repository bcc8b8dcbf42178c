"""A picture of which tokens were recomputed at each step, over the digit that was sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cachegraph.compiler.compile import ScheduleSource
from cachegraph.errors import InputError
from cachegraph.folders import writing
from cachegraph.methods import METHODS
from cachegraph.model.trace import trace
from cachegraph.oracle.reference import ReferenceRunner
from cachegraph.plan.action import Compute, Refresh, Row
from cachegraph.plan.plan import Plan
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from cachegraph.zoo import sample_digits

from .image_grid import check_image_path

_COLUMNS = 10  # steps in a row
_SIDE = 64  # pixels of a step's digit
_GAP, _HEAD = 4, 12  # pixels between steps, and above each for its number
_TINT = torch.tensor([255.0, 120.0, 0.0])  # of a token that all sites recompute
LABEL, SEED = 3, 0  # what is sampled
_CAPTION = (
    f"Digit {LABEL}, seed {SEED}: which tokens are recomputed at each step\n"
    "orange: recomputed, the stronger the more sites do it; green frame: everything is computed"
)
_WHOLE = torch.tensor([0.0, 150.0, 80.0])  # of a step that computes everything


def token_shares(
    model: nn.Module, schedule: ScheduleSource, label: int, seed: int
) -> tuple[Tensor, Tensor, Plan]:
    """Sample a digit and watch which tokens are recomputed; carried out by plain hooks.

    Args:
        model: ``digits``.
        schedule: one that chooses tokens.
        label: the digit.
        seed: of the noise.

    Returns:
        The image ``(16, 16)`` in [0, 1]; for every step the share of sites, of those that ever
        choose, that recompute each token, ``(T, h, w)``; and the plan.

    Raises:
        InputError: the schedule never chooses tokens.
    """
    asked = load_schedule(schedule)
    example = (torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 10]))
    traced = trace(model, example)
    plan = plan_of(asked, traced)
    choosing = {i for row in plan.rows for i, a in enumerate(row) if isinstance(a, Refresh)}
    if plan.selection is None or not choosing:
        raise InputError(
            "the schedule chooses no tokens",
            place=asked.where("policy"),
            expected="a method that recomputes some of them: "
            + " or ".join(one.name() for one in METHODS if one.chooses_tokens),
        )
    runner = ReferenceRunner.of_plan(model, traced, plan, asked)
    shares = torch.zeros(plan.steps, *_grid(plan))

    steps = iter(range(plan.steps))

    def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        step = next(steps)
        result = runner(x, t, y, step=step)
        shares[step] = _share(plan, plan.rows[step], choosing, runner.picked)
        return result

    image = sample_digits(watched, [label], steps=plan.steps, seed=seed)
    return (image[0, 0] + 1) / 2, shares, plan


def _share(plan: Plan, row: Row, choosing: set[int], picked: dict[str, Tensor]) -> Tensor:
    """Share of the choosing sites that recompute each token of the sample with guidance, (h, w)."""
    height, width = _grid(plan)
    found = torch.zeros(height * width)
    for i in choosing:
        if isinstance(row[i], Compute):
            found += 1
        elif isinstance(row[i], Refresh):
            found[picked[plan.sites[i].name][0]] += 1
    return (found / len(choosing)).view(height, width)


def _grid(plan: Plan) -> tuple[int, int]:
    """Height and width in tokens; of digits there is always one."""
    return (plan.selection.grid if plan.selection is not None else None) or (0, 0)


def write_token_map(model: nn.Module, schedule: ScheduleSource, path: Path) -> None:
    """Write a PNG: a panel a step, the digit in grey, tokens the more orange the more sites do it.

    A green frame marks a step that computes everything; the caption says so.

    Raises:
        InputError: the path is no PNG, pillow is missing, or no tokens are chosen.
    """
    check_image_path(path)
    from PIL import Image, ImageDraw

    image, shares, plan = token_shares(model, schedule, LABEL, SEED)
    lines = -(-plan.steps // _COLUMNS)
    high, wide = _SIDE + _HEAD + _GAP, _SIDE + _GAP
    above = 2 * _HEAD + 3 * _GAP  # for the caption
    size = _COLUMNS * wide + _GAP, above + lines * high + _GAP
    canvas = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, _GAP), _CAPTION, fill=(0, 0, 0))
    for step, share in enumerate(shares):
        left, top = _GAP + step % _COLUMNS * wide, above + step // _COLUMNS * high
        whole = all(isinstance(action, Compute) for action in plan.rows[step])
        panel = _panel(image, share, whole)
        pen.text((left, top), str(step), fill=(0, 0, 0))
        canvas.paste(Image.fromarray(panel.numpy()), (left, top + _HEAD))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path)


def _panel(image: Tensor, share: Tensor, whole: bool) -> Tensor:
    """Bytes ``(64, 64, 3)``: the digit, tinted where tokens were recomputed."""
    zoom = _SIDE // len(image)
    grey = 60 + 160 * image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)[..., None]
    if whole:
        panel = grey.expand(-1, -1, 3).clone()
        for edge in (panel[:3], panel[-3:], panel[:, :3], panel[:, -3:]):
            edge[:] = _WHOLE
    else:
        size = _SIDE // len(share)
        weight = 0.8 * share.repeat_interleave(size, 0).repeat_interleave(size, 1)[..., None]
        panel = grey * (1 - weight) + _TINT * weight
    return panel.round().clamp(0, 255).to(torch.uint8)
