"""Tiny models with random weights, inputs for them, and how far two results are apart."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import cachegraph as cg
from cachegraph.compiler import compile as compiler
from cachegraph.errors import SessionError
from cachegraph.methods.method import EXAMPLE_STEPS, Method
from cachegraph.methods.router_file import Mask, mask_to_yaml
from cachegraph.model.trace import TracedModel, trace
from cachegraph.zoo import DiT, Flux, PixArt, STDiT3
from tests.traces import fingerprint

DATA = Path(__file__).parent / "data"
_LIBRARY = "elsewhere"
Inputs = dict[str, Any]
Call = tuple[Tensor, Tensor, Tensor]  # x, t, y of a DiT


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and wait for it long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def relative_error(found: Any, wanted: Any) -> float:
    """Relative L2 error over all tensors of two results of one form."""
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    difference = math.hypot(*(float((a.double() - b.double()).norm()) for a, b in pairs))
    return difference / math.hypot(*(float(b.double().norm()) for _, b in pairs))


def play(run: Callable[..., Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """The results of calls in order."""
    return [run(*call) for call in calls]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether two trajectories agree call by call."""
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-5


def refused(call: Callable[[], Any], *parts: str) -> None:
    """A session refuses the call, and its message has these parts."""
    with pytest.raises(SessionError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def own_operator(function: Callable[..., Any]) -> Any:
    """A function as an operator of somebody else's library, as models bring them along."""
    return torch.library.custom_op(f"{_LIBRARY}::{function.__name__}", function, mutates_args=())


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, whether it is a tensor, a tuple or an object with fields."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def compile_traced(
    model: nn.Module, traced: TracedModel, schedule: Any, **options: Any
) -> cg.Artifact:
    """``cachegraph.compile`` for the eager backend, of a model that is already traced."""
    with mock.patch.object(compiler, "trace", return_value=traced):
        return cg.compile(model, schedule, (), **{"backend": "eager"} | options)


TOCA = {  # its partial steps recompute three different numbers of tokens
    "cachegraph": 1,
    "steps": 7,
    "policy": {"method": "toca", "interval": 4, "fresh_ratio": 0.3, "quirks": False},
}


def example(method: type[Method], folder: Path, depth: int = 2) -> dict[str, Any]:
    """The schedule that a method gives as its example, for a model of so many blocks.

    A file that it names is made: a mask that reuses attention and mlp in turn.
    """
    policy = {"method": method.name(), **method.example}
    for key in set(method.file_keys) & set(policy):
        mask = tuple((step % 2 == 0,) * depth for step in range(EXAMPLE_STEPS))
        other = tuple((step % 3 == 0,) * depth for step in range(EXAMPLE_STEPS))
        policy[key] = str(folder / str(policy[key]))
        Path(policy[key]).write_text(mask_to_yaml(Mask(mask, other), method.name()))
    return {"cachegraph": 1, "steps": EXAMPLE_STEPS, "policy": policy}


def fora(steps: int, interval: int, **more: Any) -> dict[str, Any]:
    """A schedule."""
    return {"cachegraph": 1, "steps": steps, "policy": {"method": "fora", "interval": interval}} | (
        more
    )


def full(steps: int, **more: Any) -> dict[str, Any]:
    """A schedule that computes everything."""
    return {"cachegraph": 1, "steps": steps, "policy": {"method": "full"}} | more


def fill_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter small random values that depend on nothing but the seed.

    Some classes are born with zero or uninitialised parameters; a zero gate would hide a wrong
    value behind it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
    return model.eval()


def tiny_dit(seed: int = 0, **sizes: Any) -> DiT:
    """A DiT of 2 blocks, 16 tokens and width 32: sites attn and mlp of blocks.0 and blocks.1."""
    defaults: dict[str, Any] = {
        "input_size": 8,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    }
    model = DiT(**defaults | sizes)
    fill_random(model, seed)
    return model


@cache
def shared_dit(depth: int = 2) -> tuple[DiT, TracedModel]:
    """A tiny DiT and its trace, once for all tests, none of which may change them."""
    model = tiny_dit(depth=depth)
    traced = trace(model, dit_steps(1)[0])
    _SHARED[f"a DiT of depth {depth}"] = (traced, fingerprint(traced))
    return model, traced


_SHARED: dict[str, tuple[TracedModel, str]] = {}


def changed_models() -> list[str]:
    """Those that tests share and have changed."""
    return [name for name, (traced, before) in _SHARED.items() if fingerprint(traced) != before]


def tiny_pixart() -> PixArt:
    """A PixArt of 2 blocks, 16 tokens and width 32, with captions of width 16."""
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = PixArt(caption_channels=16, model_max_length=5, **sizes)
    fill_random(model)
    return model


def tiny_flux(**sizes: Any) -> Flux:
    """A FLUX of 1 + 1 blocks, 12 image tokens and 5 of text, width 32, for 16 channels a token."""
    defaults: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
    }
    model = Flux(**defaults | sizes)
    fill_random(model)
    return model.requires_grad_(False)


def tiny_stdit(**sizes: Any) -> STDiT3:
    """A STDiT3 of 1 + 1 blocks, 3 frames of 2 x 2 tokens, width 16, captions of 5 tokens."""
    defaults = {"hidden_size": 16, "depth": 1, "num_heads": 2}
    model = STDiT3(caption_channels=8, model_max_length=5, **defaults | sizes)
    vars(model)["latent_size"] = (3, 4, 4)
    fill_random(model)
    return model.requires_grad_(False)


def dit_steps(steps: int, *, batch: int = 2, seed: int = 0) -> list[Call]:
    """Arguments (x, t, y) of every call of a trajectory: fresh noise, falling timesteps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (batch,), generator=generator)
    return [
        (
            torch.randn((batch, 4, 8, 8), generator=generator),
            torch.full((batch,), 1000 - 15 * (step + 1)),
            y,
        )
        for step in range(steps)
    ]


def signed(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Write fingerprints and digest anew, as one who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        digest = entry["sha256"] and hashlib.sha256(data).hexdigest()
        entry.update(bytes=len(data), sha256=digest)
    change(manifest)
    text = json.dumps(manifest, sort_keys=True)
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Compiled:
    """A tiny DiT, its trace, and what was compiled of it by schedule."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        self.steps = steps
        if seed == 0:
            self.model, self.traced = shared_dit()
        else:
            self.model = tiny_dit(seed)
            self.traced = trace(self.model, dit_steps(1)[0])
        self.artifacts: dict[str, cg.Artifact] = {}

    def artifact(self, steps: int = 0, interval: int = 3, **more: Any) -> cg.Artifact:
        """Compiled for FORA."""
        schedule = fora(steps or self.steps, interval, **more)
        if str(schedule) not in self.artifacts:
            self.artifacts[str(schedule)] = compile_traced(self.model, self.traced, schedule)
        return self.artifacts[str(schedule)]

    def runner(self, **schedule: Any) -> cg.Runner:
        """A runner of its own."""
        return cg.load(self.artifact(**schedule))

    def wanted(self, calls: Sequence[Call], **schedule: Any) -> list[Tensor]:
        """What an undisturbed trajectory gives, by the reference."""
        artifact = self.artifact(**schedule)
        plan = artifact.program.plan
        run = cg.ReferenceRunner.of_plan(self.model, self.traced, plan, artifact.schedule)
        return [run(*call, step=step) for step, call in enumerate(calls)]


# --- diffusers, from configurations as plain data


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    return {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration with random weights."""
    module = importlib.import_module(config.get("module", "diffusers"))
    return fill_random(getattr(module, config["class"])(**_with_tuples(config["init"])))


def make_inputs(
    config: Mapping[str, Any], *, time: float | None = None, seed: int = 0, batch: int | None = None
) -> Inputs:
    """Keyword arguments of one call.

    Args:
        config: of the model.
        time: the timestep, for the whole batch; as the configuration says where left out.
        seed: of the random inputs.
        batch: another than the configuration's.
    """
    generator = torch.Generator().manual_seed(seed)
    factor = Fraction(batch or config["batch"], config["batch"])
    entries = {
        name: _of_items(entry, config["batch"], factor) for name, entry in config["inputs"].items()
    }
    inputs = {name: _input(entry, generator, factor) for name, entry in entries.items()}
    if time is not None:
        inputs["timestep"] = torch.full_like(inputs["timestep"], time)
    return inputs


def trajectory(config: Mapping[str, Any], steps: int, *, seed: int = 0) -> Iterator[Inputs]:
    """Keyword arguments of every call: fresh noise, falling timesteps, all else stays."""
    lasting = make_inputs(config, seed=seed)
    whole = not torch.is_floating_point(lasting["timestep"])
    for step in range(steps):
        time = 1 - (step + 1) / (steps + 1)
        fresh = make_inputs(config, time=round(1000 * time) if whole else time, seed=seed + step)
        yield lasting | {name: fresh[name] for name in ("hidden_states", "timestep")}


def _of_items(entry: Mapping[str, Any], batch: int, factor: Fraction) -> Mapping[str, Any]:
    """A list of one entry an item, for another batch; tensors in it are of one item each."""
    children = entry.get("list", [])
    own = len(children) == batch and not any("py" in child for child in children)
    if own and '"batch_dims": [0' not in json.dumps(children):
        return {"list": [children[i % batch] for i in range(int(batch * factor))]}
    return entry


def _input(entry: Mapping[str, Any], generator: torch.Generator, factor: Fraction) -> Any:
    match entry:
        case {"tensor": spec}:
            return _tensor(spec, generator, factor)
        case {"list": children}:
            return [_input(child, generator, factor) for child in children]
        case {"tuple": children}:
            return tuple(_input(child, generator, factor) for child in children)
        case {"dict": children}:
            named = {k: _input(child, generator, factor) for k, child in children.items()}
            return {int(k) if k.isdecimal() else k: child for k, child in named.items()}
    return entry["py"]


def _tensor(spec: Mapping[str, Any], generator: torch.Generator, factor: Fraction) -> Tensor:
    dtype = getattr(torch, spec["dtype"])
    factors = [factor if dim in spec["batch_dims"] else 1 for dim in range(len(spec["shape"]))]
    shape = [int(size * times) for size, times in zip(spec["shape"], factors, strict=True)]
    if "values" in spec:
        values = torch.tensor(spec["values"], dtype=dtype).reshape(spec["shape"])
        values = values.repeat([math.ceil(times) for times in factors]) if factors else values
        return values[tuple(map(slice, shape))].clone()
    if "fill" in spec:
        return torch.full(shape, spec["fill"], dtype=dtype)
    if spec["gen"] == "randint":
        return torch.randint(spec["low"], spec["high"], shape, dtype=dtype, generator=generator)
    return getattr(torch, spec["gen"])(shape, generator=generator).to(dtype)


def _with_tuples(value: Any) -> Any:
    match value:
        case {"__tuple__": items}:
            return tuple(_with_tuples(item) for item in items)
        case dict():
            return {key: _with_tuples(item) for key, item in value.items()}
        case list():
            return [_with_tuples(item) for item in value]
    return value
