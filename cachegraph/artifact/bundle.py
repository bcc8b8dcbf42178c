"""A compiled loop as ONNX files that a sampler in any language can run.

The folder holds one file a graph, the weights, ``loop.json`` for programs and ``README.md`` for
people: which file runs at which step, and which output of an earlier step each input takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cachegraph.backends import Progress
from cachegraph.backends.named import NamedGraph, named_graphs, named_prologues
from cachegraph.backends.onnx.backend import Onnx
from cachegraph.errors import ArtifactError
from cachegraph.folders import refuse_foreign, written_whole
from cachegraph.graph.weights import WEIGHTS_FILE, distinct, save_weights
from cachegraph.runtime.known import REQUEST, prologue_name
from cachegraph.runtime.program import Made, Program

from .artifact import Artifact

FORMAT = 1
LOOP = "loop.json"
BF16 = (
    "OpenVINO computes in bf16 by default on processors that can, which changes images: "
    "set INFERENCE_PRECISION_HINT to f32."
)


@dataclass(frozen=True)
class Source:
    """Where an input comes from: what an earlier step handed out."""

    step: int
    output: str


@dataclass(frozen=True)
class LoopStep:
    """One step of the loop.

    Attributes:
        graph: name of the graph that it runs.
        slots: input -> where its tensor comes from.
        constants: input -> its numbers.
        prologues: names of the graphs to run before, from the model's inputs.
        known: inputs that take the output of their own name of a prologue, of this step or earlier.
        keep: outputs that a later step takes.
        free: what no later step takes any more.
    """

    graph: str
    slots: Mapping[str, Source]
    constants: Mapping[str, Any]
    prologues: tuple[str, ...]
    known: tuple[str, ...]
    keep: tuple[str, ...]
    free: tuple[Source, ...]


def loop_steps(program: Program) -> tuple[LoopStep, ...]:
    """What every step takes and hands out, by name."""
    made: dict[Made, str] = {}  # what was made -> the output that handed it out
    slots: list[dict[str, Source]] = []
    for step, entry in enumerate(program.steps):
        interface = program.layout(step).interface
        sources = {port.name: (port.of, entry.slots[port.name]) for port in interface.slots}
        slots.append({name: Source(key[1], made[key]) for name, key in sources.items()})
        made.update({(port.of, step): port.name for port in interface.writes})
    last = {source: step for step, taken in enumerate(slots) for source in taken.values()}
    found = []
    for step, (entry, taken) in enumerate(zip(program.steps, slots, strict=True)):
        layout = program.layout(step)
        own = [prologue_name(layout.name)] if layout.prologue is not None else []
        request = [REQUEST] if step == 0 and program.request is not None else []
        found.append(
            LoopStep(
                layout.name,
                taken,
                entry.constants,
                (*request, *own),
                tuple(port.name for port in layout.interface.known),
                tuple(p.name for p in layout.interface.writes if Source(step, p.name) in last),
                tuple(source for source, end in last.items() if end == step),
            )
        )
    return tuple(found)


def export_onnx(artifact: Artifact, path: str | Path, progress: Progress) -> Path:
    """Write the ONNX files of an artifact with all that a sampler must know.

    Args:
        artifact: converted first, where it was compiled for another backend.
        path: of the folder.
        progress: is told what is being done.

    Raises:
        ArtifactError: ``path`` exists and is no such folder, or the artifact is for several sizes.
        BackendError: the graphs cannot be converted.
    """
    target = Path(path)
    if artifact.forms:
        raise ArtifactError(
            "an artifact for calls of several sizes is no one loop",
            expected="one size, or sizes that vary",
            remedy="compile one for each size, and export those",
        )
    refuse_foreign(target, LOOP, "exported loop")
    artifact.compile_ahead("onnx", progress)
    graphs = named_graphs(artifact.program, artifact.graphs)
    prologues = named_prologues(artifact.program, artifact.prologues)
    steps = loop_steps(artifact.program)
    with written_whole(target) as folder:
        for name in graphs:
            shutil.copy(artifact.compiled_folder("onnx") / f"{name}.onnx", folder)
        Onnx().emit(prologues, artifact.weights, folder, progress)
        graphs = {**graphs, **prologues}
        progress("writing the weights")
        save_weights(distinct(artifact.weights)[0], folder / WEIGHTS_FILE)
        (folder / LOOP).write_text(json.dumps(_loop(artifact.program, graphs, steps)) + "\n")
        (folder / "README.md").write_text(_readme(artifact.program, graphs, steps))
    return target


def _loop(
    program: Program, graphs: Mapping[str, NamedGraph], steps: tuple[LoopStep, ...]
) -> dict[str, Any]:
    first = next(iter(graphs.values()))
    return {
        "cachegraph_loop": FORMAT,
        "weights": WEIGHTS_FILE,
        "timesteps": program.timesteps,
        "model_inputs": list(first.inputs)[: len(program.signature.inputs)],
        "model_outputs": list(first.outputs)[: len(program.signature.outputs)],
        "graphs": {
            name: {
                "file": f"{name}.onnx",
                "inputs": {key: str(spec) for key, spec in graph.inputs.items()},
                "outputs": {key: str(spec) for key, spec in graph.outputs.items()},
            }
            for name, graph in graphs.items()
        },
        "steps": [asdict(step) for step in steps],
    }


def _readme(program: Program, graphs: Mapping[str, NamedGraph], steps: tuple[LoopStep, ...]) -> str:
    first = next(iter(graphs.values()))
    outputs = [f"`{name}`" for name in list(first.outputs)[: len(program.signature.outputs)]]
    inputs = {k: first.inputs[k] for k in list(first.inputs)[: len(program.signature.inputs)]}
    called = ", ".join(f"`{name}` {spec}" for name, spec in inputs.items())
    lines = [
        f"# A denoising loop of {len(steps)} steps in {len(graphs)} ONNX files",
        "",
        f"Every step calls the model once, with {called}; it returns {', '.join(outputs)}.",
        f"`{WEIGHTS_FILE}` has the weights of all files and must lie beside them. `{LOOP}` says "
        "the same as this page to a program.",
        "",
        "```",
        "kept = {}                                  # (step, output) -> tensor",
        "known = {}                                 # what prologues compute, by name",
        "for s, step in enumerate(loop.steps):",
        "    known.update(run(graphs[name].file, model's inputs))    for name in step.prologues",
        "    feed = model's inputs of this call",
        "    feed[name] = kept[source.step, source.output]   for name, source in step.slots",
        "    feed[name] = numbers                            for name, numbers in step.constants",
        "    feed[name] = known[name]                        for name in step.known",
        "    results = run(graphs[step.graph].file, feed)",
        "    kept[s, name] = results[name]                   for name in step.keep",
        "    delete kept[source.step, source.output]         for source in step.free",
        "```",
        "",
        "Calls of cond and uncond that are separate have a `kept` each. Tensors that are kept can "
        "stay on the device; nothing changes them.",
        "",
        BF16,
        "",
        "## Steps",
        "",
        "| steps | file | slots from step | step constants | keeps |",
        "|---|---|---|---|---|",
    ]
    for _, group in groupby(enumerate(steps), lambda pair: _row(*pair)):
        alike = [step for step, _ in group]
        numbers = f"{alike[0]} to {alike[-1]}" if len(alike) > 1 else f"{alike[0]}"
        lines.append(f"| {numbers} | {_row(alike[0], steps[alike[0]])} |")
    for name, graph in graphs.items():
        lines += ["", f"## {name}.onnx", "", "| input | |", "|---|---|"]
        lines += [f"| {key} | {spec} |" for key, spec in graph.inputs.items()]
        lines += ["", "| output | |", "|---|---|"]
        lines += [f"| {key} | {spec} |" for key, spec in graph.outputs.items()]
    return "\n".join(lines) + "\n"


def _row(number: int, step: LoopStep) -> str:
    sources = sorted({source.step for source in step.slots.values()})
    constants = (f"{name}: {_short(numbers)}" for name, numbers in step.constants.items())
    return " | ".join(
        (
            f"{step.graph}.onnx",
            ", ".join(map(str, sources)) or "none",
            ", ".join(constants) or "none",
            f"{len(step.keep)} outputs",
        )
    )


def _short(numbers: Any) -> str:
    """Lists of tokens count up from 0, so their end says all."""
    if len(numbers) > 2 and list(numbers) == list(range(len(numbers))):
        return f"0..{numbers[-1]}"
    text = json.dumps(numbers)
    return text if len(text) <= 40 else "..."
