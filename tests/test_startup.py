"""What is imported and read only when it is needed, so that a process begins at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cachegraph as cg
from tests.models import TOCA, dit_steps, tiny_dit


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


# torch imports torch.export by itself; what counts is that none of ours does.
COMPILER = ("torch.export", "torch._dynamo", "pydantic", "networkx", "yaml", "sympy")
NO_COMPILER = (
    "loaded = {name.split('.')[1] for name in sys.modules if name.startswith('cachegraph.')}",
    "assert not loaded & {'schedule', 'methods', 'config', 'compiler', 'passes', 'oracle'}, loaded",
    "assert 'cachegraph.model.trace' not in sys.modules",
    f"more = [n for n in {COMPILER} if n in sys.modules and n not in before]",
    "assert not more, more",
)


def test_the_runner_is_imported_without_the_compiler() -> None:
    in_a_new_process(
        "import torch",
        "before = set(sys.modules)",
        "import cachegraph.runtime.runner",
        *NO_COMPILER,
    )


@pytest.mark.parametrize("schedule", ["fora-n3", TOCA], ids=["fora", "toca"])
def test_an_artifact_is_loaded_and_run_without_the_compiler(
    schedule: object, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny.cgraph"
    [(x, t, y)] = dit_steps(1)
    cg.compile(tiny_dit(), schedule, (x, t, y), backend="eager", out=folder)
    in_a_new_process(
        "import torch",
        "before = set(sys.modules)",
        "import cachegraph as cg",
        f"run = cg.load({str(folder)!r})",
        f"x, y = torch.zeros({list(x.shape)}), torch.zeros(2).long()",
        "for step in range(3):",
        "    run(x, torch.full((2,), 900 - step), y)",
        "assert run.cache_bytes()",
        *NO_COMPILER,
    )


def test_every_public_name_is_there() -> None:
    for name in cg.__all__:
        assert getattr(cg, name).__module__.startswith("cachegraph."), name
    assert set(cg.__all__) == set(cg._MODULES)
    assert cg.errors.InputError
    for name in ("lode", "__main__", "_nothing"):
        assert not hasattr(cg, name)
