"""The command that writes a report for the browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachegraph.errors import InputError

from .options import (
    ArchOption,
    DisableOption,
    InputOption,
    MaybeSchedule,
    PartOption,
    SizeOption,
    WhatArgument,
)
from .output import progress, show
from .plan import Request, views_of

if TYPE_CHECKING:
    from cachegraph.show.view import View

_DIGITS = "digits"


def report(
    what: WhatArgument,
    schedule: MaybeSchedule = None,
    out: Annotated[
        Path | None,
        typer.Option(
            *("--out", "-o"), metavar="FILE.html", help="Default: report.html in this folder."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write what the report shows as JSON to stdout instead.")
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="What bench --out, compare --out or search wrote, to show."
        ),
    ] = None,
    part: PartOption = None,
    arch: ArchOption = None,
    inputs: InputOption = None,
    input_size: SizeOption = None,
    disable: DisableOption = None,
) -> None:
    """Write plan, graphs and costs as one HTML file that loads nothing; open it in a browser."""
    if as_json and out is not None:
        raise InputError("--json and --out exclude each other")
    request = Request(what, arch, inputs or (), input_size, disable or ())
    write_report(request, schedule, out, as_json, figures, part)


def write_report(
    request: Request,
    schedule: str | None,
    out: Path | None = None,
    as_json: bool = False,
    figures: Path | None = None,
    part: int | None = None,
) -> None:
    """Write a report of an artifact, or of what a model would become.

    Args:
        request: the artifact or model.
        schedule: of a model.
        out: the file; report.html by default.
        as_json: write the data to stdout instead.
        figures: a file of them, to be shown beside.
        part: of an artifact of several plans or forms of call, which; else the first.

    Raises:
        InputError: the file's name is not of a page, or an option does not fit.
    """
    from cachegraph.report.page import page

    target = out or Path("report.html")
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError("a report is a page", place=str(target), expected="a name with .html")
    view, title = views_of(request, schedule, part)[0]
    name = Path(schedule or request.model).stem
    data = _data(view, title, name, schedule if request.model == _DIGITS else None, figures)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(data))
    show(
        f"{target}: open it in a browser; {target.stat().st_size / 1e6:.1f} MB, complete in itself"
    )


def _data(
    view: View, title: str, name: str, sampled: str | None, figures: Path | None
) -> dict[str, Any]:
    from cachegraph.report.data import Extras, report_data
    from cachegraph.report.figures import read_figures, sampled_tokens
    from cachegraph.zoo import load_model

    measured, quality = read_figures(figures, name) if figures else (None, None)
    with progress() as say:
        tokens = None
        if sampled is not None and view.plan.selection is not None:
            say("sampling a digit")
            tokens = sampled_tokens(load_model(_DIGITS), sampled)
        say("writing the report")
        return report_data(view, title, Extras(measured, quality, tokens))
