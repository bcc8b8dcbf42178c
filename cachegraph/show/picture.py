"""Plans for the eye: a picture of steps x sites, the variants, and what they cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cachegraph.compiler.cost import PlanCost
from cachegraph.model.site import Site
from cachegraph.plan.action import Action, Compute, Forecast, Refresh, Reuse, Row
from cachegraph.plan.plan import Plan
from cachegraph.plan.variant import Variant

_STYLES = {
    "C": "black on green",
    "R": "bright_black",
    "F": "black on yellow",
    "T": "black on magenta",
    "-": "bright_black",
}
_LETTERS = {Compute: "C", Reuse: "R", Forecast: "F", Refresh: "T"}
_MIXED = "black on cyan"
_TOKEN_ROWS = 7  # of a kind of site
_TOKEN_STYLES = {
    ".": "bright_black",
    **{str(tenth): f"black on rgb({60 + 21 * tenth},{40 + 15 * tenth},140)" for tenth in range(10)},
    "C": "black on green",
}
_WORDS = {"C": "compute", "R": "reuse", "F": "forecast", "T": "refresh tokens", "-": "skipped"}
_MOST_BANDS = 12  # pieces that the steps of one picture are cut into
_MARK = 10  # steps from one number above the picture to the next


@dataclass(frozen=True)
class PictureRow:
    """Sites drawn as one row.

    Attributes:
        label: their names in one, such as ``blocks.0-27.attn``.
        count: how many sites.
        cells: one character a step: a letter where all sites do the same, else a digit: how many
            tenths of them compute.
        sites: their indices.
    """

    label: str
    count: int
    cells: str
    sites: tuple[int, ...] = field(default=(), compare=False)


def letters(plan: Plan, row: Row) -> str:
    """One character a site for what a row does: C, R, F or T, or - where it skips its blocks."""
    skipped = [plan.is_skipped(row, i) for i in range(len(row))]
    return "".join("-" if idle else _LETTERS[type(a)] for idle, a in zip(skipped, row, strict=True))


def picture_rows(plan: Plan, most: int | None = None) -> list[PictureRow]:
    """The rows of a picture, in site order.

    Sites whose names differ in numbers alone and that do the same at every step share a row;
    nothing is lost by that. Only where more than ``most`` rows are left, all sites of one name
    share a row.

    Args:
        plan: what every step does.
        most: rows that there is room for; None for any number.
    """
    lines = [letters(plan, row) for row in plan.rows]
    cells = ["".join(column) for column in zip(*lines, strict=True)]
    families = [re.sub(r"\d+", "*", site.name) for site in plan.sites]
    rows = _merged(plan.sites, cells, list(zip(families, cells, strict=True)))
    if most is not None and len(rows) > most:
        rows = _merged(plan.sites, cells, families)
    return rows


def picture(plan: Plan, width: int, most: int | None = None) -> Text:
    """Steps from left to right, sites from top to bottom, a letter each, and a legend.

    Args:
        plan: what every step does.
        width: columns of the terminal; more steps than fit are drawn below each other.
        most: rows that there is room for.
    """
    rows = picture_rows(plan, most)
    return draw(rows, width, _STYLES).append_text(_legend(rows))


def draw(rows: Sequence[PictureRow], width: int, styles: Mapping[str, str]) -> Text:
    """Rows below each other, cut into pieces of so many columns.

    Args:
        rows: at least one.
        width: columns of the terminal.
        styles: of cells; all others are of mixed rows.
    """
    steps = len(rows[0].cells)
    labels = max(len(row.label) for row in rows)
    counts = max(len(str(row.count)) for row in rows)
    margin = labels + counts + 4
    columns = max((width - margin) // _MARK, 1) * _MARK
    drawn = Text(no_wrap=True, overflow="ignore")
    for start in range(0, min(steps, columns * _MOST_BANDS), columns):
        stop = min(start + columns, steps)
        drawn.append(" " * margin + _scale(start, stop) + "\n", "bold")
        for row in rows:
            drawn.append(f"{row.label:<{labels}}  {row.count:>{counts}}  ")
            for cell, run in groupby(row.cells[start:stop]):
                drawn.append("".join(run), styles.get(cell, _MIXED))
            drawn.append("\n")
        drawn.append("\n")
    if steps > columns * _MOST_BANDS:
        drawn.append(f"... and {steps - columns * _MOST_BANDS} further steps\n\n")
    return drawn


def variants_table(plan: Plan, cost: PlanCost) -> Table:
    """One line a variant: its steps, what it does by kind of site, the mean FLOPs of its steps."""
    kinds = list(dict.fromkeys(site.kind for site in plan.sites))
    numbers = ("FLOPs a call", "of full")
    table = plain_table("variant", "calls", "steps", *kinds, *numbers, right=("calls", *numbers))
    for variant in plan.variants:
        flops = cost.mean_flops(variant.steps)
        actions = [_counted(plan, variant, kind) for kind in kinds]
        share = f"{flops / max(cost.full_flops, 1):.1%}"
        steps = steps_text(variant.steps)
        table.add_row(variant.name, str(len(variant.steps)), steps, *actions, amount(flops), share)
    return table


Notes = Sequence[tuple[str, str]]  # further lines of a summary: what, and what of it


def summary(
    heading: str, plan: Plan, cost: PlanCost, batch: str, notes: Notes = ()
) -> RenderableType:
    """What a plan comes to: steps, FLOPs and the speed-up that they allow, memory.

    Args:
        heading: names model and schedule.
        plan: what every step does.
        cost: of the plan.
        batch: what the numbers hold for, such as ``batch 2``.
        notes: on FLOPs.
    """
    full, peak = cost.full_flops * plan.steps, max(cost.cache_bytes)
    when = f", first after step {cost.cache_bytes.index(peak)}" if peak else ""
    shared = f", shared by {plural(len(plan.variants), 'variant')}"
    table = plain_table("", "")
    table.show_header = False
    table.columns[0].style = "bold"
    table.add_row("steps", f"{plan.steps}, {plan.full_steps()} of them full")
    table.add_row("sites", str(len(plan.sites)))
    table.add_row("FLOPs", f"{amount(cost.total_flops)} of {amount(full)} uncached, {batch}")
    for what, text in notes:
        table.add_row(what, text)
    table.add_row("speed-up", f"at most {cost.limit:.2f}x, going by FLOPs")
    table.add_row("cache", f"at most {size(peak)}{when}")
    if peak:
        table.add_row("history", _histories(plan))
        table.add_row("liveness", _saved(plan, cost))
    if any(cost.known_bytes):
        table.add_row("prologue", f"at most {size(max(cost.known_bytes))} known before a step runs")
    table.add_row("weights", f"{size(cost.weight_bytes)}{shared}")
    if cost.prologue_bytes:
        during = size(cost.weight_bytes - cost.prologue_bytes)
        table.add_row("", f"{during} of them while steps run, with release=True")
    if cost.peak_bytes:
        table.add_row("peak", f"about {size(max(cost.peak_bytes))}, weights included, compiled")
    return Group(Text(heading, "bold"), "", table)


def _histories(plan: Plan) -> str:
    """``attn 5, mlp 1: the most values kept of a site``."""
    depths: dict[str, int] = {}
    for site, depth in zip(plan.sites, plan.history_depths(), strict=True):
        depths[site.kind] = max(depths.get(site.kind, 0), depth)
    listed = ", ".join(f"{kind} {depth}" for kind, depth in depths.items())
    return f"{listed}: the most values kept of a site"


def _saved(plan: Plan, cost: PlanCost) -> str:
    """What freeing values after their last use saves."""
    unfreed = plan.unfreed_bytes(cost.symbols)
    on_average = (sum(unfreed) - sum(cost.cache_bytes)) / plan.steps
    at_most = max(unfreed) - max(cost.cache_bytes)
    return (
        f"saves {size(on_average)} of {size(sum(unfreed) / plan.steps)} on average, "
        f"{size(at_most)} of {size(max(unfreed))} at the peak"
    )


def overview(
    heading: str,
    plan: Plan,
    cost: PlanCost,
    batch: str,
    width: int,
    most: int | None,
    notes: Notes = (),
) -> RenderableType:
    """Summary, picture and variants, with empty lines between them."""
    costs = summary(heading, plan, cost, batch, notes)
    tokens = token_picture(plan, width)
    pictures = (picture(plan, width, most), *(("", tokens) if tokens is not None else ()))
    return Group(costs, "", *pictures, "", variants_table(plan, cost))


def token_picture(plan: Plan, width: int) -> Text | None:
    """The share of its tokens that each site recomputes, step by step; None where none chooses.

    Neighbouring sites of a kind share a row, which shows their mean.

    Args:
        plan: what every step does.
        width: columns of the terminal.
    """
    kinds: dict[str, list[int]] = {}
    for i, site in enumerate(plan.sites):
        if any(isinstance(row[i], Refresh) for row in plan.rows):
            kinds.setdefault(site.kind, []).append(i)
    if not kinds:
        return None
    rows = []
    for sites in kinds.values():
        size = -(-len(sites) // _TOKEN_ROWS)
        for start in range(0, len(sites), size):
            group = sites[start : start + size]
            cells = "".join(_tenths(plan, group, row) for row in plan.rows)
            label = common_name([plan.sites[i].name for i in group])
            rows.append(PictureRow(label, len(group), cells))
    drawn = draw(rows, width, _TOKEN_STYLES)
    drawn.append(".", _TOKEN_STYLES["."]).append(" no token   ")
    drawn.append("0-9", _TOKEN_STYLES["5"]).append(" tenths of the tokens are recomputed   ")
    return drawn.append("C", _TOKEN_STYLES["C"]).append(" all")


def _tenths(plan: Plan, group: Sequence[int], row: Row) -> str:
    shares = [_share(row[i], plan.sites[i]) for i in group]
    mean = sum(shares) / len(shares)
    return "C" if mean == 1 else "." if mean == 0 else str(int(mean * 10))


def _share(action: Action, site: Site) -> float:
    """Of the tokens of a site, those that are recomputed."""
    match action:
        case Compute():
            return 1.0
        case Refresh(tokens=tokens):
            count = site.values[0].spec.shape[1]
            return tokens / count if isinstance(count, int) else 0.0
    return 0.0


def plain_table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without lines.

    Args:
        headings: of the columns.
        right: those of numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def steps_text(steps: Sequence[int], width: int = 16) -> str:
    """``0 1 4 7 ... 49``; runs of three and more as ``2-9``; the first ones that fit, the last."""
    words = ranges(steps)
    if len(" ".join(words)) <= width:
        return " ".join(words)
    end = f"... {words[-1]}"
    while len(words) > 1 and len(" ".join([*words, end])) > width:
        words.pop()
    return " ".join([*words, end])


def ranges(numbers: Sequence[int], least: int = 3) -> list[str]:
    """Rising numbers as words; ``least`` and more in a row as one: ``['0', '2-9']``."""
    words: list[str] = []
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    for _, run in runs:
        found = [number for _, number in run]
        words += [f"{found[0]}-{found[-1]}"] if len(found) >= least else map(str, found)
    return words


def amount(count: float) -> str:
    """``8.57 T``, ``60.4 M``, ``12``: three digits and a decimal prefix."""
    return _scaled(count, 1000, ("", " k", " M", " G", " T", " P", " E"))


def size(count: float) -> str:
    """``126 MiB``: three digits and a binary prefix."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def plural(count: int, word: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _merged(
    sites: Sequence[Site], cells: Sequence[str], keys: Sequence[object]
) -> list[PictureRow]:
    """One row for all sites of one key."""
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [
        PictureRow(
            common_name([sites[i].name for i in group]),
            len(group),
            "".join(map(_cell, zip(*(cells[i] for i in group), strict=True))),
            tuple(group),
        )
        for group in groups.values()
    ]


def _cell(letters: Sequence[str]) -> str:
    if len(set(letters)) == 1:
        return letters[0]
    computed = letters.count("C")
    return str(min(max(round(10 * computed / len(letters)), 1), 9)) if computed else "0"


def common_name(names: Sequence[str]) -> str:
    """Names that differ in numbers alone as one: ``blocks.0-27.attn``."""
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]  # numbers stand at odd places
    label = ""
    for place, found in enumerate(zip(*pieces, strict=True)):
        different = sorted(set(map(int, found))) if place % 2 else []
        label += _short(ranges(different, least=2)) if place % 2 else found[0]
    return label


def _short(words: Sequence[str]) -> str:
    return ",".join(words) if len(words) <= 4 else ",".join([*words[:2], "..", words[-1]])


def _scale(start: int, stop: int) -> str:
    """The number of every tenth step above its column."""
    marks = (str(step).ljust(_MARK) for step in range(start, stop, _MARK))
    return "".join(marks).rstrip()


def _legend(rows: Sequence[PictureRow]) -> Text:
    seen = {cell for row in rows for cell in row.cells}
    legend = Text()
    for cell, word in _WORDS.items():
        if cell in seen:
            legend.append(cell, _STYLES[cell]).append(f" {word}   ")
    if any(cell.isdigit() for cell in seen):
        legend.append("0-9", _MIXED).append(" tenths of these sites compute")
    legend.rstrip()
    return legend


def _counted(plan: Plan, variant: Variant, kind: str) -> str:
    """``28 C``, or ``20 C 8 R``."""
    done = zip(plan.sites, letters(plan, variant.row), strict=True)
    counts = Counter(cell for site, cell in done if site.kind == kind)
    return " ".join(f"{counts[cell]} {cell}" for cell in _WORDS if counts[cell])


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    value, unit = float(count), 0
    while abs(value) >= base - 0.5 and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{units[unit]}"
