"""What a step of training a router costs: memory at DiT-XL/2's shapes, time against the plain loop.

    python tools/router_cost.py memory [--rows 2] [--depths 2 6] [--recompute mlp]
    python tools/router_cost.py time [--rows 4] [--steps 3]

Memory: every tensor that an operation makes is counted while it lives, over one step of the
optimiser; the cache counts, weights do not. All of it grows with the rows, and but for a rest with
the blocks, so two small depths tell the whole. Time: our step and the published loop, written
plainly, in turn, in CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cachegraph.diffusion.process import Process
from cachegraph.train.harmonica import Harmonica
from cachegraph.train.routed import RoutedModel
from cachegraph.train.scores import Scores
from cachegraph.train.settings import Settings
from cachegraph.world import World
from cachegraph.zoo.dit import DiT
from tests.train.plain import PlainHarmonica

STEPS = 10
OPTIONS = {"l1": 7e-8, "lr": 0.01, "cfg_scale": 1.5, "lambda_c": 500, "ste_threshold": 0.1}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {self._key(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and self._key(value) not in self.seen | inputs:
                self._add(value)
        return result

    def _add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    @staticmethod
    def _key(value: Tensor) -> int:
        return int(value.untyped_storage()._cdata)


def trainer(model: DiT, rows: int, recompute: str) -> Harmonica:
    shape = (model.in_channels, model.input_size, model.input_size)
    labels = torch.zeros(rows, dtype=torch.int64)
    routed = RoutedModel(model, (torch.zeros(rows, *shape), labels, labels), recompute)
    scores = torch.randn(STEPS, len(routed.sites))
    settings = Settings.of("harmonica", STEPS, OPTIONS)
    return Harmonica(routed, Scores(scores, 0.01, World()), Process.of(STEPS), settings, World())


def peak(rows: int, depth: int, recompute: str) -> int:
    training = trainer(DiT(depth=depth).eval(), rows, recompute)
    z, y = torch.randn(rows // 2, 4, 32, 32), torch.zeros(rows, dtype=torch.int64)
    with LiveBytes() as live:
        x, cache = training._begin(torch.cat([z, z]), y, STEPS - 1, None)
        live.peak = live.now  # of the step alone; the cache lives through it
        step(training, x, y, cache)
    return live.peak


def memory(rows: int, depths: list[int], recompute: str) -> None:
    few, many = (peak(rows, depth, recompute) for depth in depths)
    block = (many - few) / (depths[1] - depths[0]) / rows
    rest = few / rows - depths[0] * block
    print(f"recompute {recompute}, {rows} rows; peak beside the weights, cache included:")
    for depth, found in zip(depths, (few, many), strict=True):
        print(f"  {depth} blocks: {found / 1e6:.0f} MB")
    print(f"a block and row {block / 1e6:.2f} MB, the rest of a row {rest / 1e6:.2f} MB")
    print(f"16 rows, 28 blocks: {16 * (28 * block + rest) / 1e9:.2f} GB")


def step(training: Harmonica, x: Tensor, y: Tensor, cache: list[Tensor]) -> None:
    """The passes of a step as :meth:`Harmonica._train` has them, without reading numbers."""
    from cachegraph.diffusion.process import guide

    i = STEPS - 2
    args = training._args(x, i, y)
    teacher = guide(training.model(*args), 1.5)
    w = training.scores.w(i)
    output, fresh = training.model.routed(args, w, cache)
    loss = (teacher - guide(output, 1.5)).square().mean() + 7e-8 * w.sum()
    torch.autograd.grad(loss, [training.scores.routers[i]])
    del fresh


def times(rows: int, steps: int, recompute: str) -> None:
    model = DiT(input_size=16, hidden_size=384, depth=12, num_heads=6).eval()
    ours = trainer(model, rows, recompute)
    ours.lam = torch.ones(STEPS - 1)
    plain = PlainHarmonica(model, ours.scores.table(), **OPTIONS)
    plain.lam = ours.lam
    z, y = torch.randn(rows // 2, 4, 16, 16), torch.zeros(rows, dtype=torch.int64)
    runs = {"ours": our_steps(ours, z, y), "plain": plain.epoch(1, z, y)}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps + 1):
        for name, run in runs.items():
            began = time.process_time()
            next(run)
            spent[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    for name, value in medians.items():
        print(f"{name:6} {value:.3f} CPU seconds a step")
    print(f"ratio  {medians['ours'] / medians['plain']:.3f}")


def our_steps(training: Harmonica, z: Tensor, y: Tensor) -> Iterator[Any]:
    x, cache = training._begin(torch.cat([z, z]), y, STEPS - 1, None)
    for i in reversed(range(STEPS - 1)):
        x, record = training._train(x, y, i, cache, 1)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", default="mlp", choices=("mlp", "all", "none"))
    args = parser.parse_args()
    if args.what == "memory":
        memory(args.rows, args.depths, args.recompute)
    else:
        times(args.rows, args.steps, args.recompute)


if __name__ == "__main__":
    main()
