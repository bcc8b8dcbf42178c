"""Pictures of quality against cost, with those marked that nothing else beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachegraph.calibrate.plot import check_plot_path, figure_class

_SIZE = (7.0, 4.2)  # inches
_OWN, _OTHER, _TRIED = "#0072b2", "#d55e00", "#999999"


@dataclass(frozen=True)
class Point:
    """A schedule in the picture.

    Attributes:
        name: of the schedule.
        cost: full steps, or seconds.
        quality: PSNR in dB.
        own: it is the one that is talked about.
    """

    name: str
    cost: float
    quality: float
    own: bool = False


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is as good at less cost, or better at as much."""
    best = list[Point]()
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        as_good = best and (point.cost, point.quality) == (best[-1].cost, best[-1].quality)
        if not best or as_good or point.quality > best[-1].quality:
            best.append(point)
    return best


def plot_front(
    points: Sequence[Point],
    tried: Mapping[str, float],
    path: Path,
    title: str,
    cost: str = "full steps",
) -> None:
    """Write a PNG.

    Args:
        points: schedules with their names.
        tried: what a search tried -> its quality; drawn at the cost of the own point.
        path: the PNG.
        title: above it.
        cost: what costs are.

    Raises:
        InputError: it is no PNG in a folder that exists, or matplotlib is missing.
    """
    check_plot_path(path)
    figure = figure_class()(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    own = [point for point in points if point.own]
    if own and tried:
        at = [own[0].cost] * len(tried)
        axes.scatter(at, list(tried.values()), s=8, c=_TRIED, label="tried, on other noises")
    for point in points:
        colour = _OWN if point.own else _OTHER
        axes.scatter([point.cost], [point.quality], s=36, c=colour, zorder=3)
        axes.annotate(
            point.name,
            (point.cost, point.quality),
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.margins(x=0.15)  # room for the names
    line = front(points)
    axes.plot([p.cost for p in line], [p.quality for p in line], c=_OWN, lw=1, label="front")
    axes.set_xlabel(cost)
    axes.set_ylabel("PSNR to uncached images, dB")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
