"""What help pages say of safety, and how warnings are shown."""

from __future__ import annotations

import warnings

import pytest
from typer.testing import CliRunner

from cachegraph import cli
from cachegraph.cli import _show_warning

OPENS = ("compile", "plan", "inspect", "verify", "export", "sample", "bench", "calibrate")


@pytest.mark.parametrize("command", OPENS)
def test_help_says_what_runs_code(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
    text = " ".join(shown.replace("\u2502", " ").split())
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
