"""Try cachegraph on many models: one row a configuration, in a table with reasons.

    python -m tools.model_matrix CONFIGS.json --results results.json --table docs/models.md

A configuration says the class, how it is built and what it is called with; its form is described
beside the file. Each is built with random weights, compiled with FORA for the eager backend and
compared with the reference; called with other batches; converted to ONNX and run. A process of its
own does so for each, so that a crash is a row of the table, too. What is in the file of results
already is not tried again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import cachegraph as cg
from cachegraph.compiler.compile import assemble, build
from cachegraph.errors import CachegraphError
from cachegraph.model.signature import TIMESTEP_NAMES
from tests import models

STEPS, INTERVAL = 5, 3
TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4  # another implementation of every operator
BATCHES = (1, 2, 3)
LIMIT = 300  # seconds a configuration
Row = dict[str, Any]


class Calls:
    """Keyword arguments for every call of a trajectory: latent and times change, the rest stays."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        leaves = _pytree.tree_leaves_with_path(models.make_inputs(config))
        tensors = {_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
        names = [n for n, t in tensors.items() if t.is_floating_point() and not _is_time(n)]
        named = [n for n in names if n.partition(".")[0] in _LATENTS]
        first = (named or names)[0].partition(".")[0]
        self.latents = [n for n in names if n.partition(".")[0] == first]
        self.changing = [*self.latents, *filter(_is_time, tensors)]

    def trajectory(self, batch: int, seed: int = 0) -> Iterator[Row]:
        """One call a step."""
        lasting = models.make_inputs(self.config, seed=seed, batch=batch)
        for step in range(STEPS):
            fresh = models.make_inputs(self.config, seed=seed + 1 + step, batch=batch)
            others = iter(_pytree.tree_leaves(fresh))

            def leaf(path: Any, old: Any, step: int = step, others: Any = others) -> Any:
                name, new = _name(path), next(others)
                if name in self.latents:
                    return new
                return _falling(old, step) if isinstance(old, Tensor) and _is_time(name) else old

            yield _pytree.tree_map_with_path(leaf, lasting)


_LATENTS = ("hidden_states", "x", "vision_tokens", "bb_ca", "decoder_input_tokens")


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)


def _is_time(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in TIMESTEP_NAMES or last.endswith(("_time", "_timestep", "_timesteps"))


def _falling(time: Tensor, step: int) -> Tensor:
    if time.is_floating_point():
        return time * (1 - step / STEPS)
    return time * (STEPS - step) // STEPS


def try_one(config: Mapping[str, Any], say: Any) -> None:
    """Everything about one configuration; ``say(key, value)`` notes down what was found."""
    torch.manual_seed(0)
    _without_torchvision()
    model = models.build(config)
    twin = copy.deepcopy(model)
    calls = Calls(config)
    batch = max(config["batch"], 1)
    example = next(calls.trajectory(batch))
    with torch.no_grad():
        before = model(**copy.deepcopy(example))
    started = time.process_time()
    built = build(
        model,
        models.fora(STEPS, INTERVAL),
        (),
        example,
        varying=[name for name, _ in _traced_names(example) if name in calls.changing],
    )
    say("seconds", round(time.process_time() - started, 1))
    kinds = [site.kind.value for site in built.traced.sites]
    say("sites", {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})
    fixed = "" if built.traced.items else "fixed: "
    say("batch", "any" if built.traced.batch else f"{fixed}{built.traced.fixed_batch_reason}")
    say("reads", [built.traced.signature.inputs[one.input][0] for one in built.traced.contents])
    say("conditions", list(built.traced.conditions))
    run = cg.load(assemble(built, "eager"))
    reference = cg.ReferenceRunner.of_plan(model, built.traced, built.plan, built.schedule)
    worst, felt = _compare(run, reference, model, calls.trajectory(batch))
    say("oracle", "hooks" if reference.by_hooks else "graph")
    say("error", worst)
    say("felt", felt)
    with torch.no_grad():
        again, other = model(**copy.deepcopy(example)), twin(**copy.deepcopy(example))
    same = zip(*(models.tensors(a) for a in (before, again, other)), strict=True)
    say("untouched", all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in same))
    say("batches", _batches(run, reference, model, calls, batch))
    _onnx(built, run, calls.trajectory(batch), say)


def _traced_names(example: Row) -> list[tuple[str, Tensor]]:
    leaves = _pytree.tree_leaves_with_path(example)
    return [(_name(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _compare(
    run: cg.Runner, reference: cg.ReferenceRunner, model: nn.Module, calls: Iterator[Row]
) -> tuple[float, float]:
    """The largest error of a trajectory, and how far reusing leads away from the model."""
    session, worst, felt = run.session(), 0.0, 0.0
    for step, call in enumerate(calls):
        found = session(**copy.deepcopy(call), step=step)
        wanted = reference(**copy.deepcopy(call), step=step)
        with torch.no_grad():
            computed = model(**copy.deepcopy(call))
        worst = max(worst, models.relative_error(found, wanted))
        distance = models.relative_error(found, computed)
        if step == 0:
            worst = max(worst, distance)
        felt = max(felt, distance)
    return worst, felt


def _batches(
    run: cg.Runner, reference: cg.ReferenceRunner, model: nn.Module, calls: Calls, batch: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for other in BATCHES:
        if other == batch:
            continue
        try:
            found[str(other)] = _compare(run, reference, model, calls.trajectory(other))[0]
        except Exception as error:  # noqa: BLE001 - whatever it says is a cell of the table
            found[str(other)] = _told(error)
    return found


def _onnx(built: Any, run: cg.Runner, calls: Iterator[Row], say: Any) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            assemble(built, "onnx").save(Path(folder) / "model.cgraph", lambda _: None)
            other, session = cg.load(Path(folder) / "model.cgraph").session(), run.session()
            errors = [
                models.relative_error(other(**call, step=step), session(**call, step=step))
                for step, call in enumerate(calls)
            ]
        say("onnx", max(errors))
    except Exception as error:  # noqa: BLE001 - whatever it says is a cell of the table
        say("onnx", _told(error))


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, CachegraphError)
    return text if known else f"RAW {type(error).__name__}: {text[:300]}"


def _without_torchvision() -> None:
    """What a model resizes a mask with, by torch's own means."""
    from diffusers.models.transformers import transformer_cosmos

    class _Functional:
        InterpolationMode = type("InterpolationMode", (), {"NEAREST": "nearest"})

        @staticmethod
        def resize(mask: Tensor, size: Any, interpolation: Any = None) -> Tensor:
            return nn.functional.interpolate(mask, size=tuple(size), mode="nearest")

    transforms = type("transforms", (), {"functional": _Functional, **vars(_Functional)})
    transformer_cosmos.transforms = transforms


def _child(config: Mapping[str, Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def say(key: str, value: Any) -> None:
        pipe.send((key, value))

    try:
        try_one(config, say)
    except Exception as error:  # noqa: BLE001 - whatever it says is a cell of the table
        say("failed", _told(error))
        say("trace", traceback.format_exc()[-3000:])


def run_apart(config: Mapping[str, Any], limit: float = LIMIT) -> Row:
    """The row of a configuration, tried in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(config, theirs))
    process.start()
    theirs.close()
    row: Row = {}
    end = time.monotonic() + limit
    try:
        while ours.poll(max(0, end - time.monotonic())):
            key, value = ours.recv()
            row[key] = value
        row["failed"] = f"not done after {limit} seconds"
        process.terminate()
    except EOFError:
        process.join()
        if process.exitcode:
            row["failed"] = f"the process ended with {process.exitcode}"
    return row


_PAGE = """# Which models work, and how

Written by `python -m tools.model_matrix CONFIGS.json --table docs/models.md`: classes of diffusers,
built small and with random weights. Each is compiled with FORA and compared, step by step, with
the reference: the eager model under hooks, or the traced graph with its sites' values replaced
(`graph`) where no module returns a value.

**Batch.** `any`: one graph for every batch; a list of one constant an item (`img_shapes`) is as
long as the batch then, where a plain call shows that items do not depend on one another. `item by
item`: the model fixes its batch (a loop over it, a list of one entry an item), but items do not
depend on one another; so one item is traced, and a call runs one after the other, each with what
was kept of it. Results equal those of the batch but for rounding. With `dynamic_batch=False` the
batch of the example is traced as it is.

**Numbers that a model reads.** Some models decide by masks, ids or lengths what they compute
(`lengths.tolist()`, `text[mask]`). What is read is recorded in one plain call of the model and
holds for these contents only: they are checked when a trajectory begins, and other contents are
refused with the line that reads them. Numbers read from the latent or the timestep cannot be
known; such a model is refused. `x[mask] = f(x[mask])` needs no contents.

**flex_attention** is written out as attention with a mask. As in eager mode, its mask function
decides; blocks that a `BlockMask` leaves out beyond that are computed.

**ONNX.** Complex numbers (rotary tables) travel as pairs of real ones.
"""


def passes(row: Row) -> bool:
    """Compiled with FORA, and equal to the reference."""
    return "failed" not in row and row.get("error", 1) <= TOLERANCE


def table(rows: Mapping[str, Row]) -> str:
    """A page about all rows."""
    good = sum(map(passes, rows.values()))
    fixed = sum(passes(r) and _batch(r).startswith("fixed") for r in rows.values())
    onnx = sum(_is_small(r.get("onnx"), ONNX_TOLERANCE) for r in rows.values())
    lines = [
        _PAGE,
        f"{good} of {len(rows)} compile with FORA and equal the reference ({TOLERANCE:g}); of "
        f"these, {fixed} with a fixed batch. {onnx} run as ONNX ({ONNX_TOLERANCE:g}).",
        "",
        "| Configuration | Sites | Error | Reference | Batch | ONNX |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for name, row in rows.items():
        sites = ", ".join(f"{count} {kind}" for kind, count in row.get("sites", {}).items())
        cells = [name, sites, _cell(row.get("error")), row.get("oracle", "")]
        cells += [_batch(row), _cell(row.get("onnx"))]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- {name}: {text}" for text in _reasons(row)]
    return "\n".join([*lines, "", "## Reasons", "", *notes, ""])


def _batch(row: Row) -> str:
    """Which batches there are; none but the example's where every other one was refused."""
    said, others = row.get("batch", "").partition(":")[0], row.get("batches", {}).values()
    none = others and not any(_is_small(found, TOLERANCE) for found in others)
    return "fixed by what the model takes" if said == "any" and none else said


def _is_small(value: Any, limit: float) -> bool:
    return isinstance(value, float) and value <= limit


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "no" if value else ""


def _reasons(row: Row) -> Iterator[str]:
    if "failed" in row:
        yield row["failed"]
    if row.get("batch", "any") != "any":
        yield f"batch {row['batch']}"
    if isinstance(row.get("onnx"), str):
        yield f"ONNX: {row['onnx']}"
    if not row.get("batch", "fixed").startswith("fixed"):
        for batch, found in row.get("batches", {}).items():
            if not _is_small(found, TOLERANCE):
                yield f"batch of {batch}: {found}"


def main() -> None:
    """Try what is asked for and is not in the results yet; write them and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--results", type=Path, default=Path("model_matrix.json"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names; tried again")
    parser.add_argument("--failed", action="store_true", help="try what failed again")
    asked = parser.parse_args()
    configs = models.read_configs(asked.configs)
    rows: dict[str, Row] = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    again = {n for n, r in rows.items() if asked.failed and list(_reasons(r))} | {*asked.only}
    import diffusers.models.transformers  # noqa: F401 - once, before processes fork

    for name, config in configs.items():
        if name not in again and (name in rows or asked.only):
            continue
        rows[name] = run_apart(config)
        rows = {n: rows[n] for n in configs if n in rows}
        asked.results.write_text(json.dumps(rows, indent=1))
        sys.stdout.write(f"{name}: {'good' if passes(rows[name]) else 'BAD'} ")
        sys.stdout.write("; ".join(_reasons(rows[name]))[:300] + "\n")
        sys.stdout.flush()
    if asked.table is not None:
        asked.table.write_text(table(rows))


if __name__ == "__main__":
    main()
