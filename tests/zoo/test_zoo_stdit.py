"""STDiT3 of Open-Sora: the published code's outputs, recognition, sizes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from cachegraph.errors import ModelError
from cachegraph.zoo import build_model, load_model
from tests.models import relative_error, tiny_stdit


@pytest.mark.parametrize("arch", [None, "STDiT3", "STDiT3(num_heads=4, patch_size=[1, 2, 2])"])
def test_recording_of_the_published_model_is_reproduced(shared: Any, arch: str | None) -> None:
    model = load_model(shared / "golden/opensora_tiny.safetensors", arch)
    recording = load_file(shared / "golden/opensora_toca_first14.safetensors")
    lasting = {name: recording[name] for name in ("y", "mask", "fps", "height", "width")}
    for step in (0, 9):
        found = model(x=recording["x"][step], timestep=recording["t"][step], **lasting)
        assert relative_error(found, recording["full"][step]) < 1e-5


def test_published_sizes() -> None:
    model = build_model("STDiT3", device="meta")
    assert model.arch == "STDiT3-XL/2"
    assert build_model("STDiT3-3B/2", device="meta").arch == "STDiT3-3B/2"
    args, kwargs = model.example_inputs()
    assert kwargs["x"].shape == (2, 4, 15, 60, 106)  # 2 s at 480p
    assert model(*args, **kwargs).shape == (2, 8, 15, 60, 106)


def test_each_sample_sees_its_own_text() -> None:
    model = tiny_stdit()
    _, inputs = model.example_inputs()
    inputs["mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    padded = model(**inputs)
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"y": inputs["y"][1:, :, :2], "mask": None}
    assert relative_error(model(**alone), padded[1:]) < 1e-5
    changed = inputs["y"].clone()
    changed[1, :, 2:] = 7
    assert torch.equal(model(**{**inputs, "y": changed}), padded)


def test_fewer_rows_serve_both_halves() -> None:
    model = tiny_stdit()
    _, inputs = model.example_inputs(4)
    inputs["mask"][1, 3:] = 0
    inputs["mask"][3, 3:] = 0
    inputs["fps"] = torch.tensor([24.0, 12.0, 24.0, 12.0])
    rows = {name: inputs[name][:2] for name in ("mask", "fps", "height", "width")}
    assert relative_error(model(**{**inputs, **rows}), model(**inputs)) < 1e-6


def test_frame_rate_and_size_matter() -> None:
    model = tiny_stdit()
    _, inputs = model.example_inputs()
    out = model(**inputs)
    for name in ("fps", "height", "width", "timestep"):
        assert relative_error(model(**{**inputs, name: inputs[name] * 2}), out) > 1e-5, name


def test_given_frames_are_at_timestep_zero() -> None:
    """But for the last layer, see tests/compiler/test_by_hand.py."""
    model, ends = tiny_stdit(), []
    model.final_layer.register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    _, inputs = model.example_inputs()
    out = model(**inputs)
    assert torch.equal(model(**inputs, x_mask=torch.ones(2, 3)), out)
    model(**inputs, x_mask=torch.zeros(2, 3, dtype=torch.bool))
    model(**inputs | {"timestep": torch.zeros(2)})
    assert torch.equal(ends[2], ends[3])
    found = model(**inputs, x_mask=torch.tensor([[False, True, True], [True, True, True]]))
    assert relative_error(found[:1], out[:1]) > 1e-3
    assert torch.equal(found[1:], out[1:])


def test_odd_sizes_are_padded_and_cut() -> None:
    model = tiny_stdit()
    _, inputs = model.example_inputs()
    odd = inputs["x"][..., :3]
    padded = F.pad(odd, (0, 1))
    found = model(**{**inputs, "x": odd})
    assert torch.equal(found, model(**{**inputs, "x": padded})[..., :3])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda v: v[0], r"input of .*expected \(B, 4, frames, height, width\)"),
        ("y", lambda v: v[..., :3], r"text of .*expected \(B, 1, L, 8\)"),
        ("mask", lambda v: v[:, :4], "mask: the text is longer than its mask.*cut the text"),
        (
            "x_mask",
            lambda v: torch.ones(2, 4),
            r"mask of the frames .*expected \(2, 3\).*found \(2, 4",
        ),
        ("x_mask", lambda v: torch.ones(1, 3), r"mask of the frames .*expected \(2, 3\)"),
        ("fps", lambda v: None, "needs fps, height and width"),
        ("fps", lambda v: v.repeat(2)[:3], "fps has the wrong number of rows; expected a divisor"),
    ],
)
def test_wrong_inputs_are_refused(name: str, change: Any, message: str) -> None:
    model = tiny_stdit()
    _, inputs = model.example_inputs()
    with pytest.raises(ModelError, match=message):
        model(**{**inputs, name: change(inputs.get(name))})


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="hidden_size 30 cannot be divided by num_heads"):
        build_model("STDiT3(hidden_size=30, num_heads=4)", device="meta")
