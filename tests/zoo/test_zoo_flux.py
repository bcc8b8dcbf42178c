"""FLUX: the published code's outputs, recognition of weights, published sizes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cachegraph.errors import ModelError
from cachegraph.zoo import Flux, build_model, load_model
from tests.models import relative_error, tiny_flux

AXES = [4, 6, 6]


@pytest.mark.parametrize(
    "said",
    [
        {"arch": "FLUX(num_heads=2, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True)"},
        {"arch": "FLUX", "num_heads": 2, "axes_dim": AXES, "mlp_ratio": 4.0},
        {"axes_dim": tuple(AXES)},
    ],
    ids=["arch", "options", "recognised"],
)
def test_recording_of_the_published_model_is_reproduced(shared: Any, said: Any) -> None:
    model = load_model(shared / "golden/flux_tiny.safetensors", **said)
    recording = load_file(shared / "golden/flux_toca_n4_r10.safetensors")
    lasting = {name: recording[name] for name in ("img_ids", "txt", "txt_ids", "guidance")}
    for step in (0, 30):
        x, t = recording["x"][step], recording["t"][step]
        found = model(img=x, timesteps=t, y=recording["vec"], **lasting)
        assert relative_error(found, recording["full"][step]) < 1e-5


@pytest.mark.parametrize(
    ("arch", "name", "parameters", "text"),
    [
        ("FLUX", "FLUX-dev", 11_901_408_320, 512),
        ("FLUX-schnell", "FLUX-schnell", 11_891_178_560, 256),
    ],
)
def test_published_sizes(arch: str, name: str, parameters: int, text: int) -> None:
    model = build_model(arch, device="meta")
    assert model.arch == name
    assert sum(p.numel() for p in model.parameters()) == parameters
    args, kwargs = model.example_inputs()
    assert kwargs["img"].shape == (1, 4096, 64)
    assert kwargs["txt"].shape == (1, text, 4096)
    assert ("guidance" in kwargs) == (name == "FLUX-dev")
    assert model(*args, **kwargs).shape == (1, 4096, 64)
    small = build_model("FLUX(depth=1, depth_single_blocks=1)", input_size=16, device="meta")
    assert small.example_inputs()[1]["img"].shape == (1, 64, 64)


def test_weights_tell_all_but_the_axes(tmp_path: Any) -> None:
    model = tiny_flux(guidance_embed=False, qkv_bias=False)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ModelError, match=r"16 channels of a head .*arch='FLUX\(axes_dim="):
        load_model(path)
    loaded = load_model(path, arch="FLUX(axes_dim=[4, 6, 6])")
    args, kwargs = model.example_inputs(2)
    assert torch.equal(loaded(*args, **kwargs), model(*args, **kwargs))


def test_positions_and_guidance_matter() -> None:
    model = tiny_flux()
    _, inputs = model.example_inputs(2)
    out = model(**inputs)
    for name in ("img_ids", "txt_ids", "guidance", "y", "timesteps"):
        assert relative_error(model(**{**inputs, name: inputs[name] + 1}), out) > 1e-5, name


def cut(inputs: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    return {**inputs, **{name: change(inputs[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img": lambda v: v[..., :3]}, r"img and img_ids .*expected \(B, tokens, 16\)"),
        ({"txt_ids": lambda v: v[:, :2]}, "txt and txt_ids .*wrong shape"),
        ({"guidance": lambda v: None}, "lacks guidance; expected a strength"),
    ],
)
def test_wrong_inputs_are_refused(changes: Any, message: str) -> None:
    model = tiny_flux()
    with pytest.raises(ModelError, match=message):
        model(**cut(model.example_inputs()[1], **changes))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("FLUX(axes_dim=[4, 6])", "axes_dim do not fill a head of 128.*sum is 128"),
        ("FLUX(axes_dim=4)", "option 'axes_dim' .*a list of positive whole numbers; found 4"),
        ("FLUX(qkv_bias=1)", "option 'qkv_bias' .*True or False"),
        ("FLUX(mlp_ratio=-1)", "option 'mlp_ratio' .*a positive number"),
        ("FLUX(num_head=2)", "unknown option 'num_head' of FLUX.*did you mean 'num_heads'"),
        ("FLUX(num_heads=7)", "hidden_size 3072 cannot be divided by num_heads"),
        ("FLUX-pro", "unknown architecture 'FLUX-pro'"),
    ],
)
def test_wrong_options_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(arch, device="meta")


def test_shipped_models_take_no_options() -> None:
    with pytest.raises(ModelError, match=r"takes no architecture.*found depth"):
        load_model("digits", depth=3)


def test_names_as_published() -> None:
    names = set(Flux(depth=1, depth_single_blocks=1, hidden_size=256, num_heads=2).state_dict())
    assert {
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "double_blocks.0.txt_mod.lin.weight",
        "single_blocks.0.modulation.lin.bias",
        "final_layer.adaLN_modulation.1.weight",
        "guidance_in.out_layer.bias",
    } < names
