"""Compile the graphs ahead of time with AOTInductor: loading needs neither compiler nor tracing."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cachegraph.backends import AheadOfTime, Graphs, Progress, Weights
from cachegraph.backends.named import COUNT, NamedGraph
from cachegraph.errors import BackendError
from cachegraph.folders import is_as_recorded, own_cache, record_content, writing
from cachegraph.graph.serialise import graph_to_json
from cachegraph.graph.weights import stored_weight
from cachegraph.runtime.known import StepFunction
from cachegraph.spec import TensorSpec

_WORKER = "cachegraph.backends.aoti.worker"
_SOURCES = ("aoti/worker.py", "export.py")  # what of this code a compiled graph depends on
_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    # The number of threads is that of the machine which runs it.
    "cpp.dynamic_threads": True,
}
# Instructions that g++ -march=native, which torch calls, may write.
_INSTRUCTIONS = re.compile("s?sse|avx|amx|fma|f16c|bmi|abm|movbe|popcnt|adx|gfni|asimd|sve|bf16")
_BUILT_FOR = "built_for.json"
_MODEL = "model"  # torch's name for the only one of a package
_INLINED = 64  # elements; inductor writes the numbers of small weights (up to 8) into the code
# Variables that tell inductor how to compile, and of these one that only says where it works.
_SETTINGS = re.compile("TORCHINDUCTOR_(?!CACHE_DIR$)|AOT_INDUCTOR_|C(XX|C|PP)(FLAGS)?$")
_TOKENS = 3  # an example for counts of tokens, the same whatever the schedule's numbers are


class Aoti(AheadOfTime):
    """One library a graph; the weights are the artifact's, shared by all graphs and runners.

    What a graph was compiled to is kept in a cache (``$CACHEGRAPH_CACHE``, else
    ``~/.cache/cachegraph``) under a digest of all that it depends on: a schedule that differs in
    numbers only compiles nothing again. The folder may be deleted at any time.
    """

    name = "aoti"

    def emit(self, graphs: Graphs, weights: Weights, folder: Path, progress: Progress) -> None:
        """``NAME.pt2`` for each graph; those that are not in the cache compile side by side."""
        device = next(iter(weights.values())).device
        jobs = {name: _job(graph, weights, device) for name, graph in graphs.items()}
        wanted = {name: _cached(job) for name, job in jobs.items()}
        # Two graphs may be the same but for their names.
        todo = {path: name for name, path in wanted.items() if not is_as_recorded(path)}
        progress(f"compiling ahead of time: {', '.join(todo.values()) or 'all is in the cache'}")
        if todo:
            _compile({path: jobs[name] for path, name in todo.items()}, todo, progress)
        for name, path in wanted.items():
            shutil.copyfile(path, folder / f"{name}.pt2")
        (folder / _BUILT_FOR).write_text(json.dumps(_machine(device)))

    def open(
        self, graphs: Graphs, weights: Weights, folder: Path, device: torch.device
    ) -> list[StepFunction]:
        """The libraries, with the weights handed to them."""
        built, here = json.loads((folder / _BUILT_FOR).read_text()), _machine(device)
        lacks = sorted({*built.pop("instructions", ())} - {*here.pop("instructions")})
        if built != here or lacks:
            raise BackendError(
                "the artifact was compiled for another machine",
                place=str(folder),
                expected=_described(built),
                found=_described(here) + (f", without {', '.join(lacks)}" if lacks else ""),
                remedy="compile it here, or load it with backend='inductor'",
            )
        return [_function(folder / f"{name}.pt2", weights) for name in graphs]


def _function(path: Path, weights: Weights) -> StepFunction:
    # torch's own way to open it looks for a C++ compiler and tries that, to compare the machines;
    # and it reads the form of the call from JSON at every call. Single-threaded, for its own guard
    # against threads queries events, which a CUDA graph cannot record.
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), _MODEL, True, 1, -1)
    except RuntimeError as error:
        raise BackendError(
            "what was compiled ahead of time cannot be opened",
            place=str(path),
            found=str(error).splitlines()[0],
            remedy="compile it again with --force",
        ) from error
    lock = Lock()
    used = {name: stored_weight(weights, name).contiguous() for name in loader.get_constant_fqns()}
    if used:
        # Not copied; so they must live as long as the function does.
        loader.load_constants(used, False, check_full_update=True, user_managed=True)

    def call(*tensors: Tensor, _kept: Any = used) -> Sequence[Tensor]:
        # The library reads them as dense tensors, whatever their strides are.
        with lock:
            return loader.boxed_run([tensor.contiguous() for tensor in tensors])

    return call


def _job(graph: NamedGraph, weights: Weights, device: torch.device) -> str:
    """All that a compiled graph depends on, as text."""
    nodes = graph_to_json(graph.module.graph)
    for node in nodes:
        node.pop("spec", None)
    names = sorted({str(n.target) for n in graph.module.graph.find_nodes(op="get_attr")})
    used = {name: stored_weight(weights, name) for name in names}
    sizes = graph.example_sizes()
    return json.dumps(
        {
            "nodes": nodes,
            "weights": {name: str(TensorSpec.of(tensor)) for name, tensor in used.items()},
            "values": {k: _numbers(t) for k, t in used.items() if t.numel() <= _INLINED},
            "inputs": [str(spec) for spec in graph.inputs.values()],
            "sizes": {k: _TOKENS if k.startswith(COUNT) else size for k, size in sizes.items()},
            "built_for": _machine(device),
            "options": _OPTIONS,
            "settings": compiler_settings(),
            "code": [Path(__file__).parents[1].joinpath(name).read_text() for name in _SOURCES],
        }
    )


def _numbers(tensor: Tensor) -> Any:
    """As JSON has them; complex ones are pairs."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).tolist()


def compiler_settings() -> dict[str, str]:
    """What the environment says of how to compile: it may change what comes out."""
    return {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.match(name)}


def _machine(device: torch.device) -> dict[str, Any]:
    """What compiled code runs on."""
    if device.type == "cuda":
        kind = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device.type,
        "kind": kind,
        "torch": torch.__version__,
        "instructions": _instructions(),
    }


@cache
def _instructions() -> list[str]:
    """Which of those that compiled code may use this processor has; none where nobody tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(filter(_INSTRUCTIONS.match, found.partition(":")[2].split()))


def _described(machine: Mapping[str, Any]) -> str:
    return f"{machine['device']} {machine['kind']}, torch {machine['torch']}"


def _cache() -> Path:
    return own_cache("aoti")


def _cached(job: str) -> Path:
    return _cache() / f"{hashlib.sha256(job.encode()).hexdigest()}.pt2"


def _compile(jobs: Mapping[Path, str], names: Mapping[Path, str], progress: Progress) -> None:
    """Compile each job to its file, as many at a time as there are cores.

    Raises:
        BackendError: one of them failed; the others are stopped.
    """
    # In the cache, so that what is done can be renamed into it.
    cache = _cache()
    with writing(cache), tempfile.TemporaryDirectory(prefix="compiling-", dir=cache) as folder:
        scratch = Path(folder)
        waiting, running = list(jobs), dict[Path, subprocess.Popen[bytes]]()
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    path = waiting.pop(0)
                    running[path] = _start(jobs[path], scratch / path.name)
                for path in _finished(running):
                    if running.pop(path).returncode:
                        raise _failure(names[path], (scratch / path.name).with_suffix(".log"))
                    record_content(scratch / path.name)
                    for name in (f"{path.name}.sha256", path.name):
                        (scratch / name).rename(path.with_name(name))
                    progress(f"compiled {names[path]}, {len(waiting) + len(running)} to go")
        finally:
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the compiler that it started, too
                    process.wait()


def _start(job: str, target: Path) -> subprocess.Popen[bytes]:
    source, log = target.with_suffix(".json"), target.with_suffix(".log")
    source.write_text(job)
    command = [sys.executable, "-m", _WORKER, str(source), str(target), str(os.getpid())]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": _torch_cache()}
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


@cache
def _torch_cache() -> str:
    """A folder for what torch leaves behind, until this process ends.

    All compilations share it: torch tries there what the processor can do, which takes seconds. Its
    precompiled headers it keeps elsewhere, for all processes.
    """
    folder = tempfile.mkdtemp(prefix="cachegraph-torch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _finished(running: Mapping[Path, subprocess.Popen[bytes]]) -> Iterator[Path]:
    """Those that have ended, after a moment's wait for the first of them."""
    with suppress(subprocess.TimeoutExpired):
        next(iter(running.values())).wait(timeout=0.2)
    return iter([path for path, process in running.items() if process.poll() is not None])


def _failure(name: str, log: Path) -> BackendError:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return BackendError(
        "a graph could not be compiled ahead of time",
        place=name,
        expected="a C++ compiler that torch finds (g++, or $CXX)",
        found=lines[-1] if lines else "no message",
        remedy="compile with --backend inductor to see whether torch takes the model",
    )
