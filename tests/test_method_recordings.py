"""What published implementations of learned, corrected and forecasting methods computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cachegraph as cg
from cachegraph.compiler import assemble, build
from cachegraph.runner import Runner
from cachegraph.trace import TracedModel, trace
from cachegraph.zoo import DiT
from tests.models import (
    dit_steps,
    one_thread,  # noqa: F401
    relative_error,
    tiny_dit,
)

LIMIT = 1e-4  # relative L2 error of each call
GOC = {"method": "goc", "weight": 1.2, "steps": [3, 5, 7, 9]}
TABLE = {"method": "table", "reuse_steps": [1, 3, 5, 7, 9]}
ROUTER = {"method": "router", "file": "routers/DDIM20_router.pt", "threshold": 0.1}
TAYLOR = {"method": "taylorseer", "interval": 4, "order": 4, "warmup": 2}
SMOOTH = {"method": "smoothcache", "file": "smoothcache/50-N-3-threshold-0.18.json"}
# name -> steps, what else the schedule says, most variants
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "l2c_router_ddim20": (20, {"policy": ROUTER}, 11),
    "goc_fora_ddim20": (20, {"policy": TABLE, "correction": GOC}, 5),
    "taylorseer_dit_ddim50_n4_o4": (50, {"policy": TAYLOR}, 6),
    "smoothcache_dit_ddim50": (50, {"policy": SMOOTH}, 2),
}
Model = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model(shared: Path) -> DiT:
    return cg.load_model(shared / "golden/dit_tiny.safetensors", arch="DiT(num_heads=4)")


class Case:
    """One recording, and the graphs for its schedule."""

    def __init__(self, name: str, model: DiT, traced: TracedModel, shared: Path) -> None:
        steps, keys, self.variants = CASES[name]
        self.recording = load_file(shared / f"golden/{name}.safetensors")
        schedule = {"cachegraph": 1, "steps": steps, **keys}
        with current_folder(shared):
            self.built = build(model, schedule, traced=traced)

    def runner(self, backend: str) -> Runner:
        return assemble(self.built, backend).runner()

    def inputs(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.recording["x"][step], self.recording["t"][step], self.recording["y"]

    @torch.no_grad()
    def errors(self, run: Model) -> list[float]:
        """The relative error of every call, in order."""
        wanted = self.recording["out"]
        return [relative_error(run(*self.inputs(s)), out) for s, out in enumerate(wanted)]


@contextmanager
def current_folder(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def traced(model: DiT, shared: Path) -> TracedModel:
    recording = load_file(shared / "golden/goc_fora_ddim20.safetensors")
    return trace(model, (recording["x"][0], recording["t"][0], recording["y"]))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, model: DiT, traced: TracedModel, shared: Path) -> Case:
    return Case(request.param, model, traced, shared)


def test_eager(case: Case) -> None:
    assert max(case.errors(case.runner("eager"))) <= LIMIT


def test_reference_runner(case: Case, model: DiT) -> None:
    built = case.built
    reference = cg.ReferenceRunner.of_plan(model, built.traced, built.plan, built.schedule)
    assert max(case.errors(reference)) <= LIMIT


@pytest.mark.slow
def test_inductor(case: Case) -> None:
    assert max(case.errors(case.runner("inductor"))) <= LIMIT


def test_variants(case: Case) -> None:
    assert len(case.built.plan.variants) <= case.variants


def test_a_wrong_rule_cannot_hide(case: Case, model: DiT) -> None:
    """The uncached model is far from the recording wherever the recording differs from it."""
    plan = case.built.plan
    errors = case.errors(model)
    full = [all(type(a).__name__ == "Compute" for a in row) for row in plan.rows]
    assert all(error <= LIMIT for error, one in zip(errors, full, strict=True) if one)
    others = [error for error, one in zip(errors, full, strict=True) if not one]
    assert min(others) > 50 * LIMIT
    assert len(others) >= 5


# --- inductor everywhere, on two blocks


def shallow(name: str, folder: Path) -> dict[str, Any]:
    """The schedule of a recording for a model of two blocks and 8 steps."""
    _, keys, _ = CASES[name]
    policy = dict(keys["policy"])
    correction = {"correction": GOC | {"steps": [3, 5, 7]}} if "correction" in keys else {}
    match policy["method"]:
        case "router":
            scores = {f"{i}.prob": torch.tensor([3.0, -3, -3, 3]) for i in range(8)}
            torch.save({"routers": scores}, folder / "r.pt")
            policy["file"] = str(folder / "r.pt")
        case "table":
            policy["reuse_steps"] = [1, 3, 5, 7]
        case "taylorseer":
            policy |= {"interval": 3, "order": 2}
        case "smoothcache":
            policy = {"method": "smoothcache", "lists": {"attn": [1, 0] * 4, "mlp-1": [1, 0] * 4}}
    return {"cachegraph": 1, "steps": 8, "policy": policy, **correction}


@pytest.mark.parametrize("name", CASES)
def test_inductor_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    model, schedule = tiny_dit(), shallow(name, tmp_path)
    calls = dit_steps(8)
    run = cg.load(cg.compile(model, schedule, calls[0], backend="inductor"))
    reference = cg.ReferenceRunner(model, schedule)
    differs = []
    for call in calls:
        found, wanted = run(*call), reference(*call)
        assert relative_error(found, wanted) <= LIMIT
        with torch.no_grad():
            differs.append(relative_error(found, model(*call)) > LIMIT)
    assert sum(differs) >= 3
