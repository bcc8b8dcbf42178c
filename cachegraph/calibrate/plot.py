"""Draw what was measured: error against step, one panel a kind of site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cachegraph.errors import InputError
from cachegraph.folders import writing

from .result import Calibration, smoothcache_lists

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 8.0, 2.8  # inches of a panel
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def check_plot_path(path: Path) -> None:
    """Refuse early what cannot be drawn later.

    Raises:
        InputError: it is no PNG in a folder that exists, or matplotlib is missing.
    """
    if path.suffix != ".png":
        raise InputError("plots are written as PNG", place=str(path), expected="a .png file")
    if not path.parent.is_dir():
        raise InputError("there is no such folder", place=str(path.parent))
    figure_class()


def plot_calibration(
    calibration: Calibration,
    path: Path,
    *,
    bound: float | None = None,
    corrected: Sequence[int] = (),
    title: str = "",
) -> None:
    """Write a PNG: the mean error at every distance, its range over sites, and what is computed.

    Args:
        calibration: what was measured.
        path: the PNG.
        bound: drawn as a line; the steps that SmoothCache computes at it are marked.
        corrected: the steps of a correction, to be marked.
        title: above the panels.

    Raises:
        InputError: see :func:`check_plot_path`.
    """
    check_plot_path(path)
    kinds = calibration.kinds
    figure = figure_class()(figsize=(_WIDTH, 0.6 + _HEIGHT * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for panel, kind in zip(panels, kinds, strict=True):
        _draw_errors(panel, calibration, kind)
        if bound is not None:
            label = f"bound {bound:g}"
            panel.axhline(bound, color="black", linestyle="--", linewidth=1, label=label)
            rule = smoothcache_lists(calibration, bound)[kind]
            _mark(panel, [step for step, one in enumerate(rule) if one], "computed", 0.03, "|")
        _mark(panel, corrected, "corrected", 0.09, "x")
        panel.legend(fontsize=8, ncols=3, loc="upper left")
    panels[-1].set_xlabel("step (0 = the first that runs)")
    figure.suptitle(f"{title}: {calibration.extent}" if title else calibration.extent)
    with writing(path):
        figure.savefig(path, dpi=120)


def _draw_errors(panel: Axes, calibration: Calibration, kind: str) -> None:
    sites = calibration.errors[calibration.indices(kind)].numpy()
    for distance, curve in enumerate(calibration.curves(kind), start=1):
        steps = np.arange(len(curve))
        colour = _COLOURS[(distance - 1) % len(_COLOURS)]
        panel.plot(steps, curve, color=colour, label=f"step s to s + {distance}")
        of_sites = sites[:, distance - 1, : len(curve)]
        panel.fill_between(
            steps, of_sites.min(0), of_sites.max(0), color=colour, alpha=0.12, linewidth=0
        )
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylabel("relative L1 change")
    low, high = panel.get_ylim()
    panel.set_ylim(low / 2, high * 3)  # room for the marks below and for the legend above
    panel.set_title(f"{kind}: mean of {len(sites)} sites, band from least to most", fontsize=10)
    panel.grid(visible=True, alpha=0.3)


def _mark(panel: Axes, steps: Sequence[int], word: str, height: float, marker: str) -> None:
    """Mark steps at the lower edge of a panel."""
    if steps:
        panel.plot(
            steps,
            [height] * len(steps),
            marker,
            color="black",
            markersize=8 if marker == "|" else 4,
            transform=panel.get_xaxis_transform(),
            label=f"{word}: {len(steps)} steps",
        )


def figure_class() -> Any:
    """Matplotlib's Figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a plot needs matplotlib", remedy="pip install 'cachegraph[eval]', or leave out --plot"
        ) from error
    return Figure
