"""Training a router for a model and a number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachegraph.diffusion.process import Process
from cachegraph.errors import InputError
from cachegraph.methods.router_file import router_index
from cachegraph.schedule.schedule import Schedule, load_schedule
from cachegraph.world import World

from .checkpoint import read_checkpoint, restore_optimiser
from .data import Draws, Images, len_of, share_of, with_null
from .harmonica import Harmonica
from .l2c import LearningToCache
from .routed import RoutedModel
from .run import Run, identity
from .scores import Record, Scores, check_scores, fix_first, initial_scores
from .settings import Settings

Progress = Callable[..., object]  # say("training", steps done, of how many)


@dataclass(frozen=True)
class TrainedRouter:
    """What training made.

    Attributes:
        routers: scores before the sigmoid, ``[T, 2L]`` by respaced index, which counts down.
        log: every step of the optimiser.
        settings: what was asked for.
        sites: names of all sites of the model, in order.
        routed: names of the sites in the order of their scores.
        timesteps: of training, ascending.
    """

    routers: Tensor
    log: tuple[Record, ...]
    settings: Settings
    sites: tuple[str, ...]
    routed: tuple[str, ...]
    timesteps: tuple[int, ...]

    def rows(self, threshold: float = 0.1) -> list[list[int]]:
        """1 where a site is run, else 0: a row a step, step 0 first, a number a site."""
        steps, rows = len(self.routers), []
        scores = torch.sigmoid(self.routers) > threshold
        for step in range(steps):
            index = router_index(self.settings.method, step, steps)
            runs = dict.fromkeys(self.sites, 1)
            if index is not None:
                runs.update(zip(self.routed, map(int, scores[index]), strict=True))
            rows.append(list(runs.values()))
        return rows

    def schedule(self, threshold: float = 0.1) -> Schedule:
        """The mask at a threshold, as a schedule."""
        policy = {"method": "table", "rows": self.rows(threshold)}
        return load_schedule({"cachegraph": 1, "steps": len(self.routers), "policy": policy})


def train_router(
    model: nn.Module,
    *,
    method: str,
    steps: int,
    batches: Iterable[Any] | None = None,
    initial: Tensor | str | Path | None = None,
    as_published: bool = False,
    images: Images | None = None,
    shape: Sequence[int] | None = None,
    timesteps: Sequence[int] | None = None,
    recompute: str = "mlp",
    out: Path | None = None,
    ckpt_every: int = 500,
    data_name: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> TrainedRouter:
    """Learn which sites to run at which step (HarmoniCa, Learning-to-Cache).

    Only the scores get gradients; the model is not changed. Under ``torchrun`` every process
    calls it, and N processes train as one does, unless ``as_published``.

    Args:
        model: in eval mode, called as ``model(x, t, y)`` with a doubled batch.
        method: ``harmonica`` or ``l2c``.
        steps: T, model calls of a trajectory.
        batches: of harmonica ``(z (B, C, H, W), y (B,) or (2 B,))`` an epoch; of l2c a mapping
            ``x0, y, n, drop, noise`` a step; for all processes together, with ``as_published``
            for this one. By default drawn from the seed.
        initial: scores ``[T, 2L]``, or a checkpoint, whose optimiser goes on too. By default
            from N(0, 1).
        as_published: repeat what the published code does beside its rule.
        images: for l2c without batches: clean images of a step.
        shape: ``(C, H, W)`` of an image; by default that of ``model.example_inputs()``.
        timesteps: the sampler's; by default as published, 0 to 999 evenly.
        recompute: ``mlp`` computes mlps again for gradients, ``all`` every segment, ``none``
            nothing: less memory or less time.
        out: a folder for checkpoints and log; a run that was stopped goes on there.
        ckpt_every: training steps between two checkpoints.
        data_name: what ``images`` is, to tell runs apart.
        progress: told after every step of the optimiser.
        options: see :class:`.settings.Settings`; by default as published.

    Raises:
        InputError: an option, the checkpoint or the output does not fit.
        TrainingError: the loss is no number.
    """
    settings = Settings.of(method, steps, {**options, "as_published": as_published})
    process, world = Process.of(steps, timesteps), World.current()
    if method == "l2c" and batches is None and images is None:
        raise InputError("method l2c needs data", remedy="give batches or images")
    first, given = None, None
    if batches is not None:
        given = iter(batches)
        first = next(given, None)
        if first is None:
            raise InputError("there are no batches")
        given = chain([first], given)
    run = None
    if out is not None:
        run = Run.open(out, identity(model, settings, process.timesteps, data_name), world)
    size = tuple(shape or (_shape_of(first) if first is not None else _own_shape(model)))
    rows = _rows(first, settings, world)
    routed = _trace(model, rows, size, recompute)
    training = _Training(routed, settings, process, world)
    training.begin(initial, run)
    training.run(given, images, size, run, ckpt_every, progress or (lambda *_: None))
    return training.result(run)


class _Training:
    """One run: a trainer, where its data come from, and what becomes of its state."""

    def __init__(
        self, model: RoutedModel, settings: Settings, process: Process, world: World
    ) -> None:
        self.model, self.settings, self.process, self.world = model, settings, process, world
        self.draws = Draws(settings, world)
        self.log: list[Record] = []
        self.next = 0  # number of the batch to come

    def begin(self, initial: Tensor | str | Path | None, run: Run | None) -> None:
        """Scores and state: of the run's last checkpoint, else as asked for."""
        asked, width = self.settings, len(self.model.sites)
        saved = None if run is None else run.saved
        place, opt = "initial", dict[str, Any]()
        if saved is not None and run is not None:
            place, scores, opt = str(run.folder), saved.routers, dict(saved.opt)
        elif isinstance(initial, str | Path):
            found = read_checkpoint(Path(initial))
            place, scores, opt = str(initial), found.routers, dict(found.opt)
        elif initial is not None:
            scores = initial
        else:
            scores = initial_scores(asked.steps, width, asked.global_seed)
        scores = check_scores(scores, asked.steps, width, place).to(self.model.device)
        if asked.method == "harmonica":
            scores = fix_first(scores)
        self.scores = Scores(scores, asked.lr, self.world)
        restore_optimiser(self.scores, opt, asked.lr, place)
        common = (self.model, self.scores, self.process, asked)
        self.trainer: Harmonica | LearningToCache = (
            Harmonica(*common, self.world)
            if asked.method == "harmonica"
            else LearningToCache(*common)
        )
        if saved is not None and run is not None:
            self._go_on(saved.own, run.log())

    def _go_on(self, own: Mapping[str, Any], log: list[Record]) -> None:
        self.next, self.trainer.step, self.log = int(own["next"]), int(own["step"]), log
        self.draws.stream.set_state(own["streams"][self.world.rank])
        if isinstance(self.trainer, Harmonica):
            self.trainer.lam = own["lam"].to(self.model.device)

    def run(
        self,
        given: Iterator[Any] | None,
        images: Images | None,
        shape: tuple[int, ...],
        run: Run | None,
        ckpt_every: int,
        say: Progress,
    ) -> None:
        """Train until it is enough or there are no more batches."""
        each = 0 if images is None else len_of(images) // self.settings.global_batch_size
        kept = self.trainer.step
        for skipped in range(self.next if given is not None else 0):
            if given is not None and next(given, None) is None:
                raise InputError("fewer batches than were trained", found=f"{skipped}")
        while not self._enough(each, given is not None):
            batch = next(given, None) if given is not None else self._draw(images, shape)
            if batch is None:
                break
            if given is not None and not self.settings.as_published:
                batch = share_of(batch, self.world)
            for record in self._train(batch, self.next // each if each else 0):
                self.log.append(record)
                if run is not None:
                    run.tell(record)
                say("training", record.step, self.settings.max_steps)
            self.next += 1
            if run is not None and self.trainer.step - kept >= ckpt_every:
                self._keep(run)
                kept = self.trainer.step
        if run is not None:
            self._keep(run)

    def _enough(self, each: int, given: bool) -> bool:
        """Whether training is over before the next batch.

        As published ``max_steps`` is looked at after a step, and one later; of HarmoniCa's
        trajectories it ends only the one that is under way.
        """
        asked = self.settings
        if asked.epochs is not None and self.next >= asked.epochs * max(each, 1):
            return True
        if asked.as_published and asked.method == "harmonica" and (given or asked.epochs):
            return False
        return self.trainer.step >= asked.max_steps + asked.as_published

    def _draw(self, images: Images | None, shape: tuple[int, ...]) -> Any:
        if isinstance(self.trainer, LearningToCache):
            if images is None:
                raise InputError("method l2c needs data", remedy="give batches or images")
            return self.draws.batch(self.next, images)
        noise = self.draws.noise(self.next, shape)
        if self.settings.as_published and self.trainer.due(self.next):
            self.draws.reseed()
        return noise

    def _train(self, batch: Any, epoch: int) -> Iterator[Record]:
        device = self.model.device
        if isinstance(self.trainer, Harmonica):
            z, y = batch
            y = with_null(z, y, self.settings.num_classes)
            yield from self.trainer.epoch(self.next, z.to(device), y.to(device))
        else:
            on_device = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            yield self.trainer.train(on_device, epoch)

    def _keep(self, run: Run) -> None:
        lam = self.trainer.lam.cpu() if isinstance(self.trainer, Harmonica) else torch.zeros(0)
        run.keep(
            self.scores,
            self.settings.published(),
            {
                "next": self.next,
                "step": self.trainer.step,
                "lam": lam,
                "streams": self.world.gather(self.draws.stream.get_state()),
            },
        )

    def result(self, run: Run | None) -> TrainedRouter:
        """What was learned; the run's folder gets its mask and picture."""
        found = TrainedRouter(
            routers=self.scores.table().cpu(),
            log=tuple(self.log),
            settings=self.settings,
            sites=tuple(site.name for site in self.model.all_sites),
            routed=tuple(site.name for site in self.model.sites),
            timesteps=self.process.timesteps,
        )
        if run is not None:
            run.finish(found.routers, found.routed, found.schedule())
        return found


def _shape_of(batch: Any) -> tuple[int, ...]:
    first = batch["x0"] if isinstance(batch, Mapping) else batch[0]
    return tuple(first.shape[1:])


def _own_shape(model: nn.Module) -> tuple[int, ...]:
    own = getattr(model, "example_inputs", None)
    if own is None:
        raise InputError(
            "the shape of an image is unknown", expected="(C, H, W)", remedy="give shape"
        )
    args, _ = own()
    return tuple(args[0].shape[1:])


def _rows(batch: Any, settings: Settings, world: World) -> int:
    """How many rows this process calls the model with."""
    if batch is None:
        halves = 2 if settings.method == "harmonica" else 1
        share = world.share(settings.global_batch_size // halves, "the rows of a batch")
        return halves * (share.stop - share.start)
    if not settings.as_published:
        batch = share_of(batch, world)
    return len(batch["x0"]) if isinstance(batch, Mapping) else 2 * len(batch[0])


def _trace(model: nn.Module, rows: int, shape: tuple[int, ...], recompute: str) -> RoutedModel:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    integers = torch.zeros(rows, dtype=torch.int64, device=device)
    return RoutedModel(
        model, (torch.zeros(rows, *shape, device=device), integers, integers.clone()), recompute
    )
