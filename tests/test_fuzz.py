"""A little of tools/fuzz.py: what is damaged is refused, or does exactly what it did."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from cachegraph.model.trace import trace
from cachegraph.zoo import build_model
from tests.models import one_thread  # noqa: F401

TOOL = Path(__file__).parents[1] / "tools" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(results: list[str]) -> Counter[str]:
    assert not [result for result in results if "FOUND" in result]
    return Counter(results)


def test_damaged_artifacts(fuzz: ModuleType, tmp_path: Path) -> None:
    wanted = fuzz.make_artifact(tmp_path / "original")
    results = counted(
        [
            fuzz.fuzz_artifact(tmp_path / "original", wanted, tmp_path / f"{number}", number)
            for number in range(100)
        ]
    )
    assert results["refused"] >= 60  # of 65 that were not signed anew
    assert results["signed: refused"] >= 20


def test_damaged_schedules_and_plans(fuzz: ModuleType, tmp_path: Path) -> None:
    traced = trace(build_model(fuzz.MODEL, 8), fuzz.calls()[0])
    schedules = counted([fuzz.fuzz_schedule(tmp_path, traced, number) for number in range(100)])
    plans = counted([fuzz.fuzz_plan(traced, number) for number in range(100)])
    assert schedules["refused"] > schedules["planned"] > 0
    assert plans["refused"] > plans["planned"] > 0
