"""Several fixed sizes in one artifact: each runs as the artifact that has it alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import cachegraph as cg
from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.manifest import MANIFEST
from cachegraph.cli import app
from cachegraph.compiler import compile as compiler
from cachegraph.compiler.compile import compile_all
from cachegraph.errors import ArtifactError, InputError, TraceError, UnfinishedWarning
from cachegraph.model.trace import trace
from tests.models import fora, refused, relative_error, signed

W, STEPS = 32, 4
SIZES = (2, 3)
FORA = fora(STEPS, 3)


class Drawer(nn.Module):
    """Tokens ``(B, side * side, W)`` of a square image, whose side is a number.

    Positions are computed in Python, so that a trace has a table of them of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place, self.qkv, self.proj = nn.Linear(2, W), nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.mlp = nn.Sequential(nn.Linear(W, 4 * W), nn.GELU(), nn.Linear(4 * W, W))

    def forward(self, x: Tensor, t: Tensor, side: int, scale: float = 1.0) -> Tensor:
        places = [[math.sin(i // side), math.cos(i % side)] for i in range(side * side)]
        x = x + scale * self.place(torch.tensor(places)) + t.view(-1, 1, 1)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.mlp(x)


@cache
def drawer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Drawer().eval()


def factory() -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    return drawer(), (), call(0)


def call(step: int, side: int = SIZES[0], batch: int = 2) -> dict[str, Any]:
    x = torch.randn(batch, side * side, W, generator=torch.Generator().manual_seed(step))
    return {"x": x, "t": torch.full((batch,), 9.0 - step), "side": side}


def draw(run: Callable[..., Any], side: int) -> list[Tensor]:
    return [run(**call(step, side)) for step in range(STEPS)]


def larger() -> dict[str, Any]:
    """What differs from the first size."""
    given = call(0, SIZES[1])
    return {"x": given["x"], "side": given["side"]}


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    at = tmp_path_factory.mktemp("alone")
    for side in SIZES:
        cg.compile(drawer(), FORA, kwargs=call(0, side), backend="eager", out=at / f"{side}")
    return {side: at / f"{side}" for side in SIZES}


@pytest.fixture(scope="module")
def made() -> cg.Artifact:
    return cg.compile(drawer(), FORA, kwargs=call(0), also=[larger()], backend="eager")


@pytest.fixture(scope="module")
def both(made: cg.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("forms") / "both.cgraph")


def test_each_size_is_its_own_artifact_bit_for_bit(both: Path, singles: dict[int, Path]) -> None:
    run = cg.load(both)
    for side in (*SIZES, *SIZES):
        alone = draw(cg.load(singles[side]), side)
        assert all(map(torch.equal, draw(run, side), alone)), side
        assert all(map(torch.equal, draw(run.session(), side), alone)), side
    wanted = draw(drawer(), SIZES[1])[0]
    assert relative_error(draw(run, SIZES[1])[0], wanted) <= 1e-6  # the first step is computed


def test_in_memory_sizes_are_as_saved(made: cg.Artifact, both: Path) -> None:
    assert "2 forms" in repr(made)
    for side in SIZES:
        saved = draw(cg.load(both), side)
        assert max(map(relative_error, draw(made.runner(), side), saved)) <= 1e-6


def test_weights_are_there_once(both: Path, singles: dict[int, Path]) -> None:
    """What is added is the graphs of the other size; tables of one name do not mix."""

    def written(folder: Path, *without: str) -> int:
        files = (file for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files if file.name not in without)

    (weights,) = both.rglob("*.safetensors")
    alone = max((path / weights.name).stat().st_size for path in singles.values())
    assert weights.stat().st_size <= 1.05 * alone
    graphs = sum(written(path, weights.name) for path in singles.values())
    assert written(both) <= 1.05 * (alone + graphs)
    found = load_artifact(both)
    assert all(form.weights is not None for form in found.forms)
    tables = [name for name, w in found.weights.items() if w.shape[-1:] == (2,) and w.shape[0] < W]
    assert sorted(found.weights[name].shape[0] for name in tables) == [4, 9]


def test_sessions_of_two_sizes_interleave(both: Path, singles: dict[int, Path]) -> None:
    run = cg.load(both)
    sessions = {side: run.session() for side in SIZES}
    wanted = {side: draw(cg.load(singles[side]), side) for side in SIZES}
    for step in range(STEPS):
        for side, session in sessions.items():
            assert torch.equal(session(**call(step, side)), wanted[side][step])


def test_branches_have_forms_of_their_own(both: Path, singles: dict[int, Path]) -> None:
    session = cg.load(both, track="count").session()
    wanted = {side: draw(cg.load(singles[side]), side) for side in SIZES}
    for step in range(STEPS):
        for side in SIZES:
            with session.cache_context(f"branch{side}"):
                assert torch.equal(session(**call(step, side)), wanted[side][step])


def test_another_size_in_mid_image_is_refused_or_begins_anew(
    both: Path, singles: dict[int, Path]
) -> None:
    run = cg.load(both)
    run(**call(0))
    run(**call(1))
    refused(
        lambda: run(**call(2, 3)),
        "step 2: a call has another form in the middle of a trajectory",
        "expected x f32[batch, 4, 32], side 2; found x f32[batch, 9, 32], side 3",
    )
    run(**call(2))  # the image goes on
    with pytest.warns(UnfinishedWarning):
        first = run(**call(0, 3))
    alone = draw(cg.load(singles[3]), 3)
    found = [first, *(run(**call(step, 3)) for step in range(1, STEPS))]
    assert all(map(torch.equal, found, alone))


def test_calls_of_one_size_may_differ_in_a_constant() -> None:
    given = {"kwargs": call(0), "also": [{"scale": 3.0}], "backend": "eager"}
    run = cg.compile(drawer(), FORA, **given).runner()
    for scale in (1.0, 3.0):
        found = [run(**call(step), scale=scale) for step in range(STEPS)]
        assert relative_error(found[0], drawer()(**call(0), scale=scale)) <= 1e-6
    run(**call(0), scale=1.0)
    refused(lambda: run(**call(1), scale=3.0), "step 1: a call has", "expected scale 1.0; found")


def test_a_size_that_is_not_there_is_refused_with_those_that_are(both: Path) -> None:
    run = cg.load(both)
    refused(
        lambda: run(**call(0, 4)),
        "the call has none of the sizes that the loop was compiled for; "
        "expected x f32[batch, 4, 32], side 2 or x f32[batch, 9, 32], side 3; "
        "found x f32[2, 16, 32], side 4; compile it with example inputs of these sizes, too: "
        "also=[...] (--also)",
    )
    refused(lambda: run(**call(0) | {"side": 3}), "found x f32[2, 4, 32], side 3")
    refused(lambda: run(**call(0) | {"t": torch.ones(2, dtype=torch.int32)}), "another dtype")
    refused(lambda: run(**call(0) | {"t": torch.ones(2, 1)}), "2 dimensions instead of 1")
    refused(lambda: run(**call(0), step=1), "step 1 is the first call")
    refused(lambda: run(**call(0), width=3), "unknown argument 'width'")


def test_values_of_one_size_are_given_back_when_another_begins(
    both: Path, singles: dict[int, Path]
) -> None:
    one, alone = cg.load(both).session(), cg.load(singles[3]).session()
    for side in SIZES:
        draw(one, side)
    draw(alone, 3)
    assert one.known_bytes() == alone.known_bytes() > 0
    assert one.cache_bytes() == alone.cache_bytes()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aoti", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.onnx),
    ],
)
def test_every_backend_takes_both(made: cg.Artifact, backend: str, tmp_path: Path) -> None:
    other = replace(made, backend=backend, compiled={}).save(tmp_path / "forms.cgraph")
    for artifact in (other, load_artifact(other)):
        for side in SIZES:
            errors = map(relative_error, draw(cg.load(artifact), side), draw(made.runner(), side))
            assert max(errors) <= 1e-5


def test_plans_of_several_sizes(singles: dict[int, Path], tmp_path: Path) -> None:
    plans = {"fast": cg.load_schedule(FORA), "good": cg.load_schedule(fora(STEPS, 2))}
    made = compile_all(drawer(), plans, [((), call(0)), ((), larger())], "eager")
    run = cg.load(made.save(tmp_path / "plans.cgraph"))
    good = cg.compile(drawer(), fora(STEPS, 2), kwargs=call(0, 3), backend="eager")
    wanted = {"fast": singles[3], "good": good.save(tmp_path / "good.cgraph")}
    for name, alone in wanted.items():
        session = run.session(plan=name)
        draw(session, 2)
        assert all(map(torch.equal, draw(session, 3), draw(cg.load(alone), 3))), name
    one = load_artifact(tmp_path / "plans.cgraph").plan("good")
    assert [len(form.graphs) for form in (one, *one.forms)] == [2, 2]


def test_calls_that_are_no_other_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trace(drawer(), (), call(0))

    def once(*args: Any, **options: Any) -> Any:
        return first if args[2]["side"] == SIZES[0] and len(args[2]) == 3 else trace(*args)

    monkeypatch.setattr(compiler, "trace", once)

    def compile(*also: dict[str, Any]) -> Any:
        return cg.compile(drawer(), FORA, kwargs=call(0), also=also, backend="eager")

    with pytest.raises(InputError, match=r"also\[0\]: two calls have one form"):
        compile({"x": call(0, batch=5)["x"], "t": torch.zeros(5)})
    with pytest.raises(InputError, match=r"also\[1\]: two calls have one form"):
        compile(larger(), larger())
    with pytest.raises(TraceError, match="unexpected keyword argument 'wide'"):
        compile({"wide": 3})


# --- damaged


def other_plans(forms: list[Any]) -> None:
    forms[1]["program"]["timesteps"] = [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda forms: forms.clear(), "there is no form of call"),
        (other_plans, "the forms of call are of different plans"),
        (lambda forms: forms[1]["plans"].update(a=1), "wrong: forms"),
        (lambda forms: forms[1]["program"].pop("rows"), "wrong: forms"),
        (lambda forms: forms[1]["program"]["steps"].pop(), "the forms of call are of different"),
        (lambda forms: forms[1]["program"]["rows"].pop(), "the plan has not one row a step"),
        (lambda forms: forms[1].update(forms[0]), "takes other inputs than its interface says"),
        (lambda forms: forms.append(forms[1]), r"has no file forms/2/graphs/variant0\.json"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(
    both: Path, tmp_path: Path, edit: Callable[[list[Any]], None], message: str
) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "a.cgraph"))
    signed(folder, lambda manifest: edit(manifest["forms"]))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(folder)


def test_a_changed_graph_of_another_size_is_refused(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "a.cgraph"))
    graph = folder / "forms/1/graphs/variant1.json"
    graph.write_text(graph.read_text().replace("add", "sub"))
    with pytest.raises(ArtifactError, match=r"damaged.*|variant1"):
        load_artifact(folder)
    graph.unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        load_artifact(folder)


def test_artifacts_of_the_last_format_are_to_be_compiled_again(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "a.cgraph"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"cachegraph": 5}))
    with pytest.raises(ArtifactError, match="found format 5; compile it again"):
        load_artifact(folder)


# --- commands


def words(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_commands_see_both(tmp_path: Path, singles: dict[int, Path]) -> None:
    schedule, out = tmp_path / "fora.yaml", tmp_path / "both.cgraph"
    schedule.write_text(cg.load_schedule(FORA).to_yaml())
    model = f"{__name__}:factory"
    command = ["compile", model, "-s", str(schedule), "--backend", "eager", "-o", str(out)]
    sizes = "x f32[batch, 4, 32], side 2", "x f32[batch, 9, 32], side 3"
    made = words(*command, "--also", "x=2,9,32:f32 side=3")
    assert all(f"factory, fora: {size}" in made for size in sizes)
    run = cg.load(out)
    for side in SIZES:
        assert all(map(torch.equal, draw(run, side), draw(cg.load(singles[side]), side)))
    whole = words("verify", str(out), "--integrity", "--model", model)
    assert all(f": {size}: whole: 4 steps, 2 variants" in whole for size in sizes)
    assert f"{2 * STEPS} calls" in whole
    seen = words("inspect", str(out))
    assert all(f"backend eager: {size}" in seen for size in sizes)
    assert "x f32[batch, 4" not in words("inspect", str(out), "--part", "2")
    assert ", 9, 32]" in words("inspect", str(out), "--part=2", "--variant=variant0")
    exported = CliRunner().invoke(app, ["export", str(out), "-o", str(tmp_path / "onnx")])
    assert exported.exit_code == 2
    assert "calls of several sizes" in exported.output


def test_commands_refuse_what_is_no_other_size(tmp_path: Path) -> None:
    out = ["--backend", "eager", "-o", str(tmp_path / "a.cgraph")]
    compile = ["compile", f"{__name__}:factory", "-s", "fora-n3", *out]
    for also, message in (
        ("x=2,9,32:f32 side", "--also side: not an input"),
        ("x=2,9:f32 x=2,9:f32", "--also x=2,9:f32: input 'x' is given twice"),
        ("hight=3", "--also hight=3: unknown input 'hight'"),
    ):
        done = CliRunner().invoke(app, [*compile, "--also", also], env={"COLUMNS": "200"})
        assert done.exit_code == 2
        assert message in done.output
