"""What the tests of artifacts share: a tiny one in memory, in a folder, and a copy to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cachegraph.artifact.artifact import Artifact
from tests.models import compile_traced
from tests.tiny import tiny, traced

TABLE = ["compute", [0, 1, 1, 0], [1, 0, 1, 1], "reuse"]
SCHEDULE = {"cachegraph": 1, "steps": len(TABLE), "policy": {"method": "table", "rows": TABLE}}


@pytest.fixture(scope="module")
def compiled() -> Artifact:
    return compile_traced(tiny(), traced(), SCHEDULE)


@pytest.fixture(scope="module")
def original(compiled: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.save(tmp_path_factory.mktemp("saved") / "tiny.cgraph")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "tiny.cgraph"))
