"""The folder of a training run: what it was asked for, its last checkpoint, its log, its results.

``run.json``, ``router.pt``, ``log.jsonl``, and in the end ``schedule.yaml`` and ``router.png``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from cachegraph.errors import InputError
from cachegraph.folders import make_folder, replaced
from cachegraph.schedule.schedule import Schedule
from cachegraph.world import World

from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .scores import Record, Scores
from .settings import Settings

_IDENTITY, _CHECKPOINT, _LOG = "run.json", "router.pt", "log.jsonl"
_LENGTH = ("max_steps", "epochs")  # a run may be made longer


class Run:
    """A run on disk; only the first process writes.

    Args:
        folder: that is its own.
        world: the processes that train.
        saved: its last checkpoint, if it has one.
    """

    def __init__(self, folder: Path, world: World, saved: Checkpoint | None) -> None:
        self.folder, self.saved, self._world = folder, saved, world
        self._lines: list[str] = []

    @classmethod
    def open(cls, folder: Path, asked: Mapping[str, Any], world: World) -> Self:
        """Begin a run, or go on with the one that is there.

        Args:
            folder: of the run.
            asked: what tells it from others, see :func:`identity`.
            world: the processes that train.

        Raises:
            InputError: something else is there; nothing has been touched.
        """
        mark = folder / _IDENTITY
        asked = json.loads(json.dumps(asked))
        if folder.exists() and any(folder.iterdir()) and not mark.is_file():
            remedy = "choose another folder"
            raise InputError(
                "the output exists and is no training run", place=str(folder), remedy=remedy
            )
        if mark.is_file():
            _refuse_other(json.loads(mark.read_text(encoding="utf-8")), asked, folder)
        world.barrier()  # all have looked before anything is written
        if world.first and not mark.is_file():
            make_folder(folder, "choose another folder")
            _write(mark, json.dumps(asked, indent=1) + "\n")
        path = folder / _CHECKPOINT
        saved = read_checkpoint(path) if path.is_file() else None
        run = cls(folder, world, saved)
        if world.first:
            run._cut_log()
        world.barrier()
        return run

    def log(self) -> list[Record]:
        """What was told up to the last checkpoint."""
        path = self.folder / _LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        told = [json.loads(line) for line in lines]
        return [Record(**{**one, "grad": torch.tensor(one["grad"])}) for one in told]

    def tell(self, record: Record) -> None:
        """A line of the log; it is on disk with the next checkpoint."""
        self._lines.append(json.dumps({**asdict(record), "grad": record.grad.tolist()}))

    def keep(self, scores: Scores, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Write the log so far, then a checkpoint."""
        if self._world.first:
            with (self.folder / _LOG).open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._lines)
            write_checkpoint(self.folder / _CHECKPOINT, scores, options, own)
        self._lines.clear()

    def finish(self, routers: Tensor, sites: Sequence[str], schedule: Schedule) -> None:
        """Write the mask as a schedule and a picture of the router."""
        if self._world.first:
            comment = f"# The mask of {_CHECKPOINT} at threshold 0.1.\n"
            _write(self.folder / "schedule.yaml", comment + schedule.to_yaml())
            draw_router(routers, sites, self.folder / "router.png")
        self._world.barrier()

    def _cut_log(self) -> None:
        """Drop lines that are later than the checkpoint."""
        path = self.folder / _LOG
        last = int(self.saved.own["step"]) if self.saved is not None else 0
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except ValueError:
                break  # the end of a line is missing: the process was killed as it wrote
            if step > last:
                break
            kept.append(line + "\n")
        if len(kept) < len(lines):
            _write(path, "".join(kept))


def identity(
    model: nn.Module, settings: Settings, timesteps: Sequence[int], data: str
) -> dict[str, Any]:
    """What makes a run this one: model, options, timesteps, data."""
    options = {k: v for k, v in settings.published().items() if k not in _LENGTH}
    return {"model": _digest(model), **options, "timesteps": list(timesteps), "data": data}


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(memoryview(flat.numpy()))
    return found.hexdigest()


def _refuse_other(found: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    differ = [key for key in asked if found.get(key) != asked[key]]
    if differ:
        key = differ[0]
        raise InputError(
            f"the output holds a run of another {', '.join(differ)}",
            place=str(folder),
            expected=f"{key} {str(asked[key])[:60]}",
            found=str(found.get(key))[:60],
            remedy="choose another folder",
        )


def _write(path: Path, text: str) -> None:
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def draw_router(routers: Tensor, sites: Sequence[str], path: Path) -> None:
    """Draw the scores after the sigmoid over steps (first on top) and sites.

    Args:
        routers: ``[T, 2L]`` by respaced index.
        sites: their names.
        path: a PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'cachegraph[eval]'"
        raise InputError("a picture of the router needs matplotlib", remedy=remedy) from error
    steps, width = routers.shape
    figure = Figure(figsize=(3 + width / 6, 2 + steps / 6), layout="constrained")
    panel = figure.subplots()
    shown = panel.imshow(torch.sigmoid(routers.flip(0)).numpy(), vmin=0, vmax=1, aspect="auto")
    panel.set(xlabel="site", ylabel="step")
    panel.set_xticks(range(width), sites, rotation=90, fontsize=5)
    figure.colorbar(shown, label="share that is computed")
    with replaced(path) as partial:
        figure.savefig(partial, format="png")
