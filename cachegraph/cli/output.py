"""How the command line writes: results to stdout, progress to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Say = Callable[..., None]  # say("compiling variant0", 0, 2): done so far, of how many

_OTHER_LINES = 18  # of a screen with a plan on it: summary, variants, prompt


def show(*parts: RenderableType, columns: int | None = None) -> None:
    """Writes one part below the other to stdout, without spaces at the ends of lines.

    Args:
        parts: text and tables.
        columns: how wide a file or pipe is; 80 by default.
    """
    screen = _stdout()
    if columns is not None and not screen.is_terminal:
        screen.width = columns
    with screen.capture() as captured:
        for part in parts:
            # A line that others read is not broken, however long the path in it.
            screen.print(part, soft_wrap=isinstance(part, str) and not screen.is_terminal)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), color=True)


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return _stdout().is_terminal


def room() -> tuple[int, int | None]:
    """Columns of the terminal, and rows of a picture that fit it.

    A file or pipe has room for any number of rows.
    """
    screen = _stdout()
    return screen.width, max(screen.height - _OTHER_LINES, 4) if screen.is_terminal else None


def _stdout() -> Console:
    # names and shapes as they are, not taken for markup or numbers to be coloured
    return Console(markup=False, highlight=False, emoji=False)


@contextmanager
def progress() -> Iterator[Say]:
    """What is being done, while it is being done; nothing where stderr is no terminal."""
    screen = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    bars = (BarColumn(bar_width=24), TimeElapsedColumn())
    hidden = not screen.is_terminal
    with Progress(*columns, *bars, console=screen, transient=True, disable=hidden) as shown:
        task = shown.add_task("starting", total=None)

        def say(text: str, done: int = 0, total: int | None = None) -> None:
            shown.update(task, description=text, completed=done, total=total)

        yield say


def is_artifact(text: str) -> bool:
    """True for a folder that is, or by its name should be, an artifact."""
    path = Path(text)
    return (path / "manifest.json").is_file() or path.suffix == ".cgraph"
