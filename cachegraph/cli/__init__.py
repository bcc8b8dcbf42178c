"""The command line: its commands, and what becomes of errors.

Modules that import torch are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cachegraph.errors import CachegraphError, printable

from .bench import bench
from .calibrate import calibrate, import_router_file
from .compile import compile_model, verify
from .evaluate import evaluate
from .export import export
from .options import examples
from .plan import inspect, show_plan
from .report import report
from .sample import sample
from .search import compare, import_steps, search
from .train_router import train_router


class _Commands(TyperGroup):
    """Reports what goes wrong in a command; usage errors are typer's own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes --debug in any place."""
        rest = [arg for arg in args if arg != "--debug"]
        return super().parse_args(ctx, ["--debug"] * (len(rest) < len(args)) + rest)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command and turns its errors into messages and exit codes."""
        try:
            with warnings.catch_warnings():
                for category in (DeprecationWarning, FutureWarning):  # torch's, about itself
                    warnings.simplefilter("ignore", category)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # typer reports it
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - nobody above can report it
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(_message(error), err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _message(error: Exception) -> str:
    if isinstance(error, CachegraphError):
        return f"error: {error}"
    first = printable(str(error).strip().partition("\n")[0])
    if notes := "; ".join(getattr(error, "__notes__", ())):
        first += f" ({notes})"
    return f"error: {type(error).__name__}: {first}\nadd --debug to see where it happened"


app = typer.Typer(
    cls=_Commands,
    name="cachegraph",
    help="A compiler for the denoising loop of diffusion transformers.",
    epilog=examples(
        "cachegraph plan DiT-XL/2 --schedule fora-n3",
        "cachegraph compile DiT-XL-2-256x256.pt --schedule fora-n3",
        "cachegraph sample digits --schedule fora-n3 -o digits.png",
    ),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Runs the command line of this process and ends it with an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="cachegraph")


def _terminate(number: int, _: object) -> NoReturn:
    """End as Ctrl-C does: what was begun is cleaned up on the way out."""
    sys.exit(128 + number)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cachegraph {version('cachegraph')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error happened; stands anywhere.")
    ] = False,
) -> None:
    """What goes before a command; ``debug`` is read where errors are reported."""


# name, function, examples
_COMMANDS: tuple[tuple[Any, ...], ...] = (
    (
        "compile",
        compile_model,
        "cachegraph compile DiT-XL-2-256x256.pt --schedule fora-n3",
        "cachegraph compile digits -s mine.yaml -o fast.cgraph --backend eager",
        "cachegraph compile models:make_unet -s mine.yaml --input x=2,4,32,32:f32",
        "cachegraph compile models:make_unet -s mine.yaml --dynamic height,width",
    ),
    (
        "plan",
        show_plan,
        "cachegraph plan DiT-XL/2 --schedule fora-n3",
        "cachegraph plan DiT-XL/2 --schedule mine.yaml --input-size 64 --batch 8",
        "cachegraph plan DiT-S/2 -s fora-n5 --json | jq .speed_up_limit",
    ),
    (
        "inspect",
        inspect,
        "cachegraph inspect digits-fora-n3.cgraph",
        "cachegraph inspect digits-fora-n3.cgraph --diff variant0 variant1",
        "cachegraph inspect DiT-S/2 -s fora-n3 --variant variant1 --dot graph.dot",
    ),
    (
        "report",
        report,
        "cachegraph report digits --schedule toca-n3 -o report.html",
        "cachegraph report digits-fora-n3.cgraph --figures bench.json",
        "cachegraph report DiT-XL/2 -s toca-n3 --json | jq .cost.total_flops",
    ),
    (
        "verify",
        verify,
        "cachegraph verify DiT-XL-2-256x256-fora-n3.cgraph --model DiT-XL-2-256x256.pt",
        "cachegraph verify digits-fora-n3.cgraph --model digits --calls 10",
        "cachegraph verify digits-fora-n3.cgraph --integrity",
    ),
    (
        "export",
        export,
        "cachegraph export digits-fora-n3.cgraph --to onnx -o digits-onnx",
        "python tools/onnx_sampler.py digits-onnx digits.npy",
    ),
    (
        "sample",
        sample,
        "cachegraph sample digits --schedule fora-n3 -o digits.png",
        "cachegraph sample digits-fora-n3.cgraph -o sevens.png --classes 7,7,7 --seed 1",
        "torchrun --nproc-per-node 8 -m cachegraph sample xl.cgraph --num 50000 -o xl.npz "
        "--vae sd-vae --device cuda",
    ),
    (
        "evaluate",
        evaluate,
        "cachegraph evaluate fora.npz uncached.npz --extractor inception.pt -o fora.json",
        "cachegraph evaluate digits-fora.npz digits-full.npz",
    ),
    (
        "bench",
        bench,
        "cachegraph bench DiT-XL/2 -s toca-n3 -s fora-n3 --threads 2 --choice",
        "cachegraph bench digits -s fora-n3 --backend eager --backend inductor --hooks",
    ),
    (
        "calibrate",
        calibrate,
        "cachegraph calibrate digits --bound 0.1 -o smooth.yaml --plot error.png",
        "cachegraph calibrate digits --schedule fora-n3 --goc 0.5 -o corrected.yaml",
        "cachegraph calibrate model.pt --sampler my_sampler:run --steps 20 -o smooth.yaml",
    ),
    (
        "train-router",
        train_router,
        "cachegraph train-router DiT-XL-2-256x256.pt --steps 10 -o harmonica-10 --device cuda",
        "torchrun --nproc-per-node 2 -m cachegraph train-router digits --steps 10 -o digits-10",
        "cachegraph train-router model.pt --method l2c --steps 20 --data latents -o l2c-20",
    ),
    (
        "search",
        search,
        "cachegraph search digits --budget 10 -o fast.yaml",
        "cachegraph search digits --seconds 1.2 --backend inductor -o fast.yaml",
        "cachegraph search model.pt --speedup 2.5 --sampler my_sampler:run -o fast.yaml",
    ),
    (
        "compare",
        compare,
        "cachegraph compare digits -s fora-n5 -s taylorseer-n5 -s fast.yaml --plot front.png",
        "cachegraph compare model.pt --sampler my_sampler:run -s a.yaml -s b.yaml -o numbers.json",
    ),
    (
        "import-router",
        import_router_file,
        "cachegraph import-router DDIM20_router.pt -o mask.yaml --threshold 0.1",
    ),
    (
        "import-schedule",
        import_steps,
        "cachegraph import-schedule scm:medium -o medium.yaml",
        "cachegraph import-schedule cem-priors-dit.pt --full 14 -o cem.yaml",
        "cachegraph import-schedule lemica.txt --steps 50 --order 1 -o lemica.yaml",
    ),
)
for _name, _command, *_lines in _COMMANDS:
    app.command(_name, epilog=examples(*_lines))(_command)
