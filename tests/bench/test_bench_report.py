"""What is told of a benchmark: words below the tables, and what the picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cachegraph.bench.report import Machine, plot_steps, report
from cachegraph.bench.result import UNCACHED, Measured, Quality, Spread, StepKind

HERE = Machine("2.13", "cpu", "a processor", 2, 1, "linux")


def measured(name: str, backend: str, seconds: float, spread: float, **more: Any) -> Measured:
    """A trajectory of four equal steps."""
    whole, step = (Spread(s - spread, s, s + spread) for s in (seconds, seconds / 4))
    kind = StepKind("variant0", 4, 1e6, step, None, None, more.pop("choice", None))
    steps = (seconds / 4,) * 4
    return Measured(name, backend, whole, step, None, steps, (kind,), 2.0, 1.0, **more)


def entries(
    spread: float = 0.0, judged: bool = True, choice: float | None = None
) -> list[Measured]:
    quality = Quality(40.0, 1.0, 20) if judged else None
    ways = [(UNCACHED, "model", 4.0), (UNCACHED, "inductor", 3.0)]
    ways += [("fora", "inductor", 2.0), ("fora", "hooks", 1.904)]
    return [measured(*way, spread, quality=quality, choice=choice) for way in ways]


def told(found: list[Measured], rounds: int) -> tuple[str, list[list[str]]]:
    """The words, and the cells of the first two tables."""
    parts = list(report("digits", found, HERE, rounds))
    words = "\n".join(part for part in parts if isinstance(part, str))
    tables = [parts[2], parts[4]]
    cells = [[str(c) for column in one.columns for c in column.cells] for one in tables]  # type: ignore[union-attr]
    return words, cells


def test_one_round_has_no_quartiles() -> None:
    words, [trajectories, kinds] = told(entries(), 1)
    assert "\n1 round; a trajectory is" in words
    assert ", 1 thread, cpu, torch 2.13" in words
    assert "4.00" in trajectories
    assert "1000" in kinds
    assert not any("[" in cell or "±" in cell for cell in [*trajectories, *kinds])


def test_quartiles_of_several_rounds() -> None:
    words, [trajectories, kinds] = told(entries(spread=0.5), 2)
    assert "\n2 rounds, all in turn, median [quartiles]" in words
    assert "4.00 [3.50-4.50]" in trajectories
    assert "1000 ±50.0%" in kinds


def test_columns_are_explained_where_they_are() -> None:
    words, tables = told(entries(judged=False), 1)
    assert not any(word in words for word in ("PSNR", "right", "choice"))
    assert all("eager" in cells and "model" not in cells for cells in tables)
    words, _ = told(entries(choice=0.25), 1)
    assert "\nchoice: share of a call that goes into choosing tokens" in words
    assert "\nPSNR to the uncached model's images, mean of 20; right: share that shows" in words


def drawn(found: list[Measured], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that is written."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    seen = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: seen.append(self))
    plot_steps(found, path, "digits")
    return seen[0]


def test_plot_of_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(entries(), tmp_path / "plot.png", monkeypatch)
    steps, quality = figure.axes
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "uncached, eager: 4.00 s",
        "uncached, inductor: 3.00 s",
        "fora, inductor: 2.00 s",
        "fora, hooks: 1.90 s",
    ]
    assert not quality.texts
    assert [list(line.get_xdata()) for line in quality.lines] == [[4, 4], [3, 3], [2], [1.904]]
    colours = [[one.get_color() for one in panel.lines] for panel in (steps, quality)]
    assert colours[0][::2] == colours[0][1::2] == ["C0", "C1", "C2", "C3"]
    assert colours[1][:2] == ["C0", "C1"]
    assert [one.get_markerfacecolor() for one in quality.lines[2:]] == ["C2", "none"]
    assert steps.lines[4].get_linewidth() > steps.lines[6].get_linewidth()  # hooks


def test_plot_of_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(entries(judged=False), tmp_path / "plot.png", monkeypatch)
    [panel] = figure.axes
    assert {one.get_marker() for one in panel.lines} == {"None"}
