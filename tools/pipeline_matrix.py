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
APART = 10  # times as far from the uncached image: else the reference shows nothing
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
            steps = options.get("steps", getattr(self.spec, "default_steps", STEPS))
            found = self.spec.call(self.pipe, **options | {"steps": steps})
            branches = self.spec.cfg_calls if options.get("cfg", True) else 1
            plain, wanted = self.reference.draw(
                self.spec.call, branches, **options | {"steps": steps}
            )
            error = relative_error(found, wanted)
            if relative_error(found, plain) <= APART * error:
                return "fails: reuse does not show in the image"
            worst = max(worst, error)
        return f"{worst:.1g}" if worst <= CLOSE else f"fails: {worst:.1g}"


class AbortedError(Exception):
    """Raised in a callback."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm())


def tiny_vae() -> nn.Module:
    """Latents of an eighth of the height and width."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        shift_factor=0.0,
    ).eval()


def more_pipelines(specs: Any) -> dict[str, type[Any]]:
    """Pipelines of the same parts: two transformers, img2img, bfloat16 at the default steps."""
    import diffusers

    class Wan22(specs.Wan):
        name = "Wan2.2"

        def build(self) -> Any:
            pipe, second = super().build(), specs.model("WanTransformer3D", 1)
            pipe.register_modules(transformer_2=second)
            pipe.register_to_config(boundary_ratio=0.9)
            return pipe

    class Flux2HalfPrecision(specs.Flux2):
        name, default_steps, dtype = "Flux2, bfloat16, 50 steps", 50, torch.bfloat16

        def build(self) -> Any:
            return super().build().to(self.dtype)

        def kw(self, options: Mapping[str, Any]) -> dict[str, Any]:
            given = super().kw(options)
            return {**given, "prompt_embeds": given["prompt_embeds"].to(self.dtype)}

    class ImageToImage:
        """From three quarters of the way on; the image stands for its own latents."""

        def kw(self, options: Mapping[str, Any]) -> dict[str, Any]:
            height, width = (side // 8 for side in options["size"])
            image = specs.rnd(options["batch"], 4, height, width, seed=9)
            return {**super().kw(options), "image": image, "strength": 0.75}  # type: ignore[misc]

        def build(self) -> Any:
            parts = {**super().build().components, "vae": tiny_vae()}  # type: ignore[misc]
            return getattr(diffusers, self.pipeline)(**parts)

    class SD3Image(ImageToImage, specs.SD3):
        name, pipeline = "SD3 img2img", "StableDiffusion3Img2ImgPipeline"

    class FluxImage(ImageToImage, specs.Flux):
        name, pipeline = "Flux img2img", "FluxImg2ImgPipeline"

        def kw(self, options: Mapping[str, Any]) -> dict[str, Any]:
            height, width = options["size"]
            image = specs.rnd(options["batch"], 3, height, width, seed=9).sigmoid()
            return {**super().kw(options), "image": image}

    return {c.name: c for c in (Wan22, Flux2HalfPrecision, SD3Image, FluxImage)}


def load_specs(path: Path) -> dict[str, Any]:
    """The classes of a file of specs, and more of their parts."""
    spec = importlib.util.spec_from_file_location("pipeline_specs", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ALL | more_pipelines(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(chr(10))[0])
    parser.add_argument("specs", type=Path)
    parser.add_argument("names", nargs="*", help="of pipelines; all where left out")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--out", type=Path, help="the page to write the table to")
    options = parser.parse_intermixed_args()
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
            written = rows_of(options.out) | rows
            options.out.write_text(page(written, options.backend), encoding="utf-8")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """What a page's table says already, of pipelines that are not tried now."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[6:]]
    return {name: dict(zip(COLUMNS, row, strict=False)) for name, *row in filter(None, cells)}


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
