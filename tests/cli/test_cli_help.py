"""What help pages say of safety, and how warnings are shown."""

from __future__ import annotations

import warnings

import pytest
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.cli import _show_warning

OPENS = (
    *("compile", "plan", "inspect", "report", "verify", "export", "sample", "bench", "calibrate"),
    *("train-router", "search", "compare"),
)


def help_of(command: str) -> str:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
    return " ".join(shown.replace("\u2502", " ").split())


def test_which_commands_open_models_or_artifacts() -> None:
    """The others read data alone, and evaluate says it of its extractor."""
    names = {name for name, *_ in cli._COMMANDS}
    assert names - {*OPENS} == {"evaluate", "import-router", "import-schedule"}
    assert "Runs code: open only what you trust" in help_of("evaluate")


@pytest.mark.parametrize("command", OPENS)
def test_help_says_what_runs_code(command: str) -> None:
    text = help_of(command)
    assert (
        "Programs (.pt2), factories, and artifacts compiled for aoti or tensorrt run code" in text
    )
    assert "open only those that you trust" in text


def test_warnings_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", _show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("names are read without module.", stacklevel=1)
    assert capsys.readouterr().err == "warning: names are read without module.\n"
