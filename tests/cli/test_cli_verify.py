"""``cachegraph verify --integrity``: an artifact is looked at alone, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import cachegraph as cg
from cachegraph import cli
from cachegraph.artifact import load
from tests.models import dit_steps, fora, signed, tiny_dit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("integrity") / "tiny.cgraph"
    cg.compile(tiny_dit(), fora(4, 2), dit_steps(1)[0], backend="eager", out=path)
    return path


def verified(path: Path) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["verify", str(path), "--integrity"])
    return found.exit_code, found.output


def test_a_whole_artifact(saved: Path) -> None:
    code, said = verified(saved)
    assert code == 0
    assert f"{saved}: whole: 4 steps, 2 variants, " in said.replace("\n", "")


def test_a_bit_of_the_weights(saved: Path) -> None:
    path = saved / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    code, said = verified(saved)
    path.write_bytes(content)
    assert code == 2
    assert "is damaged; expected the tensor as it was written" in said.replace("\n", " ")


def test_a_graph_that_was_edited_and_signed(saved: Path) -> None:
    """Loading alone reads graphs when they are wanted; here all are."""
    path = saved / "graphs" / "variant0.json"
    text = path.read_text()
    path.write_text(text.replace('"aten.gelu.default"', '"aten.gone.default"'))
    signed(saved)
    load.load_artifact(saved)
    code, said = verified(saved)
    assert code == 2
    assert "this torch has no operator aten.gone.default" in said.replace("\n", " ")
