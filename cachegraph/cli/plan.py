"""The commands that show what would be or was compiled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cachegraph.errors import InputError
from cachegraph.folders import writing

from .options import (
    ArchOption,
    DiffOption,
    DisableOption,
    DotOption,
    HtmlOption,
    InputOption,
    MaybeSchedule,
    PartOption,
    ScheduleOption,
    ShapesArgument,
    SitesOption,
    SizeOption,
    VariantOption,
    WhatArgument,
)
from .output import is_artifact, on_terminal, progress, room, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachegraph.compiler.sources import Source
    from cachegraph.model.trace import TracedModel
    from cachegraph.show.view import View


_UNBROKEN = 1_000  # columns of a difference that goes to a file or pipe


@dataclass(frozen=True)
class Request:
    """A model to look at, as the command line has it; its shapes are enough."""

    model: str
    arch: str | None
    inputs: Sequence[str]
    input_size: int | None
    disable: Sequence[str]

    def given(self, schedule: str | None) -> list[str]:
        """The options that go with a model only and were given."""
        options = {
            "--schedule": schedule,
            "--arch": self.arch,
            "--input": self.inputs,
            "--input-size": self.input_size,
            "--disable-pass": self.disable,
        }
        return [name for name, value in options.items() if value]

    def open(self) -> Source:
        """The model, perhaps without weights."""
        from cachegraph.compiler.sources import open_model

        arch, inputs, size = self.arch, self.inputs, self.input_size
        return open_model(self.model, arch=arch, inputs=inputs, input_size=size, shapes_only=True)

    def trace(self) -> tuple[TracedModel, str]:
        """The model's trace, and its name."""
        from cachegraph.compiler.compile import example_inputs
        from cachegraph.model.trace import trace

        with progress() as say:
            say("tracing the model")
            source = self.open()
            example = example_inputs(source.model, source.args, source.kwargs)
            return trace(source.model, *example), source.name

    def build(self, schedule: str, batch: int | None = None) -> tuple[View, str, str]:
        """Plan and graphs, the model's name, and a heading."""
        from cachegraph.compiler.compile import build
        from cachegraph.schedule.schedule import load_schedule
        from cachegraph.show.view import choices, view_build

        asked = load_schedule(schedule)
        with progress() as say:
            say("loading the model")
            source = self.open()
            example, disable = (source.args, source.kwargs), self.disable
            built = build(source.model, asked, *example, disable=disable, progress=say)
            say("counting")
            heading = f"{source.name}, {Path(schedule).stem}{choices((), disable)}"
            return view_build(built, batch), source.name, heading


def show_plan(
    model: ShapesArgument,
    schedule: ScheduleOption,
    arch: ArchOption = None,
    inputs: InputOption = None,
    input_size: SizeOption = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="For FLOPs and bytes; default: that of the example inputs."),
    ] = None,
    counter: Annotated[
        Literal["torch", "toca"],
        typer.Option(
            help="Whose FLOPs: torch's counter, or the rule of ToCa's code for DiT and FLUX."
        ),
    ] = "torch",
    as_json: Annotated[
        bool, typer.Option("--json", help="Write all numbers as JSON instead.")
    ] = False,
    disable: DisableOption = None,
) -> None:
    """Show what would be computed at every step, and what that costs."""
    from cachegraph.show.counted import notes, notes_data
    from cachegraph.show.picture import overview
    from cachegraph.show.view import plan_data

    request = Request(model, arch, inputs or (), input_size, disable or ())
    if counter == "toca":
        _show_toca(request, schedule, batch, as_json)
        return
    view, name, heading = request.build(schedule, batch)
    if as_json:
        data = plan_data(view, name, Path(schedule).stem) | notes_data(view, batch)
        typer.echo(json.dumps(data, indent=1))
        return
    said = notes(view, batch)
    show(overview(heading, view.plan, view.cost, view.batch_text, *room(), said))


def _show_toca(request: Request, schedule: str, batch: int | None, as_json: bool) -> None:
    """FLOPs as the published code counts them; no graph is rewritten for that."""
    from cachegraph.compiler.counters import count_toca
    from cachegraph.schedule.rows import plan_of
    from cachegraph.schedule.schedule import load_schedule, uncached

    asked = load_schedule(schedule)
    traced, name = request.trace()
    flops = count_toca(plan_of(asked, traced), traced, batch)
    full = len(flops) * count_toca(plan_of(uncached(1), traced), traced, batch)[0]
    total = sum(flops)
    if as_json:
        data = {"counter": "toca", "flops": flops, "total_flops": total, "uncached_flops": full}
        typer.echo(json.dumps(data, indent=1))
        return
    show(f"{name}, {Path(schedule).stem}: FLOPs as the published code of ToCa counts them")
    show(f"{_teras(total)} of {_teras(full)} uncached, {full / total:.2f}x")


def _teras(count: int) -> str:
    """Exact, as published totals are: ``43.420574210048 T``, ``0.014281783296 T (14.3 G)``."""
    from cachegraph.show.picture import amount

    return f"{count / 1e12:.12f} T" + (f" ({amount(count)})" if count < 1e12 else "")


def inspect(
    what: WhatArgument,
    schedule: MaybeSchedule = None,
    variant: VariantOption = None,
    diff: DiffOption = None,
    dot: DotOption = None,
    sites: SitesOption = False,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw which tokens digits recomputes at each step."),
    ] = None,
    html: HtmlOption = None,
    part: PartOption = None,
    arch: ArchOption = None,
    inputs: InputOption = None,
    input_size: SizeOption = None,
    disable: DisableOption = None,
) -> None:
    """Look at an artifact, ONNX files, or what a model would become: plan, graphs, differences."""
    from cachegraph.show.onnx_files import onnx_files, onnx_report
    from cachegraph.show.view import sites_table

    from .report import write_report

    asked = (bool(diff), sites, bool(variant or dot), bool(tokens), bool(html))
    if sum(asked) > 1:
        raise InputError(
            "--variant with --dot, --diff, --sites, --tokens and --html exclude each other"
        )
    request = Request(what, arch, inputs or (), input_size, disable or ())
    for_models = request.given(schedule)
    if tokens is not None:
        _draw_tokens(what, schedule, tokens, [n for n in for_models if n != "--schedule"])
        return
    if files := onnx_files(what):
        if for_models or any(asked) or part:
            raise InputError("ONNX files take no options", place=what)
        show(*onnx_report(files))
        return
    if html is not None:
        write_report(request, schedule, html, part=part)
    elif sites and schedule is None and not disable and not is_artifact(what):
        show(sites_table(request.trace()[0].sites))
    else:
        _show_parts(views_of(request, schedule, part), variant, diff, dot, sites)


def _show_parts(
    views: Sequence[tuple[View, str]],
    variant: str | None,
    diff: tuple[str, str] | None,
    dot: Path | None,
    sites: bool,
) -> None:
    """What was asked for; else an overview, and what each pass did where that is known.

    Args:
        views: with what to call them; the overview is of all, all else of the first.
        variant: whose graph to show, or to draw.
        diff: two variants to compare.
        dot: where to draw to.
        sites: list them.
    """
    from cachegraph.graph.text import dot as graph_dot
    from cachegraph.show.difference import show_difference, show_variant
    from cachegraph.show.picture import overview
    from cachegraph.show.view import passes_table, sites_table

    view = views[0][0]
    if sites:
        show(sites_table(view.plan.sites))
    elif diff:
        show(show_difference(view, *diff), columns=_UNBROKEN)
    elif dot:
        index = view.variant(variant) if variant else 0
        with writing(dot):
            dot.write_text(graph_dot(view.graphs[index]))
        show(f"{dot}: {view.plan.variants[index].name} in DOT")
    elif variant and on_terminal():
        show(show_variant(view, variant))
    elif variant:
        typer.echo(view.texts[view.variant(variant)], nl=False)
    else:
        for view, heading in views:
            show(overview(heading, view.plan, view.cost, view.batch_text, *room()))
            if view.reports:
                show("", passes_table(view.reports))


def _draw_tokens(what: str, schedule: str | None, path: Path, unused: Sequence[str]) -> None:
    """Sample a digit, and draw the tokens that were recomputed over it."""
    if unused:
        raise InputError(f"{unused[0]} does not go with --tokens", place=what)
    if what != "digits" or schedule is None:
        raise InputError(
            "--tokens needs a sampler, which only digits has here",
            place=what,
            expected="cachegraph inspect digits --schedule ... --tokens FILE.png",
        )
    from cachegraph.show.token_map import write_token_map
    from cachegraph.zoo import load_model

    with progress() as say:
        say("sampling")
        write_token_map(load_model(what), schedule, path)
    show(f"{path}: a panel a step; orange: recomputed tokens, green frame: everything is computed")


def needed_schedule(schedule: str | None, model: str) -> str:
    """The schedule; where there is none, says what is missing."""
    from cachegraph.compiler.sources import check_model_file

    if schedule is not None:
        return schedule
    check_model_file(model)
    what = "a model needs --schedule, or give an artifact"
    raise InputError(what, place=model, remedy="only --sites does without")


def views_of(request: Request, schedule: str | None, part: int | None) -> list[tuple[View, str]]:
    """What there is to see of an artifact or a model, with headings.

    Args:
        request: the artifact or model.
        schedule: of a model.
        part: of an artifact, that plan and form of call alone.

    Raises:
        InputError: an option does not go with it.
    """
    if is_artifact(request.model):
        views = _read_views(request.model, request.given(schedule))
        if not 1 <= (part or 1) <= len(views):
            raise InputError("--part: there is no such part", expected=f"1 to {len(views)}")
        return views if part is None else views[part - 1 : part]
    if part is not None:
        raise InputError("--part goes with an artifact only", place=request.model)
    view, _, heading = request.build(needed_schedule(schedule, request.model))
    return [(view, heading)]


def _read_views(path: str, options: Sequence[str]) -> list[tuple[View, str]]:
    """An artifact, for each plan and form of call, and what to call it."""
    from cachegraph.artifact.load import load_artifact
    from cachegraph.show.view import choices, parts_of, view_artifact

    if options:
        raise InputError(
            f"{options[0]} goes with a model only",
            place=path,
            remedy="leave it out: what an artifact was made from is in it",
        )
    with progress() as say:
        say("reading the artifact")
        artifact = load_artifact(path)
    chosen = choices(artifact.program.varying, artifact.program.disabled)
    heading = f"{Path(path).name}, backend {artifact.backend}{chosen}"
    return [(view_artifact(one), heading + title) for title, one in parts_of(artifact)]
