"""What to sample with: an artifact or a model, its sampler, its conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachegraph.artifact.load import load_artifact
from cachegraph.artifact.manifest import MANIFEST
from cachegraph.compiler.compile import compile
from cachegraph.compiler.sources import open_model
from cachegraph.diffusion.process import Process
from cachegraph.errors import InputError
from cachegraph.runtime.runner import Runner
from cachegraph.schedule.schedule import load_schedule
from cachegraph.zoo.checkpoint import read_tensors
from cachegraph.zoo.digits import IMAGE_SHAPE, NUM_CLASSES, ddim_timesteps

from .decode import load_decoder
from .run import Drawing
from .sampler import Kind, Labels, Sampler, Texts

_DIGITS_CFG, _DIT_CFG, _DIT_CLASSES = 2.0, 1.5, 1000


@dataclass(frozen=True)
class Asked:
    """How images are to be sampled.

    Attributes:
        kind: of sampler.
        seed: of everything.
        cfg: strength of guidance; None: 2 for digits, 1.5 for others.
        classes: labels in turn; empty: drawn.
        num_classes: how many; None: 10 for digits, 1000 for others.
        vae: folder of the autoencoder.
        prompts: a text file, a prompt a line.
        embeddings: a safetensors file with those of the prompts, by the model's input, and of no
            prompt as ``null.NAME``.
    """

    kind: Kind = "ddim"
    seed: int = 0
    cfg: float | None = None
    classes: tuple[int, ...] = ()
    num_classes: int | None = None
    vae: Path | None = None
    prompts: Path | None = None
    embeddings: Path | None = None


def open_runner(
    what: str, schedule: str | None, device: torch.device, say: Callable[..., None]
) -> tuple[Runner, str]:
    """A runner of an artifact, or of a model under a schedule, and what tells it from others.

    Args:
        what: an artifact's folder, or a model as for ``compile``.
        schedule: of a model; an artifact has its own.
        device: where it runs.
        say: told what is being done.

    Raises:
        InputError: it cannot be opened, or the schedule does not go with it.
    """
    path = Path(what)
    if (path / MANIFEST).is_file() or path.suffix == ".cgraph":
        if schedule is not None:
            raise InputError("an artifact has its own schedule", place=what, remedy="leave out -s")
        say("reading the artifact")
        runner = load_artifact(path, device).runner()
        return runner, hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    if schedule is None:
        raise InputError("a model needs --schedule, or give an artifact", place=what)
    asked = load_schedule(schedule)
    source = open_model(what)
    model = source.model.to(device)
    art = compile(model, asked, source.args, source.kwargs, backend="eager", progress=say)
    return art.runner(), f"{what} {asked.digest()}"


def drawing_of(runner: Runner, asked: Asked) -> Drawing:
    """What draws images with a runner.

    Raises:
        InputError: the model is called otherwise than with an image, a timestep and a condition,
            or what was asked for does not fit it.
    """
    program = runner.program
    inputs = program.signature.inputs
    if len(inputs) < 2 or len(inputs[0][1].shape) != 4 or program.ascending:
        raise InputError(
            "the model cannot be sampled here",
            expected="inputs (x (B, C, H, W), t (B,), a condition), time falling",
            found=program.signature.describe(),
            remedy="call it in its own sampler: run = cachegraph.load(...)",
        )
    shape = tuple(int(d) for d in inputs[0][1].shape[1:])
    digits = shape == IMAGE_SHAPE
    cfg = asked.cfg if asked.cfg is not None else _DIGITS_CFG if digits else _DIT_CFG
    steps = len(program.steps)
    times: Sequence[int] | None = ddim_timesteps(steps) if digits else None
    if program.timesteps is not None:
        times = [round(t) for t in program.timesteps]
    names = [name for name, _ in inputs]
    if asked.embeddings is not None or asked.prompts is not None:
        conditions: Labels | Texts = _texts(asked, names[2:], cfg != 1)
    elif len(inputs) == 3 and len(inputs[2][1].shape) == 1:
        classes = NUM_CLASSES if digits else _DIT_CLASSES
        classes = classes if asked.num_classes is None else asked.num_classes
        _check_labels(asked.classes, classes)
        conditions = Labels(names[2], classes, asked.classes)
    else:
        raise InputError(
            "the model is not conditioned by classes",
            found=program.signature.describe(),
            remedy="give --prompts and --embeddings",
        )
    device = torch.device(runner.device)
    return Drawing(
        session=runner.session,
        sampler=Sampler(
            Process.of(steps, times),
            asked.kind,
            cfg,
            shape,
            conditions,
            asked.seed,
            (names[0], names[1]),
        ),
        decode=load_decoder(asked.vae, shape[0], device),
        device=device,
        dtype=inputs[0][1].dtype,
    )


def identity(name: str, drawing: Drawing, asked: Asked) -> Mapping[str, Any]:
    """What tells these images from others, as plain data."""
    sampler = drawing.sampler
    return {
        "program": name,
        "sampler": sampler.kind,
        "timesteps": list(sampler.process.timesteps),
        "cfg": sampler.cfg_scale,
        "seed": asked.seed,
        "classes": list(asked.classes),
        "vae": "" if asked.vae is None else asked.vae.name,
        "conditions": _digest(sampler.conditions),
    }


def _digest(conditions: Labels | Texts) -> str:
    found = hashlib.sha256()
    if isinstance(conditions, Labels):
        return f"{conditions.classes} classes"
    for part in (conditions.embeddings, conditions.null):
        for name, tensor in sorted(part.items()):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_labels(labels: tuple[int, ...], classes: int) -> None:
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise InputError(
            "a class is out of range", expected=f"0 to {classes - 1}", found=f"{wrong[0]}"
        )


def _texts(asked: Asked, names: Sequence[str], doubled: bool) -> Texts:
    """Embeddings of the prompts for each of the model's further inputs."""
    if asked.prompts is None or asked.embeddings is None:
        raise InputError("--prompts and --embeddings go together")
    lines = asked.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    tensors, _ = read_tensors(asked.embeddings)
    place, null = str(asked.embeddings), dict[str, Tensor]()
    for name in names:
        found = tensors.get(name)
        if found is None or len(found) != len(prompts):
            raise InputError(
                f"no embeddings {name!r} of these prompts",
                place=place,
                expected=f"{len(prompts)} rows, one a prompt",
                found="none" if found is None else f"{len(found)}",
            )
        if doubled:
            if f"null.{name}" not in tensors:
                raise InputError(
                    f"no embedding 'null.{name}' of no prompt", place=place, remedy="or --cfg 1"
                )
            null[name] = tensors[f"null.{name}"]
    return Texts({name: tensors[name] for name in names}, null)
