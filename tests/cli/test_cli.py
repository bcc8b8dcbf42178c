"""The command line: every command once, and what it says to wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from cachegraph import cli, load
from cachegraph.compiler.sources import FORMS
from cachegraph.zoo import build_model

TINY = "DiT(hidden_size=32, depth=2, num_heads=4)"
SHALLOW = "DiT(hidden_size=32, depth=1, num_heads=4)"
STEPS = "cachegraph: 1\nsteps: 6\n"
ROWS = "policy: {method: table, rows: [compute, [1, 0, 0, 0], reuse, [0, 1, 1, 1], reuse, compute]}"
FACTORY = f"""
import torch
from cachegraph.zoo import build_model

def other():
    return build_model({TINY!r}, input_size=8, seed=1)

def shallow():
    return build_model({SHALLOW!r}, input_size=8)

def wider():
    return build_model({TINY!r}, input_size=16)

def number():
    return 3

def broken():
    raise RuntimeError("no luck\\nmore about it")

def interrupted():
    raise KeyboardInterrupt
"""


def run(*args: str, columns: int = 80) -> Result:
    """Runs a command line in this process."""
    env = {"COLUMNS": str(columns), "TERM": "dumb"}
    return CliRunner().invoke(cli.app, args, env=env, prog_name="cachegraph")


def printed(*args: str) -> str:
    """What a command that works writes to stdout; it writes nothing to stderr."""
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, schedules and a compiled artifact."""
    folder = tmp_path_factory.mktemp("cli")
    model = build_model(TINY, input_size=8)
    save_file(model.state_dict(), folder / "tiny.safetensors", {"num_heads": "4"})
    save_file({"a": torch.zeros(1)}, folder / "odd.safetensors")
    torch.save(model, folder / "pickled.pt")
    texts = {
        "rows.yaml": STEPS + ROWS,
        "full.yaml": STEPS + "policy: {method: full}",
        "glob.yaml": STEPS + "policy: {method: full}\nsites: {include: ['block.*']}",
        "cli_factory.py": FACTORY,
        "damaged.pt2": "PK but no archive",
        "empty/file": "",
        "pipeline/model_index.json": "{}",
        "half.cgraph/weights.safetensors": "",
    }
    for name, text in texts.items():
        folder.joinpath(name).parent.mkdir(exist_ok=True)
        folder.joinpath(name).write_text(text)
    with chdir(folder):
        said = printed("compile", "tiny.safetensors", "-s", "rows.yaml", "--backend", "eager")
    folder.joinpath("said.txt").write_text(said)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


# --- commands that work -----------------------------------------------------------------------

SUMMARY = """\
steps     6, 2 of them full
sites     4
FLOPs     6.17 M of 11.4 M uncached, batch 2
speed-up  at most 1.84x, going by FLOPs
cache     at most 16.0 KiB, first after step 1
history   attn 1, mlp 1: the most values kept of a site
liveness  saves 8.00 KiB of 16.0 KiB on average, 0 B of 16.0 KiB at the peak
prologue  at most 7.00 KiB known before a step runs
weights   326 KiB, shared by 4 variants
peak      about 372 KiB, weights included, compiled
"""
PICTURE = """
                   0
blocks.0.attn   1  CCRRRC
blocks.0-1.mlp  2  CRRCRC
blocks.1.attn   1  CRRCRC

C compute   R reuse

variant   calls  steps  attn     mlp  FLOPs a call  of full
variant0      2  0 5    2 C      2 C        1.90 M   100.0%
variant1      1  1      1 C 1 R  2 R         496 k    26.1%
variant2      2  2 4    2 R      2 R         160 k     8.4%
variant3      1  3      1 C 1 R  2 C        1.56 M    82.3%
"""


def test_compile_writes_an_artifact_that_runs(here: Path) -> None:
    head, _, last = here.joinpath("said.txt").read_text().rpartition("artifact  ")
    assert head == "tiny, rows\n\n" + SUMMARY
    assert last.startswith("tiny-rows.cgraph, ")
    assert last.endswith(", backend eager\n")
    runner, model = load("tiny-rows.cgraph"), build_model(TINY, input_size=8)
    args, _ = model.example_inputs()
    assert torch.equal(runner(*args, step=0), model(*args))


def test_compile_for_inductor_runs_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def fake(module: torch.nn.Module, **_options: object) -> Callable[..., object]:
        return lambda *tensors: called.append((id(module), torch.is_grad_enabled()))

    monkeypatch.setattr(torch, "compile", fake)
    said = printed("compile", "tiny.safetensors", "-s", "rows.yaml", "-o", "warm.cgraph")
    assert said.endswith("backend inductor\n")
    assert len(set(called)) == len(called) == 4  # the graphs of an artifact that was read again
    assert not any(grad for _, grad in called)


def test_plan_needs_no_weights() -> None:
    said = printed("plan", TINY, "-s", "rows.yaml", "--input-size", "8")
    assert said == f"{TINY}, rows\n\n{SUMMARY}{PICTURE}"


def test_plan_as_json_for_another_batch() -> None:
    options = ("--input-size", "8", "--json", "--batch", "8")
    found = json.loads(printed("plan", TINY, "-s", "rows.yaml", *options))
    assert (found["model"], found["schedule"], found["steps"]) == (TINY, "rows", 6)
    assert found["rows"] == ["CCCC", "CRRR", "RRRR", "RCCC", "RRRR", "CCCC"]
    [symbol] = found["sizes"]
    assert found["sizes"] == {symbol: 8}
    first = {"name": "blocks.0.attn", "kind": "attn", "values": [f"f32[{symbol}, 16, 32]"]}
    assert found["sites"][0] == first | {"module": "blocks.0.attn"}
    flops = found["flops"]
    assert [one["steps"] for one in found["variants"]] == [[0, 5], [1], [2, 4], [3]]
    assert found["variants"][1]["flops"] == flops[1]
    assert found["total_flops"] == sum(flops)
    assert f"{found['total_flops'] / 4e6:.2f} M" in SUMMARY
    assert found["uncached_flops"] == 6 * flops[0]
    assert found["unfreed_cache_bytes"] == [found["peak_cache_bytes"]] * 6
    assert found["history_depths"] == [1, 1, 1, 1]
    assert found["peak_cache_bytes"] == 4 * 8 * 16 * 32 * 4  # sites, batch, tokens, width, float32


def test_inspect_an_artifact(here: Path) -> None:
    said = printed("inspect", "tiny-rows.cgraph")
    assert said == f"tiny-rows.cgraph, backend eager\n\n{SUMMARY}{PICTURE}"
    text = printed("inspect", "tiny-rows.cgraph", "--variant", "variant2")
    assert text == here.joinpath("tiny-rows.cgraph/graphs/variant2.txt").read_text()
    changed = printed("inspect", "tiny-rows.cgraph", "--diff", "variant1", "variant2")
    assert changed.startswith("--- variant1\n+++ variant2\n@@")
    assert "\n+slot slot_blocks_0_attn_0  f32[" in changed
    said = printed("inspect", "tiny-rows.cgraph", "--dot", "g.dot", "--variant", "variant2")
    assert said == "g.dot: variant2 in DOT\n"
    drawn = here.joinpath("g.dot").read_text()
    assert drawn.startswith('digraph "variant2" {')
    assert drawn.count("fillcolor=lightblue") == 4  # one a slot
    sites = printed("inspect", "tiny-rows.cgraph", "--sites").splitlines()
    assert sites[0].split() == ["site", "kind", "values", "module"]
    assert [line.split()[:2] for line in sites[3:]] == [
        ["blocks.1.attn", "attn"],
        ["blocks.1.mlp", "mlp"],
    ]


def test_inspect_a_model_tells_what_passes_did() -> None:
    said = printed("inspect", "tiny.safetensors", "-s", "rows.yaml")
    assert said.startswith(f"tiny, rows\n\n{SUMMARY}{PICTURE}\nvariant   pass ")
    lines = [
        line.split() for line in said.removeprefix(f"tiny, rows\n\n{SUMMARY}{PICTURE}").split("\n")
    ]
    assert lines[1] == ["variant", "pass", "rewrites", "nodes", "ms"]
    assert lines[2][:2] == ["variant0", "insert-cache"]
    assert sum(line[:1] == ["variant2"] for line in lines) == 1  # named once, not in every line


def test_verify_tells_a_right_artifact_from_a_wrong_one() -> None:
    said = printed("verify", "tiny-rows.cgraph", "--model", "tiny.safetensors").splitlines()
    assert said[0] == "tiny-rows.cgraph against tiny: 6 calls, seed 0"
    assert said[-1].startswith("largest relative L2 error ")
    assert said[-1].endswith(", tolerance 0.0001")
    found = run("verify", "tiny-rows.cgraph", "--model", "cli_factory:other", "--calls", "2")
    assert found.exit_code == 1
    worst = found.stdout.splitlines()[3].split()
    assert found.stdout.startswith("tiny-rows.cgraph against other: 2 calls, seed 0\n\n")
    assert found.stderr == (
        "error: tiny-rows.cgraph: the artifact differs from the reference; expected a relative "
        f"error of at most 0.0001 at every call; found {worst[2]} at step {worst[0]}\n"
    )


def test_exported_program_is_compiled_and_verified() -> None:
    model = build_model(SHALLOW, input_size=8)
    args, _ = model.example_inputs()
    torch.export.save(torch.export.export(model, args), "exported.pt2")
    said = printed("compile", "exported.pt2", "-s", "full.yaml", "--backend", "eager")
    assert "uncached, batch fixed at 2\n" in said
    said = printed("inspect", "exported-full.cgraph", "--sites")
    assert [line.split()[0] for line in said.splitlines()] == [
        "site",
        "blocks.0.attn",
        "blocks.0.mlp",
    ]
    printed("verify", "exported-full.cgraph", "--model", "exported.pt2", "--calls", "1")


def test_sample_writes_a_grid(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    small = "DiT(hidden_size=16, depth=1, num_heads=2, in_channels=1, num_classes=10)"
    model = build_model(small, input_size=16)
    monkeypatch.setattr(model.final_layer, "linear", torch.nn.Linear(16, 4))  # no variance
    model.requires_grad_(False).out_channels = 1
    monkeypatch.setattr("cachegraph.zoo.load_model", lambda name: {"digits": model}[name])
    said = printed("sample", "digits", "-s", "full.yaml", "-o", "new/d.png", "--classes", "7,0-9,7")
    assert said == "new/d.png: 12 images, 6 steps, guidance 2, seed 0\n"
    with image.open(here / "new/d.png") as drawn:
        assert (drawn.size, drawn.mode) == ((10 * 18 * 4, 2 * 18 * 4), "L")
        assert drawn.getpixel((0, 0)) == 0  # the border
        assert len(drawn.getcolors()) > 20


# --- wrong command lines ----------------------------------------------------------------------

FORM = "NAME=SHAPE:DTYPE, such as x=2,4,32,32:f32; or NAME=VALUE for a constant in JSON, such as"
SITES = "blocks.0.attn (attn), blocks.0.mlp (mlp), blocks.1.attn (attn)"
ELSEWHERE = (
    "sample others with --num N -o samples.npz, or in their own sampler: "
    "run = cachegraph.load('NAME.cgraph') and call run(...) as the model"
)
PLAN = "plan tiny.safetensors -s rows.yaml"
VERIFY = "verify tiny-rows.cgraph --model"
WRONG = {
    "plan digits -s fora-n33": "unknown preset 'fora-n33'; expected the path of a file or a preset "
    "such as fora-n3, fora-n2, fora-n5, fora-n2-30; did you mean 'fora-n3'?",
    "plan tiny.safetensors -s glob.yaml": "glob.yaml:4: glob 'block.*' matches no site; expected 4 "
    f"sites: {SITES}, blocks.1.mlp (mlp); did you mean 'blocks.0.mlp'?",
    "compile digits -s fora-n3 --backend eagr": "unknown backend 'eagr'; expected eager, "
    "inductor, aoti, onnx, tensorrt; did you mean 'eager'?",
    "compile none.pt -s rows.yaml": "none.pt: there is no such weights file",
    "compile pickled.pt -s rows.yaml": "pickled.pt: the file holds pickled Python objects, which "
    "can run code when they are read; expected a state dict: names and tensors; found the class "
    "cachegraph.zoo.dit.DiT; where you trust the file, load it with the code that wrote it and "
    "save only its weights: torch.save(model.state_dict(), 'weights.pt')",
    "compile odd.safetensors -s rows.yaml": "odd.safetensors: these weights are of no known "
    "architecture; expected DiT or PixArt or FLUX or STDiT3; found 1 tensors: a; compile other "
    "models as a torch.export program (.pt2) or as module:factory",
    "plan digit -s fora-n3": f"there is no model 'digit'; expected {FORMS}; for plan, inspect "
    "and bench also an architecture, such as DiT-S/2; did you mean 'digits'?",
    "compile DiT-S/2 -s fora-n3": f"'DiT-S/2' is an architecture, without weights; expected {FORMS}"
    "; only plan, inspect and bench do without",
    f"{PLAN} --input x": f"--input x: not an input; expected {FORM} height=32",
    f"{PLAN} --input x=2,,4:f32": "--input x=2,,4:f32: the shape cannot be read; expected whole "
    "numbers above 0, such as 2,4,32,32; found 2,,4",
    f"{PLAN} --input x=2:f23": "--input x=2:f23: unknown dtype 'f23'; expected one of u8, i8, i16, "
    "i32, i64, f16, f32, f64, c64, c128, b8, bf16, or torch's names of these; did you mean 'f32'?",
    f"{PLAN} --input z=2:f32": "tiny.safetensors: unknown input 'z'; expected one of x, t, y",
    f"{PLAN} --input x=2:f32 --input x=3:f32": "--input x=3:f32: input 'x' is given twice",
    "compile cli_factory:broken -s rows.yaml -o empty": "empty: the output exists and is no "
    "artifact; choose another path or remove it",
    "compile damaged.pt2 -s rows.yaml": "damaged.pt2: not a readable torch.export program; found "
    "BadZipFile: File is not a zip file",
    "compile none.pt2 -s rows.yaml": "none.pt2: there is no such file",
    "compile none:make -s rows.yaml": "none:make: module 'none' cannot be imported; found No "
    "module named 'none'",
    "compile cli_factory:othr -s rows.yaml": "cli_factory:othr: module 'cli_factory' has no "
    "'othr'; did you mean 'other'?",
    "compile cli_factory:number -s rows.yaml": "cli_factory:number: the factory returns no model; "
    "expected a torch module, (module, args) or (module, args, kwargs); found int",
    "compile pipeline -s rows.yaml": "pipeline: a diffusers pipeline instead of a model; give the "
    "model in it, such as pipeline/transformer",
    "inspect tiny.safetensors": "tiny.safetensors: a model needs --schedule, or give an artifact; "
    "only --sites does without",
    "inspect tiny-rows.cgraph --variant variant4": "unknown variant 'variant4'; expected variant0 "
    "to variant3; did you mean 'variant3'?",
    "inspect tiny-rows.cgraph --sites --variant variant0": "--variant with --dot, --diff, "
    "--sites, --tokens and --html exclude each other",
    "inspect half.cgraph": "half.cgraph: not an artifact, or one whose writing was interrupted; "
    "expected a manifest.json in it; compile it again",
    f"{VERIFY} tiny.safetensors --calls 7": "--calls: no such number of calls; expected 1 to 6, or "
    "all; found 7",
    f"{VERIFY} cli_factory:shallow": f"the artifact was compiled from another model; expected 4 "
    f"sites: {SITES}, blocks.1.mlp (mlp); found 2 sites: blocks.0.attn (attn), blocks.0.mlp (mlp)",
    "sample tiny.safetensors -s rows.yaml -o d.png": "tiny.safetensors: only digits are "
    f"drawn as a picture; {ELSEWHERE}",
    "sample tiny-rows.cgraph -o d.png": f"tiny-rows.cgraph: not an artifact of digits; {ELSEWHERE}",
    "sample digits -s rows.yaml -o d.png --num 3": "d.png: many images are written as .npz; "
    "expected FILE.npz",
    "sample digits -s rows.yaml -o d.jpg": "d.jpg: images are written as PNG; expected a name in "
    ".png",
    "sample digits -s rows.yaml -o d.png --classes a": "--classes: cannot read 'a'; expected "
    "numbers and ranges, such as 0-9 or 3,7",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_explained(line: str) -> None:
    found = run(*line.split())
    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"error: {WRONG[line]}\n")


def test_another_model_is_told_by_its_inputs() -> None:
    found = run(*VERIFY.split(), "cli_factory:wider")
    assert found.exit_code == 2
    said = "error: the model cannot be called as the one that the artifact was compiled from; "
    assert found.stderr.startswith(said + "expected (x: f32[")
    assert "found ModelError: input of DiT custom has the wrong shape" in found.stderr


def test_bugs_end_with_a_hint_and_not_with_a_traceback() -> None:
    line = ["compile", "cli_factory:broken", "-s", "rows.yaml"]
    found = run(*line)
    short = "error: RuntimeError: no luck\nadd --debug to see where it happened\n"
    assert (found.exit_code, found.stderr) == (1, short)
    for place in (0, 1, len(line)):
        found = run(*line[:place], "--debug", *line[place:])
        assert found.exit_code == 1
        assert found.stderr.startswith("Traceback (most recent call last):\n")
        assert 'cli_factory.py", line ' in found.stderr
        assert found.stderr.endswith(short)


def test_interrupt() -> None:
    found = run("compile", "cli_factory:interrupted", "-s", "rows.yaml")
    assert (found.exit_code, found.stderr) == (130, "interrupted\n")


def test_usage_errors_are_typer_s() -> None:
    for line in (["plan"], ["plan", TINY, "--bogus"], ["plann"], ["plan", TINY, "--batch", "0"]):
        found = run(*line)
        assert found.exit_code == 2
        assert "Usage: cachegraph" in found.stderr


def test_missing_pillow_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    found = run("sample", "digits", "-s", "rows.yaml", "-o", "d.png")
    said = "error: writing images needs pillow; pip install 'cachegraph[eval]'\n"
    assert (found.exit_code, found.stderr) == (2, said)


# --- help and start ---------------------------------------------------------------------------


def test_every_help_page_has_examples() -> None:
    pages = {str(one.name): run(str(one.name), "--help") for one in cli.app.registered_commands}
    assert len(pages) >= 7
    for name, page in pages.items():
        assert page.exit_code == 0
        assert f"\n cachegraph {name} " in page.stdout.partition("Examples")[2]
    assert run("--version").stdout == f"cachegraph {version('cachegraph')}\n"


def test_module_is_the_command() -> None:
    words = [sys.executable, "-m", "cachegraph", "inspect", "none.cgraph"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    said = "error: none.cgraph: no such artifact\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", said)


def test_help_needs_no_torch() -> None:
    """Everything that the help pages import; the package itself is left out."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('cachegraph')\n"
        "package.__path__ = importlib.util.find_spec('cachegraph').submodule_search_locations\n"
        "sys.modules['cachegraph'] = package\n"
        "from cachegraph.cli import app\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
