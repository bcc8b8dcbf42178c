"""What published implementations computed, call by call, against compiled graphs and reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cachegraph as cg
from cachegraph.model.trace import TracedModel, trace
from cachegraph.plan.action import Compute
from cachegraph.zoo import DiT
from tests.models import (
    DATA,
    compile_traced,
    dit_steps,
    one_thread,  # noqa: F401
    relative_error,
    shared_dit,
)

LIMIT = 1e-4  # relative L2 error of each call
SCHEDULES: dict[str, Any] = {
    "plain_ddim20": {"cachegraph": 1, "steps": 20, "policy": {"method": "full"}},
    "fora3_ddpm50": "fora-n3",
}
Model = Callable[..., Tensor]


class Case:
    """One recording and what was compiled for it, in memory and in a folder."""

    def __init__(self, name: str, model: DiT, traced: TracedModel, folder: Path) -> None:
        self.recording = load_file(DATA / f"{name}.safetensors")
        self.model, self.traced, self.folder = model, traced, folder
        self.artifact = compile_traced(
            model, traced, SCHEDULES[name], backend="inductor", out=folder
        )

    def reference(self) -> cg.ReferenceRunner:
        plan, schedule = self.artifact.program.plan, self.artifact.schedule
        return cg.ReferenceRunner.of_plan(self.model, self.traced, plan, schedule)

    @property
    def steps(self) -> int:
        return len(self.recording["out"])

    def inputs(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.recording["x"][step], self.recording["t"][step], self.recording["y"]

    @torch.no_grad()
    def errors(self, run: Model) -> list[float]:
        """The relative error of every call, in order."""
        wanted = self.recording["out"]
        return [relative_error(run(*self.inputs(s)), wanted[s]) for s in range(self.steps)]


@pytest.fixture(scope="module")
def model() -> DiT:
    return cg.load_model(DATA / "dit_tiny.safetensors", arch="DiT(num_heads=4)")


@pytest.fixture(scope="module")
def traced(model: DiT) -> TracedModel:
    return trace(model, *model.example_inputs())


@pytest.fixture(scope="module", params=SCHEDULES)
def case(
    request: pytest.FixtureRequest,
    model: DiT,
    traced: TracedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "tiny.cgraph"
    return Case(request.param, model, traced, folder)


def test_reference_runner(case: Case) -> None:
    assert max(case.errors(case.reference())) <= LIMIT


@pytest.mark.parametrize(
    "backend", ["eager", "inductor", pytest.param("aoti", marks=pytest.mark.slow)]
)
def test_compiled_in_memory(case: Case, backend: str) -> None:
    assert max(case.errors(cg.load(case.artifact, backend=backend))) <= LIMIT


# Inductor takes half a minute for the same 28 blocks again; the test below takes two.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_loaded_from_a_folder(case: Case, backend: str) -> None:
    assert max(case.errors(cg.load(case.folder, backend=backend))) <= LIMIT


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_blocks_loaded_from_a_folder_through_inductor(name: str, tmp_path: Path) -> None:
    model, traced = shared_dit()
    folder = tmp_path / "two.cgraph"
    made = compile_traced(model, traced, SCHEDULES[name], backend="inductor", out=folder)
    run, plan = cg.load(folder), made.program.plan
    reference = cg.ReferenceRunner.of_plan(model, traced, plan, made.schedule)
    for call in dit_steps(plan.steps):
        assert relative_error(run(*call), reference(*call)) <= LIMIT


def test_a_wrong_rule_cannot_hide(case: Case) -> None:
    """The uncached model is far from the recording of a caching method at its cached steps."""
    errors = case.errors(case.model)
    rows = case.artifact.program.rows
    computed = [all(isinstance(action, Compute) for action in row) for row in rows]
    assert len(errors) == len(computed) == case.steps
    for error, full in zip(errors, computed, strict=True):
        assert error <= LIMIT if full else error > 100 * LIMIT
