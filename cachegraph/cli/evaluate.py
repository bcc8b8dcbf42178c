"""The command that judges files of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import argument
from .output import progress, show


def evaluate(
    samples: Annotated[Path, argument("A.npz", "Images, as sample --num writes them.")],
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="[B.npz]",
            show_default=False,
            help="What they are compared with: other samples, such as those of the uncached "
            "model, or a reference of the ADM evaluation.",
        ),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(
            metavar="FILE|MODULE:FUNCTION",
            help="Of features: TorchScript, torch.export, a function, or the classifier of digits. "
            "Runs code: open only what you trust.",
        ),
    ] = "digits",
    pairs: Annotated[
        bool | None,
        typer.Option(
            "--pairs/--no-pairs",
            show_default=False,
            help="Compare image by image; by default where both come from the same noise.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all numbers.")
    ] = None,
) -> None:
    """Judge images: FID, sFID, Inception Score, precision, recall; pairs by PSNR, SSIM, FLIP."""
    from rich.table import Table

    from cachegraph.images.evaluate import evaluate as judge

    with progress() as say:
        found = judge(samples, other, extractor=extractor, pairs=pairs, progress=say)
    table = Table("figure", "value", box=None)
    for name, value in found.items():
        table.add_row(name, _text(value))
    show(table, columns=100)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        show(f"numbers   {out}")


def _text(value: Any) -> str:
    if isinstance(value, list):  # of every step: first, middle, last
        chosen = (0, len(value) // 2, len(value) - 1)
        return ", ".join(f"step {i}: {value[i]:.2e}" for i in chosen)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
