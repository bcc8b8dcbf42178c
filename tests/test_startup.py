"""What is imported and read only when it is needed, so that a process begins at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cachegraph as cg


def in_a_new_process(*lines: str) -> None:
    """Run the lines; they assert something."""
    subprocess.run([sys.executable, "-c", "\n".join(["import sys", *lines])], check=True)


def test_the_package_and_its_help_do_without_torch() -> None:
    in_a_new_process(
        "from typer.testing import CliRunner",
        "import cachegraph",
        "assert 'compile' in dir(cachegraph)",
        "from cachegraph.cli import app",
        "result = CliRunner().invoke(app, ['compile', '--help'])",
        "assert result.exit_code == 0, result",
        "assert 'torch' not in sys.modules",
        "assert cachegraph.load and 'torch' in sys.modules",
    )


@pytest.mark.parametrize(
    "load", ["load_model('digits')", "zoo.build_model('PixArt-XL/2', device='meta')"]
)
def test_models_are_made_without_torchs_compiler(load: str) -> None:
    in_a_new_process(
        "import cachegraph", f"cachegraph.{load}", "assert 'torch._dynamo' not in sys.modules"
    )


def test_every_public_name_is_there() -> None:
    for name in cg.__all__:
        assert getattr(cg, name).__module__.startswith("cachegraph."), name
    assert set(cg.__all__) == set(cg._MODULES)
    assert cg.errors.InputError
    for name in ("lode", "__main__", "_nothing"):
        assert not hasattr(cg, name)
