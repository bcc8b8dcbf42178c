"""What published implementations of learned, corrected, forecasting and token methods computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cachegraph as cg
from cachegraph.compiler import pipeline
from cachegraph.compiler.compile import assemble, build
from cachegraph.model.trace import TracedModel, trace
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from tests.models import (
    compile_traced,
    dit_steps,
    one_thread,  # noqa: F401
    relative_error,
    shared_dit,
    tiny_pixart,
)

LIMIT = 1e-4  # relative L2 error of each call
GOC = {"method": "goc", "weight": 1.2, "steps": [3, 5, 7, 9]}
TABLE = {"method": "table", "reuse_steps": [1, 3, 5, 7, 9]}
ROUTER = {"method": "router", "file": "routers/DDIM20_router.pt", "threshold": 0.1}
TAYLOR = {"method": "taylorseer", "interval": 4, "order": 4, "warmup": 2}
SMOOTH = {"method": "smoothcache", "file": "smoothcache/50-N-3-threshold-0.18.json"}
TOCA = {"method": "toca", "interval": 3, "fresh_ratio": 0.07, "ratio_schedule": "ddim50"}
DUCA = {"method": "duca", "interval": 3, "fresh_ratio": 0.07, "score": "kv-norm"}
PIXART = {"method": "toca", "interval": 3, "fresh_ratio": 0.3, "rules": "pixart"}
# name -> steps, what else the schedule says, most variants
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "l2c_router_ddim20": (20, {"policy": ROUTER}, 11),
    "goc_fora_ddim20": (20, {"policy": TABLE, "correction": GOC}, 5),
    "taylorseer_dit_ddim50_n4_o4": (50, {"policy": TAYLOR}, 6),
    "smoothcache_dit_ddim50": (50, {"policy": SMOOTH}, 2),
    "toca_ddim50": (50, {"policy": TOCA}, 6),
    "duca_ddim50": (50, {"policy": DUCA}, 6),
    "pixart_toca_n3_r30": (20, {"policy": PIXART}, 8),
}
Model = Callable[..., Tensor]


Models = Callable[[str], tuple[nn.Module, TracedModel]]


class Case:
    """One recording, and the graphs for its schedule."""

    def __init__(self, name: str, model: nn.Module, traced: TracedModel, shared: Path) -> None:
        self.model = model
        steps, keys, self.variants = CASES[name]
        self.recording = load_file(shared / f"golden/{name}.safetensors")
        schedule = {"cachegraph": 1, "steps": steps, **keys}
        # Verifying 28 blocks takes most of the time; other tests do it on two.
        with current_folder(shared), mock.patch.object(pipeline, "verify"):
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
def models(shared: Path) -> Models:
    """A recording's model and its trace."""

    @cache
    def traced(family: str, recorded: str) -> tuple[nn.Module, TracedModel]:
        weights = shared / f"golden/{family.lower()}_tiny.safetensors"
        model = cg.load_model(weights, arch=f"{family}(num_heads=4)")
        recording = load_file(shared / f"golden/{recorded}.safetensors")
        return model, trace(model, (recording["x"][0], recording["t"][0], recording["y"]))

    def model_of(name: str) -> tuple[nn.Module, TracedModel]:
        return traced("PixArt", name) if "pixart" in name else traced("DiT", "goc_fora_ddim20")

    return model_of


# Rewriting 28 blocks of three sites, each with a token count of its own, takes half a minute.
PARAMS = [pytest.param(n, marks=[pytest.mark.slow] * ("pixart" in n)) for n in CASES]


@pytest.fixture(scope="module", params=PARAMS)
def case(request: pytest.FixtureRequest, models: Models, shared: Path) -> Case:
    return Case(request.param, *models(request.param), shared)


def test_eager(case: Case) -> None:
    assert max(case.errors(case.runner("eager"))) <= LIMIT


def test_reference_runner(case: Case) -> None:
    built = case.built
    reference = cg.ReferenceRunner.of_plan(case.model, built.traced, built.plan, built.schedule)
    assert max(case.errors(reference)) <= LIMIT


def test_reference_runner_of_pixart(models: Models, shared: Path) -> None:
    """The same without compiled graphs, which takes a few seconds only."""
    model, traced = models("pixart_toca_n3_r30")
    schedule = load_schedule({"cachegraph": 1, "steps": 20, "policy": PIXART})
    plan = plan_of(schedule, traced)
    run = cg.ReferenceRunner.of_plan(model, traced, plan, schedule)
    recording = load_file(shared / "golden/pixart_toca_n3_r30.safetensors")
    for x, t, wanted in zip(recording["x"], recording["t"], recording["out"], strict=True):
        assert relative_error(run(x, t, recording["y"]), wanted) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aoti"])
def test_compiled(case: Case, backend: str) -> None:
    assert max(case.errors(case.runner(backend))) <= LIMIT


def test_variants(case: Case) -> None:
    assert len(case.built.plan.variants) <= case.variants


def test_a_wrong_rule_cannot_hide(case: Case) -> None:
    """The uncached model is far from the recording wherever the recording differs from it."""
    plan = case.built.plan
    errors = case.errors(case.model)
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
        case "toca" | "duca":
            policy |= {"interval": 4, "fresh_ratio": 0.3, "quirks": False}
            policy["ratio_schedule"] = "linear"
    return {"cachegraph": 1, "steps": 8, "policy": policy, **correction}


@pytest.mark.parametrize("name", CASES)
def test_inductor_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    schedule, calls = shallow(name, tmp_path), dit_steps(8)
    model: nn.Module
    if "pixart" in name:
        text = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(0))
        calls = [(x, t, text) for x, t, _ in calls]
        model = tiny_pixart()
        traced = trace(model, calls[0])
    else:
        model, traced = shared_dit()
    made = compile_traced(model, traced, schedule, backend="inductor")
    run = cg.load(made)
    reference = cg.ReferenceRunner.of_plan(model, traced, made.program.plan, made.schedule)
    differs = []
    for call in calls:
        found, wanted = run(*call), reference(*call)
        assert relative_error(found, wanted) <= LIMIT
        with torch.no_grad():
            differs.append(relative_error(found, model(*call)) > LIMIT)
    assert sum(differs) >= 3
