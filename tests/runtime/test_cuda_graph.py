"""CUDA graphs, with a stand-in that records on the CPU: addresses stay, contents change."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachegraph as cg
from cachegraph.errors import BackendError, InputError
from cachegraph.graph.interface import Interface, Port, Role
from cachegraph.runtime import cuda_graph
from cachegraph.runtime.cuda_graph import Recorder, plan_launches
from cachegraph.runtime.known import Prologues
from cachegraph.runtime.program import Made, Step, VariantLayout
from cachegraph.spec import TensorSpec
from tests.models import (
    Call,
    compile_traced,
    dit_steps,
    one_thread,  # noqa: F401
    play,
    relative_error,
    shared_dit,
    tiny_pixart,
)
from tests.runtime.test_sessions import FailsAt

STEPS = 13
SPEC = TensorSpec((2, 4), torch.float32)
POLICIES: dict[str, dict[str, Any]] = {
    "fora": {"policy": {"method": "fora", "interval": 3}},
    "taylorseer": {"policy": {"method": "taylorseer", "interval": 3, "order": 2, "warmup": 2}},
    "goc": {
        "policy": {"method": "fora", "interval": 3},
        "correction": {"method": "goc", "weight": 1.2, "steps": [4, 5, 7, 8]},
    },
    "toca": {"policy": {"method": "toca", "interval": 4, "fresh_ratio": 0.3, "quirks": False}},
    "duca": {"policy": {"method": "duca", "interval": 4, "fresh_ratio": 0.3, "quirks": False}},
}
SCHEDULES = {name: {"cachegraph": 1, "steps": STEPS} | more for name, more in POLICIES.items()}


class StandIn(Recorder):
    """Records by calling, replays by calling again: with what lies at the same addresses then."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return body


class CannotRecord(StandIn):
    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@cache
def artifact(name: str) -> cg.Artifact:
    return compile_traced(*shared_dit(), SCHEDULES[name])


def recording(
    compiled: cg.Artifact,
    recorder: Callable[[], Recorder] = StandIn,
    functions: Sequence[Any] = (),
) -> cg.Runner:
    before = Prologues.of(compiled.program, compiled.prologues, batched=False)
    graphs = functions or compiled.functions()
    return cg.Runner(
        compiled.program, graphs, compiled.weights, prologues=before, recorder=recorder
    )


def image(seed: int, batch: int = 2) -> list[Call]:
    return dit_steps(STEPS, batch=batch, seed=seed)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Bit by bit; all are compared at the end, when a buffer given away would have changed."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- the same images


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:a new trajectory begins")
def test_images_one_after_another(name: str) -> None:
    plain, run = cg.load(artifact(name)), recording(artifact(name))
    found = play(run, image(1)) + play(run, image(2)[:8])  # the second one is aborted
    wanted = play(plain, image(1)) + play(plain, image(2)[:8])
    for seed, batch in ((3, 2), (4, 3), (5, 1), (6, 2)):
        found += play(run, image(seed, batch))
        wanted += play(plain, image(seed, batch))
    assert same(found, wanted)


@pytest.mark.parametrize("name", SCHEDULES)
def test_branches_and_interleaved_sessions(name: str) -> None:
    plain, run = cg.load(artifact(name)), recording(artifact(name))
    runs = [(plain.session(), run.session()) for _ in range(2)]
    found, wanted = [], []
    calls = [image(1), image(2), image(3, batch=3), image(4, batch=3)]
    for step in range(STEPS):
        for i, ones in enumerate(calls):
            slow, fast = runs[i // 2]
            branch = ("cond", "uncond")[i % 2]
            with slow.cache_context(branch), fast.cache_context(branch):
                found.append(fast(*ones[step]))
                wanted.append(slow(*ones[step]))
    assert same(found, wanted)


def test_sessions_in_threads() -> None:
    run, together = recording(artifact("toca")), threading.Barrier(2)

    def sample(thread: int) -> list[Tensor]:
        session, found = run.session(), list[Tensor]()
        for number in range(3):
            together.wait(timeout=60)
            found += play(session, image(10 * thread + number))
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(sample, (0, 1)))
    for thread, found in enumerate(results):
        plain = cg.load(artifact("toca"))
        assert same(found, [t for n in range(3) for t in play(plain, image(10 * thread + n))])


def test_inputs_written_in_place_and_in_inference_mode() -> None:
    plain, run = cg.load(artifact("goc")), recording(artifact("goc"))
    x, t, y = (tensor.clone() for tensor in image(1)[0])
    with torch.inference_mode():
        first = play(run, image(2))
    found, wanted = [], []
    for call in image(1):
        x.copy_(call[0])
        t.copy_(call[1])
        found.append(run(x, t, y))
        wanted.append(plain(x, t, y))
    assert same(found, wanted)
    assert same(first, play(plain, image(2)))


def test_values_of_the_request_change_with_the_image() -> None:
    model = tiny_pixart()
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 900)
    captions = [torch.randn(2, 1, 5, 16) for _ in range(2)]
    compiled = cg.compile(model, SCHEDULES["fora"], (x, t, captions[0]), backend="eager")
    known = [port for layout in compiled.program.variants for port in layout.interface.known]
    assert any(port.role is Role.REQUEST for port in known)
    plain, run = cg.load(compiled), recording(compiled)
    for text in captions:
        calls = [(x + step, t - 15 * step, text) for step in range(STEPS)]
        assert same(play(run, calls), play(plain, calls))


# --- the plan of places


@st.composite
def programs(draw: st.DrawFn) -> Any:
    """Steps that write some of two slots and read any earlier values; no graphs."""
    writes = draw(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), max_size=8))
    written = [[slot for slot, wanted in zip("ab", row, strict=True) if wanted] for row in writes]
    steps, made = len(writes), set[Made]()
    reads = []
    for step, row in enumerate(written):
        reads.append(tuple(draw(st.sets(st.sampled_from(sorted(made)))) if made else ()))
        made |= {(slot, step) for slot in row}
    last = {key: max((s for s in range(steps) if key in reads[s]), default=-1) for key in made}
    layouts, rows = [], []
    for step, row in enumerate(written):
        named = {f"in{i}": key for i, key in enumerate(reads[step])}
        inputs = tuple(Port(name, SPEC, Role.SLOT, slot) for name, (slot, _) in named.items())
        outputs = tuple(Port(f"out_{slot}", SPEC, Role.WRITE, slot) for slot in row)
        layouts.append(VariantLayout("", Interface(inputs, outputs)))
        rows.append(
            Step(
                variant=step,
                slots={name: number for name, (_, number) in named.items()},
                constants={},
                keeps=frozenset(f"out_{slot}" for slot in row if last[slot, step] > step),
                frees=tuple(key for key in made if last[key] == step),
            )
        )
    return SimpleNamespace(
        steps=tuple(rows), variants=tuple(layouts), layout=lambda step: layouts[step]
    )


def written_by(program: Any, step: int) -> list[str]:
    return [port.of for port in program.layout(step).interface.writes]


def assert_reads_what_is_meant(program: Any) -> set[Any]:
    """Plays the launches with names in place of tensors; gives the places that were used."""
    holds: dict[Any, Any] = {}
    for number, (step, launch) in enumerate(
        zip(program.steps, plan_launches(program), strict=True)
    ):
        slots = program.layout(number).interface.slots
        meant = [(port.of, step.slots[port.name]) for port in slots]
        assert [holds[place] for place in launch.reads] == meant
        holds |= {(slot, 0): (slot, number) for slot in written_by(program, number)}
        for source, target in launch.moves:
            holds[target] = holds[source]
    return set(holds)


@given(programs())
def test_every_step_finds_the_values_that_it_means(program: Any) -> None:
    used = assert_reads_what_is_meant(program)
    alive, most = set[Any](), 1
    for number, step in enumerate(program.steps):
        for slot in written_by(program, number):
            most = max(most, 1 + sum(key[0] == slot for key in alive))
        writes = program.layout(number).interface.writes
        alive = alive | {(port.of, number) for port in writes if port.name in step.keeps}
        alive -= set(step.frees)
    assert all(number < most for _, number in used)


@pytest.mark.parametrize(
    ("name", "graphs"), [("fora", 2), ("taylorseer", 3), ("goc", 4), ("toca", 7), ("duca", 7)]
)
def test_graphs_that_are_recorded(name: str, graphs: int) -> None:
    program = artifact(name).program
    assert_reads_what_is_meant(program)
    assert len(set(plan_launches(program))) == graphs
    made: list[StandIn] = []

    def recorder() -> StandIn:
        made.append(StandIn())
        return made[-1]

    run = recording(artifact(name), recorder)
    for seed, batch in ((1, 2), (2, 2), (3, 3)):
        play(run, image(seed, batch))
    assert [one.recorded for one in made] == [2 * graphs]  # again for the other batch


def test_graphs_of_a_preset() -> None:
    """As the README has it."""
    program = compile_traced(*shared_dit(), "toca-n3").program
    assert_reads_what_is_meant(program)
    assert len(set(plan_launches(program))) == 15


# --- memory and failures


@pytest.mark.parametrize("name", ["fora", "toca"])
def test_places_take_what_the_plan_predicts(name: str) -> None:
    run, compiled = recording(artifact(name)), artifact(name)
    symbol = compiled.program.batch
    assert symbol is not None
    play(run, image(1, batch=3))
    assert run.cache_bytes() == max(compiled.program.plan.cache_bytes({symbol: 3}))


def test_a_session_that_ends_frees_what_it_recorded() -> None:
    ended: list[weakref.ref[StandIn]] = []

    def recorder() -> StandIn:
        made = StandIn()
        ended.append(weakref.ref(made))
        return made

    run = recording(artifact("fora"), recorder)
    session = run.session()
    play(session, image(1))
    del session
    gc.collect()
    assert [ref() is None for ref in ended] == [False, True]  # the runner's own lives on
    play(run, image(1))
    run.reset()
    assert run.cache_bytes() == 0


@pytest.mark.parametrize("variant", [0, 1, 3])
@pytest.mark.parametrize("call", range(3))
def test_a_step_that_failed_can_be_repeated(variant: int, call: int) -> None:
    """In warming up (call 0) and in replaying (call 1)."""
    functions: list[Any] = artifact("toca").functions()
    functions[variant] = FailsAt(functions[variant], call)
    run, found, failures = recording(artifact("toca"), functions=functions), [], 0
    for one in [*image(1), *image(2)]:
        try:
            found.append(run(*one))
        except RuntimeError:
            failures += 1
            found.append(run(*one))
    plain = cg.load(artifact("toca"))
    assert failures == 1
    assert same(found, play(plain, image(1)) + play(plain, image(2)))


def test_a_graph_that_cannot_be_recorded() -> None:
    run = recording(artifact("fora"), CannotRecord)
    with pytest.raises(BackendError) as caught:
        run(*image(1)[0])
    assert str(caught.value) == (
        "variant0: the graph cannot be recorded as a CUDA graph; found operation not permitted "
        "when stream is capturing; load with cuda_graphs=False"
    )


def test_without_a_cuda_device() -> None:
    with pytest.raises(InputError, match=r"need a CUDA device; found cpu; load with device='cuda'"):
        cg.load(artifact("fora"), cuda_graphs=True)


@pytest.mark.parametrize("backend", ["onnx", "tensorrt"])
def test_backends_that_cannot_be_recorded(backend: str) -> None:
    with pytest.raises(BackendError, match=f"cannot record backend {backend}; expected eager or"):
        cuda_graph.recorders(torch.device("cuda"), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("backend", ["eager", "inductor", "aoti"])
def test_on_a_gpu(tmp_path: Path, backend: str, name: str) -> None:
    path = artifact(name).save(tmp_path / "it.cgraph")
    plain = cg.load(path, "cuda", backend=backend)
    run = cg.load(path, "cuda", backend=backend, cuda_graphs=True)
    found, wanted = list[Tensor](), list[Tensor]()
    for seed, batch in ((1, 2), (2, 2), (3, 3)):
        for branches in zip(image(seed, batch), image(seed + 10, batch), strict=True):
            for branch, call in zip(("cond", "uncond"), branches, strict=True):
                there = [t.cuda() for t in call]
                with plain.cache_context(branch), run.cache_context(branch):
                    found.append(run(*there))
                    wanted.append(plain(*there))
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-5
