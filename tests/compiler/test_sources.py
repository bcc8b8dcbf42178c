"""What MODEL can be, and the example inputs that go with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cachegraph.compiler.sources import open_model
from cachegraph.errors import InputError, ModelError
from cachegraph.model.inputs import parse_input, random_tensor
from cachegraph.zoo import build_model

TINY = "DiT(hidden_size=32, depth=1, num_heads=4)"
FACTORY = f"""
from cachegraph.zoo import build_model
model = build_model({TINY!r}, input_size=8)
def make():
    return model
def with_args():
    return model, model.example_inputs(batch=3)[0]
def with_all():
    x, t, y = model.example_inputs(batch=3)[0]
    return model, (x,), {{"t": t, "y": y}}
def number():
    return 3, 4
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factory_of_{tmp_path.name}"
    tmp_path.joinpath(f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)  # the current folder is looked in
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_weights_and_shipped_models_have_their_own_inputs(tmp_path: Path) -> None:
    save_file(build_model(TINY, 8).state_dict(), tmp_path / "w.safetensors", {"num_heads": "4"})
    source = open_model(str(tmp_path / "w.safetensors"))
    assert (source.args, source.kwargs, source.name) == (None, None, "w")
    assert open_model("digits").name == "digits"


def test_an_architecture_is_shapes_only() -> None:
    source = open_model("DiT-XL/2", shapes_only=True, input_size=64)
    assert source.model.input_size == 64
    assert {p.device.type for p in source.model.parameters()} == {"meta"}
    asked = open_model("DiT-S/8", shapes_only=True, inputs=["x=3,4,32,32:bf16"])
    assert list(asked.kwargs or {}) == ["x", "t", "y"]
    assert {tensor.device.type for tensor in (asked.kwargs or {}).values()} == {"meta"}


def test_factories(factory: str) -> None:
    assert open_model(f"{factory}:make").args is None
    assert open_model(f"{factory}:model").name == "model"
    args, kwargs = (
        open_model(f"{factory}:with_args").args,
        open_model(f"{factory}:with_args").kwargs,
    )
    assert ([len(arg) for arg in args or ()], kwargs) == ([3, 3, 3], {})
    source = open_model(f"{factory}:with_all")
    assert (len(source.args or ()), list(source.kwargs or {})) == (1, ["t", "y"])
    with pytest.raises(ModelError, match=r"returns no model.*found int, int"):
        open_model(f"{factory}:number")


def test_asked_inputs_come_before_the_factory_s(factory: str) -> None:
    source = open_model(f"{factory}:with_all", inputs=["y=7:i32"])
    kwargs = source.kwargs or {}
    assert source.args == ()
    assert list(kwargs) == ["x", "t", "y"]
    assert kwargs["x"].shape == (3, 4, 8, 8)
    assert (kwargs["y"].shape, kwargs["y"].dtype) == ((7,), torch.int32)
    # an option that does not go with the model is refused, not ignored
    with pytest.raises(ModelError, match="--arch goes with a weights file only"):
        open_model(f"{factory}:make", arch="DiT-S/2")
    with pytest.raises(ModelError, match="--input-size goes with an architecture only"):
        open_model(f"{factory}:make", input_size=8)


def test_exported_programs_keep_names_and_constants(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0, bias: torch.Tensor) -> object:
            return self.inner(x) * scale + bias

    model = Scaled().eval()
    x, bias = torch.randn(2, 4), torch.randn(4)
    exported = torch.export.export(model, (x,), {"scale": 3.0, "bias": bias})
    torch.export.save(exported, tmp_path / "p.pt2")
    source = open_model(str(tmp_path / "p.pt2"))
    assert (len(source.args or ()), list(source.kwargs or {})) == (1, ["scale", "bias"])
    assert not any(module.training for module in source.model.modules())
    assert source.model.get_submodule("inner").weight.shape == (4, 4)
    found = source.model(x, bias=bias)  # the exported constant is the default
    torch.testing.assert_close(found, model(x, scale=3.0, bias=bias))
    renamed = open_model(str(tmp_path / "p.pt2"), inputs=["x=2,4:f32"])
    assert list(renamed.kwargs or {}) == ["x", "scale", "bias"]


def test_diffusers_folders(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=8, **sizes)
    model.save_pretrained(tmp_path / "dit")
    folder, inputs = str(tmp_path / "dit"), ["hidden_states=2,4,8,8:f32"]
    loaded = open_model(folder, inputs=inputs)
    assert loaded.name == "dit"
    assert not loaded.model.training
    assert torch.equal(loaded.model.proj_out_1.weight, model.proj_out_1.weight)
    with pytest.raises(ModelError) as missing:
        open_model(folder)
    assert str(missing.value) == (
        f"{folder}: inputs are missing: hidden_states; expected --input NAME=SHAPE:DTYPE, such as "
        "x=2,4,32,32:f32, for each of them; it also takes timestep, class_labels, "
        "cross_attention_kwargs"
    )
    tmp_path.joinpath("dit/diffusion_pytorch_model.safetensors").unlink()
    shapes = open_model(folder, inputs=inputs, shapes_only=True)
    assert {p.device.type for p in shapes.model.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="the weights of the folder cannot be read"):
        open_model(folder, inputs=inputs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a diffusers model folder; expected a config.json that can be read"),
        ({"config.json": "{"}, "not a diffusers model folder; expected a config.json that can be"),
        ({"config.json": "[1]"}, "the config names no model class; expected the key _class_name"),
        ({"config.json": '{"_class_name": "DiTTransformer2D"}'}, "has no model 'DiTTransformer2D'"),
        ({"config.json": '{"_class_name": "DiTPipeline"}'}, "has no model 'DiTPipeline'"),
        ({"model_index.json": "{}"}, "a diffusers pipeline instead of a model; give the model in"),
        ({"manifest.json": "{}"}, "a compiled artifact instead of a model; expected a weights"),
    ],
)
def test_folders_that_are_no_models(files: dict[str, str], message: str, tmp_path: Path) -> None:
    if "_class_name" in json.dumps(files):
        pytest.importorskip("diffusers")
    for name, content in files.items():
        tmp_path.joinpath(name).write_text(content)
    with pytest.raises(ModelError) as refused:
        open_model(str(tmp_path))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "name", "sizes", "dtype"),
    [
        ("x=2,4,8,8:f32", "x", (2, 4, 8, 8), torch.float32),
        ("t=2:torch.int64", "t", (2,), torch.int64),
        ("t=:bfloat16", "t", (), torch.bfloat16),
        ("mask = 2, 7 : b8", "mask", (2, 7), torch.bool),
        ("x=1:half", "x", (1,), torch.float16),
    ],
)
def test_inputs_are_parsed(
    text: str, name: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    parsed, spec = parse_input(text)
    assert (parsed, spec.shape, spec.dtype) == (name, sizes, dtype)


@pytest.mark.parametrize(
    ("text", "value"),
    [("height=32", 32), ("scale=0.5", 0.5), ("ids=[[1,8]]", [[1, 8]]), (" mask = null", None)],
)
def test_constants_are_parsed(text: str, value: object) -> None:
    assert parse_input(text) == (text.partition("=")[0].strip(), value)


@pytest.mark.parametrize(
    "text", ["x", "=3", "x=", "x=2,2", "=2:f32", "x:2=f32", "x=2,0:f32", "x=-1:f32"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--input .*: (not an input|the shape cannot be read)"):
        parse_input(text)


def test_random_contents_are_what_models_take() -> None:
    def drawn(name: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        return random_tensor(name, (64,), dtype, torch.Generator().manual_seed(seed))

    assert drawn("timestep", torch.float32).unique().tolist() == [500]
    assert drawn("x.mask", torch.int64).unique().tolist() == [1]
    assert drawn("mask", torch.bool).all()
    assert drawn("y", torch.int64).unique().tolist() == [0, 1]
    assert drawn("x", torch.bfloat16).float().std() > 0.5
    assert drawn("x", torch.complex64).imag.std() > 0.5
    assert torch.equal(drawn("x", torch.float32), drawn("x", torch.float32))
    assert not torch.equal(drawn("x", torch.float32), drawn("x", torch.float32, seed=1))
