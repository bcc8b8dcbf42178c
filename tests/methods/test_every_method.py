"""What holds for every method, whatever it does: each is run by the example that it gives."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachegraph as cg
from cachegraph.backends.named import named_graphs
from cachegraph.methods import METHODS
from cachegraph.methods.method import EXAMPLE_STEPS, Method
from cachegraph.model.trace import TracedModel, trace
from cachegraph.runtime.cuda_graph import plan_launches
from cachegraph.schedule.rows import plan_of
from cachegraph.schedule.schedule import load_schedule
from tests.models import compile_traced, dit_steps, example, play, tiny_dit

ROOT = Path(__file__).parents[2]


@cache
def traced() -> tuple[nn.Module, TracedModel]:
    model = tiny_dit()
    return model, trace(model, dit_steps(1)[0])


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name())
def method(request: pytest.FixtureRequest) -> type[Method]:
    found: type[Method] = request.param
    return found


@pytest.fixture(scope="module")
def keys(method: type[Method], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return example(method, tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def artifact(keys: dict[str, Any]) -> cg.Artifact:
    return compile_traced(*traced(), keys)


def test_the_example_survives_yaml(
    method: type[Method], keys: dict[str, Any], tmp_path: Path
) -> None:
    schedule = load_schedule(keys)
    assert type(schedule.policy) is method
    path = tmp_path / "again.yaml"
    path.write_text(schedule.to_yaml(), encoding="utf-8")
    again = load_schedule(path)
    assert again == schedule
    assert again.digest() == schedule.digest()
    assert list(again.policy.files()) == [key for key in method.file_keys if key in method.example]


def test_sites_that_are_not_ruled_are_computed(method: type[Method], keys: dict[str, Any]) -> None:
    whole = plan_of(load_schedule(keys), traced()[1])
    if method.skips_stack:
        return  # it takes no filter
    part = plan_of(load_schedule(keys | {"sites": {"kinds": ["mlp"]}}), traced()[1])
    for full, filtered in zip(whole.rows, part.rows, strict=True):
        names = [type(action).__name__ for action in filtered]
        assert names[0::2] == ["Compute"] * 2
        assert filtered[1::2] == full[1::2]


def test_graphs_against_the_reference(
    method: type[Method], keys: dict[str, Any], artifact: cg.Artifact
) -> None:
    model, found = traced()
    plan, calls = plan_of(load_schedule(keys), found), dit_steps(EXAMPLE_STEPS)
    assert len(artifact.graphs) == len(plan.variants)
    assert plan.full_steps() < EXAMPLE_STEPS or not method.example
    reference, run = cg.ReferenceRunner(model, keys), cg.load(artifact)
    for got, wanted in zip(play(run, calls), play(reference, calls), strict=True):
        assert torch.equal(got, wanted)


def test_names_and_launches(artifact: cg.Artifact) -> None:
    """All that goes in and out has a name of its own; every step has its launch."""
    for graph in named_graphs(artifact.program, artifact.graphs).values():
        inputs = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
        assert len(graph.inputs) == len(inputs)
        assert all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in (*graph.inputs, *graph.outputs))
    launches = plan_launches(artifact.program)
    assert len(launches) == EXAMPLE_STEPS
    assert len(artifact.graphs) <= len(set(launches)) <= EXAMPLE_STEPS


def test_readme_lists_the_methods(update_golden: bool) -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    line = f"Methods: {', '.join(f'`{name}`' for name in sorted(m.name() for m in METHODS))}."
    listed = re.search(r"^Methods: .*$", text, flags=re.MULTILINE)
    assert listed is not None
    if update_golden:
        path.write_text(text.replace(listed[0], line), encoding="utf-8")
    else:
        assert listed[0] == line, "write it with pytest --update-golden"


def test_the_format_explains_the_method(method: type[Method]) -> None:
    readme = (ROOT / "schedules" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^.*`{method.name()}` [a-z]", readme, flags=re.MULTILINE)
    assert f"method: {method.name()}" in readme


def test_methods_have_names_of_their_own() -> None:
    names = [method.name() for method in METHODS]
    assert len(set(names)) == len(names)


# --- the page that says how to add one


RUN = """
import torch

import cachegraph.methods as methods
from cachegraph.methods.{module} import {name}

methods.METHODS = (*methods.METHODS, {name})  # as the page says, before anything reads it
import cachegraph as cg
from cachegraph.plan.action import Forecast
from cachegraph.schedule.rows import plan_of
from cachegraph.model.trace import trace
from tests.models import dit_steps, play, tiny_dit

keys = {{"method": {name}.name(), **{name}.example}}
schedule = {{"cachegraph": 1, "steps": 7, "policy": keys}}
model, calls = tiny_dit(), dit_steps(7)
plan = plan_of(cg.load_schedule(schedule), trace(model, calls[0]))
assert sum(isinstance(row[0], Forecast) for row in plan.rows) >= 2, plan.rows
run = cg.load(cg.compile(model, schedule, calls[0], backend="eager"))
reference = cg.ReferenceRunner(model, schedule)
for got, wanted in zip(play(run, calls), play(reference, calls), strict=True):
    assert torch.equal(got, wanted)
print("agrees")
"""


def test_the_worked_example_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) <= 60
    [name] = re.findall(r"^class (\w+)\(Method\)", code, flags=re.MULTILINE)
    assert f"from .{name.lower()} import {name}" in page
    (tmp_path / f"{name.lower()}.py").write_text(code, encoding="utf-8")
    find = f"import cachegraph.methods; cachegraph.methods.__path__.append({str(tmp_path)!r})"
    code = find + RUN.format(module=name.lower(), name=name)
    done: Any = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "agrees\n", done.stderr
