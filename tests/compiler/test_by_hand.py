"""Compiled ToCa and DuCa on FLUX and Open-Sora against loops written from the published rules.

The loops are right where recordings exist; here they say what other intervals, shares and lengths
of trajectories give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cachegraph as cg
from cachegraph.compiler import pipeline
from cachegraph.compiler.compile import assemble, build
from cachegraph.graph import ops
from cachegraph.model.trace import TracedModel, trace
from cachegraph.zoo import Flux, STDiT3
from tests import by_hand
from tests.models import one_thread, relative_error, tiny_flux, tiny_stdit  # noqa: F401

LIMIT = 1e-4
Calls = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def flux() -> tuple[Flux, TracedModel, Calls]:
    """Of 2 + 3 blocks, 36 image tokens and 11 of text."""
    model = tiny_flux(depth=2, depth_single_blocks=3)
    for name, weight in model.named_parameters():
        if name.endswith(("query_norm.scale", "key_norm.scale")):
            weight.fill_(2.0)  # attention tells tokens apart
    vars(model)["latent_size"] = 12
    _, inputs = model.example_inputs(2)
    inputs["txt"], inputs["txt_ids"] = inputs["txt"][:, :11], inputs["txt_ids"][:, :11]
    calls = drawn(inputs, "img", "timesteps", 50, 1.0)
    return model, trace(model, (), calls[0]), calls


@pytest.fixture(scope="module")
def sora() -> tuple[STDiT3, TracedModel, Calls]:
    """Of 2 + 2 blocks, 5 frames of 3 x 2 tokens, texts of 5, 2, 4 and 3 tokens."""
    model = tiny_stdit(depth=2)
    vars(model)["latent_size"] = (5, 6, 4)
    _, inputs = model.example_inputs(4)
    for sample, length in enumerate((5, 2, 4, 3)):
        inputs["mask"][sample, length:] = 0
    inputs["fps"] = torch.tensor([24.0, 12.0, 24.0, 12.0])
    inputs["height"], inputs["width"] = torch.full((4,), 144.0), torch.full((4,), 256.0)
    calls = drawn(inputs, "x", "timestep", 30, 1000.0)
    return model, trace(model, (), calls[0]), calls


def drawn(inputs: dict[str, Tensor], latent: str, time: str, steps: int, last: float) -> Calls:
    """A trajectory: fresh noise, falling time, all else stays."""
    generator = torch.Generator().manual_seed(6)  # no choice is close
    return [
        {
            **inputs,
            latent: torch.randn(inputs[latent].shape, generator=generator),
            time: torch.full_like(inputs[time], last * (1 - step / steps)),
        }
        for step in range(steps)
    ]


def agree(
    model: Any,
    traced: TracedModel,
    calls: Calls,
    policy: Any,
    wanted: Iterator[Tensor],
    **more: Any,
) -> None:
    schedule = {"cachegraph": 1, "steps": len(calls), "policy": policy}
    with mock.patch.object(pipeline, "verify"):  # other tests do, on fewer blocks
        run = assemble(build(model, schedule, traced=traced, **more), "eager").runner()
    far, by_hand.Tokens.closest = 0, 1.0
    for call, one in zip(calls, wanted, strict=True):
        assert relative_error(run(**call), one) <= LIMIT
        far += relative_error(model(**call), one) > 10 * LIMIT
    assert far >= len(calls) // 3  # steps in between are no full ones
    assert by_hand.Tokens.closest > 1e-6  # no choice is a matter of rounding


@pytest.mark.parametrize(
    ("interval", "share", "quirks"),
    [(5, 0.3, True), (6, 0.5, True), (3, 0.2, True), (5, 0.3, False), (4, 0.4, False)],
)
def test_flux(flux: Any, interval: int, share: float, quirks: bool) -> None:
    model, traced, calls = flux
    policy = {"method": "toca", "rules": "flux", "interval": interval, "fresh_ratio": share}
    wanted = by_hand.flux(model, calls, interval, share, 27 if quirks else None)
    # Of large maps, scores are taken piece by piece.
    pieces = mock.patch.object(ops, "_MAP_BYTES", 2**24 if quirks else 2**13)
    with torch.no_grad(), pieces:
        agree(model, traced, calls, {**policy, "quirks": quirks}, wanted)


@pytest.mark.parametrize("method", ["toca", "duca"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_opensora(sora: Any, method: str, share: float) -> None:
    policy = {"method": method, "rules": "opensora", "fresh_ratio": share}
    wanted = by_hand.opensora(sora[0], sora[2], share, duca=method == "duca")
    with torch.no_grad():
        agree(*sora, policy, wanted)


@pytest.fixture(scope="module")
def given(sora: Any) -> tuple[STDiT3, TracedModel, Calls]:
    """Frames that are given and not drawn: others in each sample, and fewer from step 20 on."""
    frames, model = torch.arange(5), tiny_stdit()
    calls = [
        {**call, "x_mask": torch.stack([frames > (step < 20), frames < 4, frames > 9, frames > -1])}
        for step, call in enumerate(sora[2])
    ]
    return model, trace(model, (), calls[0]), calls


@pytest.mark.parametrize("method", ["toca", "duca"])
def test_opensora_with_given_frames(given: Any, method: str) -> None:
    policy = {"method": method, "rules": "opensora", "fresh_ratio": 0.3}
    wanted = by_hand.opensora(given[0], given[2], 0.3, duca=method == "duca")
    with torch.no_grad():
        agree(*given, policy, wanted, varying=["x_mask"])


@pytest.mark.parametrize("name", ["flux_toca_n4_r10", "opensora_toca_first14"])
def test_the_loops_themselves_give_what_was_recorded(shared: Any, name: str) -> None:
    recorded = load_file(shared / f"golden/{name}.safetensors")
    pairs = list(zip(recorded["x"], recorded["t"], strict=True))
    made: Iterator[Tensor]
    if name.startswith("flux"):
        weights = shared / "golden/flux_tiny.safetensors"
        model = cg.load_model(weights, arch="FLUX", num_heads=2, axes_dim=[4, 6, 6])
        lasting = {n: recorded[n] for n in ("img_ids", "txt", "txt_ids", "guidance")}
        lasting["y"] = recorded["vec"]
        made = by_hand.flux(model, calls_of(pairs, lasting, "img", "timesteps"), 4, 0.1)  # type: ignore[arg-type]
    else:
        model = cg.load_model(
            shared / "golden/opensora_tiny.safetensors", arch="STDiT3(num_heads=4)"
        )
        lasting = {n: recorded[n] for n in ("y", "mask", "fps", "height", "width")}
        made = by_hand.opensora(model, calls_of(pairs, lasting, "x", "timestep"), 0.1)  # type: ignore[arg-type]
    with torch.no_grad():
        for found, out in zip(made, recorded["out"], strict=True):
            assert relative_error(found, out) < 1e-5


def calls_of(pairs: Sequence[Any], lasting: dict[str, Tensor], latent: str, time: str) -> Calls:
    return [{**lasting, latent: x, time: t} for x, t in pairs]
