"""Damage artifacts, schedules and plans at random, and see that nothing wrong passes in silence.

    python tools/fuzz.py --artifacts 1000 --schedules 1000 --plans 500

What is damaged must be refused with an error of cachegraph's own, or do exactly what the undamaged
one does. A raw error, another result, a hang of more than 10 seconds or a crash is a finding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import cachegraph as cg
from cachegraph.artifact.manifest import MANIFEST, digest_of
from cachegraph.errors import CachegraphError
from cachegraph.graph.weights import WEIGHTS_FILE
from cachegraph.model.trace import trace
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse
from cachegraph.plan.plan import make_plan
from cachegraph.schedule.rows import plan_of
from cachegraph.zoo import build_model

HANG = 10  # seconds
STEPS = 5
MODEL = "DiT(hidden_size=32, depth=2, num_heads=2, num_classes=10)"
WORDS: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1e308,
    float("nan"),
    "",
    "x",
    "s9",
    [],
    {},
    [0],
)


class Hang(BaseException):
    """Something took too long."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(run: Callable[[], str]) -> str:
    """What became of it: what it says, ``refused``, or a finding that begins with ``FOUND``."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except CachegraphError:
        return "refused"
    except Hang:
        return "FOUND hang"
    except Exception as error:  # noqa: BLE001 - any other error is what is looked for
        return f"FOUND {type(error).__name__}: {str(error).splitlines()[:1]}"


# --- artifacts ---------------------------------------------------------------------------------


def calls() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return [
        (x * (1 - 0.1 * s), torch.full((2,), 900 - s), torch.tensor([3, 8])) for s in range(STEPS)
    ]


def make_artifact(folder: Path) -> list[Tensor]:
    """An artifact that uses slots, step constants and known values; what it computes."""
    policy = {"method": "toca", "interval": 3, "fresh_ratio": 0.3, "quirks": False}
    schedule = {"cachegraph": 1, "steps": STEPS, "policy": policy}
    model = build_model(MODEL, 8)
    cg.compile(model, schedule, calls()[0], backend="eager", out=folder)
    return play(folder)


def play(folder: Path) -> list[Tensor]:
    run = cg.load(folder)
    return [run(*call) for call in calls()]


def damage_bytes(folder: Path, rng: random.Random, name: str = "") -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = folder / name if name else rng.choice(files)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content)) if content else 0
    kind = rng.choice(["flip", "cut", "zero", "add", "remove"]) if not name else "flip"
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "add":
        content[at:at] = rng.randbytes(rng.randint(1, 9))
    path.write_bytes(content)
    if kind == "remove":
        path.unlink()


def damage_data(data: Any, rng: random.Random) -> Any:
    """The same with one leaf, key or item changed."""
    if isinstance(data, dict) and data:
        key = rng.choice(list(data))
        if rng.random() < 0.1:
            return {k: v for k, v in data.items() if k != key}
        if rng.random() < 0.05:
            return {**data, "extra": rng.choice(WORDS)}
        return {**data, key: damage_data(data[key], rng)}
    if isinstance(data, list) and data:
        at = rng.randrange(len(data))
        if rng.random() < 0.1:
            return data[:at] + data[at + 1 :]
        if rng.random() < 0.05:
            return [*data, data[at]]
        return [*data[:at], damage_data(data[at], rng), *data[at + 1 :]]
    if isinstance(data, int) and not isinstance(data, bool) and rng.random() < 0.6:
        return data + rng.choice([-1, 1, 7])
    return rng.choice(WORDS)


def sign(folder: Path) -> None:
    """Digests anew, as somebody would who edits an artifact."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("digest", None)
    for name, record in manifest.get("files", {}).items():
        if isinstance(record, dict) and (folder / name).is_file() and name != WEIGHTS_FILE:
            content = (folder / name).read_bytes()
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


def edit(folder: Path, rng: random.Random) -> None:
    """Change one thing in the manifest or in a graph, and sign it."""
    graphs = sorted((folder / "graphs").glob("*.json"))
    path = rng.choice([folder / MANIFEST, folder / MANIFEST, *graphs])
    data = json.loads(path.read_text())
    if path.name == MANIFEST:
        data["forms"] = damage_data(data["forms"], rng)
    else:
        data = damage_data(data, rng)
    path.write_text(json.dumps(data))
    sign(folder)


def fuzz_artifact(original: Path, wanted: list[Tensor], folder: Path, number: int) -> str:
    """Damage a copy: of 20, seven are edited and signed anew, one has a bit of weights flipped."""
    rng = random.Random(number)
    shutil.copytree(original, folder)
    signed = number % 20 < 7
    if signed:
        edit(folder, rng)
    else:
        damage_bytes(folder, rng, WEIGHTS_FILE if number % 20 == 7 else "")

    def run() -> str:
        found = play(folder)
        if signed:  # it says something else by right, or the same
            return "another loop" if not all(map(torch.equal, found, wanted)) else "same"
        return "same" if all(map(torch.equal, found, wanted)) else "FOUND another result"

    return ("signed: " if signed else "") + outcome(run)


# --- schedules and plans -----------------------------------------------------------------------


def fuzz_schedule(folder: Path, traced: Any, number: int) -> str:
    """A preset with something changed, as a file; and the plan that follows."""
    rng = random.Random(number)
    path = rng.choice(list(cg.presets().values()))
    text = path.read_text()
    target = folder / "fuzzed.yaml"
    if rng.random() < 0.5:
        target.write_text(yaml.safe_dump(damage_data(yaml.safe_load(text), rng)))
    else:
        content = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        target.write_bytes(content)

    def run() -> str:
        plan = plan_of(cg.load_schedule(target), traced)
        return "planned" if plan.steps else "FOUND a plan of nothing"

    return outcome(run)


def fuzz_plan(traced: Any, number: int) -> str:
    """Rows of any actions: refused, or a plan that the rules of plans hold for."""
    rng = random.Random(number)

    def action(step: int) -> Action:
        source = rng.randint(-1, step)
        kind = rng.random()
        if kind < 0.5:
            return Compute()
        if kind < 0.8:
            return Reuse(source)
        if kind < 0.9:
            return Forecast((source, source - 1), (1.5, rng.choice([-0.5, float("nan")])))
        return Refresh(source, rng.randint(0, 20), source, rng.randint(-1, 2))

    rows = [[action(s) if s else Compute() for _ in traced.sites] for s in range(rng.randint(1, 6))]

    def run() -> str:
        plan = make_plan(traced.sites, [tuple(row) for row in rows])
        return (
            "planned"
            if sum(len(v.steps) for v in plan.variants) == len(rows)
            else "FOUND steps lost"
        )

    return outcome(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("artifacts", 1000), ("schedules", 1000), ("plans", 500)):
        parser.add_argument(f"--{name}", type=int, default=count)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    findings = 0
    with tempfile.TemporaryDirectory(prefix="cachegraph-fuzz-") as scratch:
        root = Path(scratch)
        wanted = make_artifact(root / "original")
        model = build_model(MODEL, 8)
        traced = trace(model, calls()[0])
        kinds: dict[str, Callable[[int], str]] = {
            "artifacts": lambda n: fuzz_artifact(root / "original", wanted, root / f"a{n}", n),
            "schedules": lambda n: fuzz_schedule(root, traced, n),
            "plans": lambda n: fuzz_plan(traced, n),
        }
        for name, fuzz in kinds.items():
            counts: Counter[str] = Counter()
            for number in range(getattr(asked, name)):
                result = fuzz(number)
                counts[result] += 1
                if "FOUND" in result:
                    print(f"{name} {number}: {result}", flush=True)
                shutil.rmtree(root / f"a{number}", ignore_errors=True)
            print(f"{name}: {dict(counts.most_common())}", flush=True)
            findings += sum(count for result, count in counts.items() if "FOUND" in result)
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
