"""What is handed out: an sdist with all that is tracked, and no dependency that nobody imports."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.test_project import PYPROJECT, ROOT, build_sdist, tracked_files

MODULES = {"pyyaml": "yaml"}  # those that are not called as their distribution is


def test_sdist_holds_all_that_is_tracked(tmp_path: Path) -> None:
    """Tests, tools and pages too; settings of the checkout alone, which begin with a dot, not."""
    source = tmp_path / "source"
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    folder = build_sdist(source)
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held - made == {name for name in tracked if not name.startswith(".")}


def test_every_dependency_is_imported() -> None:
    sources = [*ROOT.glob("cachegraph/**/*.py"), *ROOT.glob("passes/*.py")]
    lines = {line.strip() for path in sources for line in path.read_text().splitlines()}
    imported = {m[1] for line in lines if (m := re.match(r"(?:from|import) (\w+)", line))}
    asked = {re.split(r"[<>=]", text)[0] for text in PYPROJECT["project"]["dependencies"]}
    assert {MODULES.get(name, name) for name in asked} <= imported
