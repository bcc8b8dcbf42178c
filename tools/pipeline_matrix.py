"""Tries ``cachegraph.accelerate`` in pipelines of diffusers and writes a table of what came out.

    python tools/pipeline_matrix.py SPECS.py --out docs/pipelines.md [NAME ...]

SPECS.py has a mapping ALL from names to classes: ``build()`` makes a pipeline from tiny random
parts, ``call(pipe, seed=, pseed=, steps=, cfg=, size=, plen=, batch=, cb=)`` returns latents.
What is drawn under FORA is compared with the same pipeline whose transformers run by the hooks of
``cachegraph.ReferenceRunner``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.model.signature import call_arguments
from cachegraph.pipelines.denoiser import Denoiser, denoiser_of

STEPS, FEWER, MORE, INTERVAL = 6, 5, 9, 3
CLOSE = 1e-4
FORA = {"cachegraph": 1, "policy": {"method": "fora", "interval": INTERVAL}}
FULL = {"cachegraph": 1, "policy": {"method": "full"}}
COMPONENTS = ("transformer", "transformer_2")
COLUMNS = {
    "full": "`full` is the pipeline bit for bit",
    "fora": "FORA, against the reference",
    "second": "another prompt and seed after it",
    "cfg": "guidance off, then on again",
    "batch": "two prompts at a time",
    "prompt": "a prompt of another length",
    "size": "another size",
    "steps": "fewer steps, then more",
    "abort": "after an exception in a callback",
    "restored": "restored: bit for bit the pipeline",
}
Draw = Callable[..., Tensor]
NONE = "-"  # the pipeline has no such option


@dataclass
class Model:
    """A transformer of the reference pipeline: called as it is, or with hooks."""

    module: nn.Module
    source: Denoiser
    branches: int
    calls: int = 0
    steps: int = 0  # of a trajectory, where hooks are to be used
    runners: dict[int, cg.ReferenceRunner] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = vars(self.module).pop("forward")
        try:
            step, branch = divmod(self.calls, self.branches)
            self.calls += 1
            if not self.steps:
                return self.module(*args, **kwargs)
            if step == 0:
                self.runners[branch] = self._runner(args, kwargs)
            return self.runners[branch](*args, step=step, **kwargs)
        finally:
            vars(self.module)["forward"] = around

    def _runner(self, args: Any, kwargs: Any) -> cg.ReferenceRunner:
        given = call_arguments(self.module, args, kwargs)
        fitting = [f for f in self.source.forms.compiled if f.inputs_of(given) is not None]
        form = next(f for f in fitting if f.steps == self.steps)
        plan, schedule = form.artifact.program.plan, form.artifact.schedule
        return cg.ReferenceRunner.of_plan(self.module, form.traced, plan, schedule)


class Reference:
    """A pipeline of its own whose transformers carry out what another one compiled, by hooks.

    Calls belong to branches by turns, which is right here: a step has ``branches`` calls.
    """

    def __init__(self, pipe: Any, source: Any) -> None:
        self.pipe, self.source = pipe, source

    def draw(self, call: Draw, branches: int, **options: Any) -> tuple[Tensor, Tensor]:
        """What the pipeline draws uncached, and under the plans of the source."""
        models = []
        for name in COMPONENTS:
            denoiser = denoiser_of(getattr(self.source, name, None))
            if denoiser is not None:
                models.append(Model(getattr(self.pipe, name), denoiser, branches))
        for model in models:
            vars(model.module)["forward"] = model
        try:
            plain = call(self.pipe, **options)
            for model in models:
                model.steps, model.calls = model.calls // branches, 0
            return plain, call(self.pipe, **options)
        finally:
            for model in models:
                del vars(model.module)["forward"]


class Trial:
    """One pipeline, accelerated and not, with the checks of the table."""

    def __init__(self, spec: Any, backend: str) -> None:
        self.spec, self.backend = spec, backend
        self.pipe, self.plain = spec.build(), spec.build()
        self.reference = Reference(self.plain, self.pipe)

    def results(self) -> Iterator[tuple[str, str]]:
        """Column and cell, one after another; a check that fails leaves the others to run."""
        for name in COLUMNS:
            try:
                yield name, getattr(self, f"check_{name}")()
            except Exception as error:  # noqa: BLE001 - whatever it is stands in the table
                text = str(error).strip().partition(chr(10))[0]
                yield name, f"fails: {type(error).__name__}: {text}".replace("|", "/")

    def check_full(self) -> str:
        cg.accelerate(self.pipe, FULL, backend=self.backend, strict=True)
        same = torch.equal(self.spec.call(self.pipe), self.spec.call(self.plain))
        return "yes" if same else "fails: another image"

    def check_fora(self) -> str:
        cg.accelerate(self.pipe, FORA, backend=self.backend, strict=True)
        return self._close({})

    def check_second(self) -> str:
        return self._close({"seed": 1, "pseed": 1}, {})

    def check_cfg(self) -> str:
        return self._close({"cfg": False}, {"seed": 2})

    def check_batch(self) -> str:
        return self._close({"batch": 2})

    def check_prompt(self) -> str:
        return self._close({"plen": self.spec.otherlen}) if self.spec.otherlen else NONE

    def check_size(self) -> str:
        return self._close({"size": self.spec.other}) if self.spec.other else NONE

    def check_steps(self) -> str:
        return self._close({"steps": FEWER}, {"steps": MORE})

    def check_abort(self) -> str:
        """Stopped at its second step, then at its last but one."""
        for last in (1, STEPS - 2):

            def stop(_pipe: Any, step: int, *_: Any, last: int = last) -> dict[str, Any]:
                if step == last:
                    raise AbortedError
                return {}

            with suppress(AbortedError):
                self.spec.call(self.pipe, seed=5, cb=stop)
        return self._close({"seed": 6, "pseed": 1})

    def check_restored(self) -> str:
        cg.restore(self.pipe)
        left = any("forward" in vars(getattr(self.pipe, n, None) or self) for n in COMPONENTS)
        same = torch.equal(self.spec.call(self.pipe), self.spec.call(self.plain))
        return "yes" if same and not left else "fails: not as it was"

    def _close(self, *images: Mapping[str, Any]) -> str:
        """The largest error of some images, one after another."""
        worst = 0.0
        for options in images:
            steps = options.get("steps", STEPS)
            found = self.spec.call(self.pipe, **options | {"steps": steps})
            branches = self.spec.cfg_calls if options.get("cfg", True) else 1
            plain, wanted = self.reference.draw(
                self.spec.call, branches, **options | {"steps": steps}
            )
            if relative_error(found, plain) < CLOSE:
                return "fails: nothing was reused"
            worst = max(worst, relative_error(found, wanted))
        return f"{worst:.0e}" if worst <= CLOSE else f"fails: {worst:.0e}"


class AbortedError(Exception):
    """Raised in a callback."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm())


def load_specs(path: Path) -> dict[str, Any]:
    """The classes of a file of specs, and of the file beside this one."""
    spec = importlib.util.spec_from_file_location("pipeline_specs", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ALL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(chr(10))[0])
    parser.add_argument("specs", type=Path)
    parser.add_argument("names", nargs="*", help="of pipelines; all where left out")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--out", type=Path, help="the page to write the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    specs = load_specs(options.specs)
    rows = {}
    for name in options.names or specs:
        start = time.process_time()
        rows[name] = {}
        trial = Trial(specs[name](), options.backend)
        for column, cell in trial.results():
            rows[name][column] = cell
            print(f"{name:14} {column:9} {cell}", flush=True)
        print(f"{name:14} {time.process_time() - start:.0f} s of CPU", flush=True)
    if options.out is not None:
        options.out.write_text(page(rows, options.backend), encoding="utf-8")


def page(rows: Mapping[str, Mapping[str, str]], backend: str) -> str:
    """The table with what its columns mean."""
    import diffusers

    lines = [
        "# Pipelines of diffusers, tried",
        "",
        f"Written by `tools/pipeline_matrix.py` with diffusers {diffusers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]} and `backend={backend!r}`: unmodified pipelines of "
        "tiny random parts, each with one line, `cachegraph.accelerate(pipe, schedule, "
        f"strict=True)`. The schedules are `full` and FORA with an interval of {INTERVAL}; images "
        f"have {STEPS} steps where nothing else is said. A number is the largest relative error of "
        "the drawn latents, against the same pipeline whose transformers run by the plain Python "
        f"hooks of `cachegraph.ReferenceRunner`; up to {CLOSE:g} is taken for right. All images of "
        f"a row are drawn one after another by one pipeline. {NONE!r}: it has no such option.",
        "",
        f"| | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    lines += [f"| {n} | {' | '.join(r.get(c, '') for c in COLUMNS)} |" for n, r in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
