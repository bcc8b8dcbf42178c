"""The command that writes a compiled loop for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachegraph.errors import InputError, nearest

from .options import CODE, argument
from .output import progress, show

_FORMATS = ("onnx",)


def export(
    artifact: Annotated[Path, argument("ARTIFACT", f"What compile wrote. {CODE}")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", show_default=False, help="Where to write."),
    ],
    to: Annotated[str, typer.Option(help="Format of the graphs: onnx.")] = "onnx",
) -> None:
    """Write an artifact's graphs, weights and loop, so that any runtime can sample with them.

    OpenVINO computes in bf16 on CPUs that have it, unless INFERENCE_PRECISION_HINT says f32.
    """
    from cachegraph.artifact.bundle import BF16, LOOP, export_onnx
    from cachegraph.artifact.load import load_artifact
    from cachegraph.show.picture import size

    if to not in _FORMATS:
        what = f"--to: unknown format {to!r}"
        raise InputError(what, expected=", ".join(_FORMATS), remedy=nearest(to, _FORMATS))
    with progress() as say:
        say("reading the artifact")
        export_onnx(load_artifact(artifact), out, say)
    files = sorted(out.glob("*.onnx"))
    written = sum(file.stat().st_size for file in out.iterdir())
    show(BF16)
    show(f"{out}: {len(files)} graphs, {size(written)}; README.md and {LOOP} say how to run them")
