"""Weights as they are found in the wild: wrapped, in parts, or something else altogether."""

from __future__ import annotations

import json
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cachegraph.compiler.sources import model_files, open_model
from cachegraph.errors import ModelError
from cachegraph.zoo import DiT, build_model, load_model

ARCH = "DiT(num_heads=2)"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.fixture(scope="module")
def tiny() -> DiT:
    return build_model("DiT(hidden_size=32, depth=1, num_heads=2)", input_size=8)


def refusal(path: Path) -> str:
    arch = None if path.suffix == ".pt2" else ARCH
    with pytest.raises(ModelError) as caught:  # warnings, such as torch's own, are errors here
        open_model(str(path), arch=arch)
    return str(caught.value).removeprefix(f"{path}")


def same(model: nn.Module, other: nn.Module) -> bool:
    states = model.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "model.diffusion_model.", "transformer.", "net.",
     "module._orig_mod."],
)  # fmt: skip
def test_prefixes_are_left_out_and_told(prefix: str, tiny: DiT, tmp_path: Path) -> None:
    torch.save({prefix + k: v for k, v in tiny.state_dict().items()}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="names of weights are read without") as caught:
        model = load_model(tmp_path / "w.pt", ARCH)
    assert same(model, tiny)
    assert len(caught) == 1
    assert all(part in str(caught[0].message) for part in prefix.split("."))


def test_wrappers_of_single_blocks(tiny: DiT, tmp_path: Path) -> None:
    names = {k: k.replace("blocks.0.", "blocks.0._orig_mod.") for k in tiny.state_dict()}
    save_file({names[k]: v for k, v in tiny.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="are read without _orig_mod$"):
        assert same(load_model(tmp_path / "w.safetensors", ARCH), tiny)


def test_what_lies_beside_the_model_is_told(tiny: DiT, tmp_path: Path) -> None:
    state = {f"model.diffusion_model.{k}": v for k, v in tiny.state_dict().items()}
    torch.save(state | {"first_stage_model.conv.weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="w.pt: n") as caught:
        assert same(load_model(tmp_path / "w.pt", ARCH), tiny)
    assert str(caught[1].message).endswith(
        "w.pt: not read, for it is no part of the model: first_stage_model.conv.weight"
    )


def test_two_models_in_one_file(tiny: DiT, tmp_path: Path) -> None:
    state = {f"{part}.{k}": v for part in ("net", "average") for k, v in tiny.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt") == (
        ": the file holds several models; found weights under average., net.; "
        "save the state dict of one of them alone"
    )


def in_parts(folder: Path, model: nn.Module, suffix: str) -> Path:
    """The state dict of a model in two files and their index."""
    state = model.state_dict()
    names = sorted(state)
    listed: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        name = f"model-0000{number}-of-00002{suffix}"
        tensors: dict[str, Tensor] = {k: state[k] for k in part}
        if suffix == ".safetensors":
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)
        listed |= dict.fromkeys(part, name)
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_parts(suffix: str, tiny: DiT, tmp_path: Path) -> None:
    index = in_parts(tmp_path, tiny, suffix)
    first = tmp_path / f"model-00001-of-00002{suffix}"
    assert same(open_model(str(index), arch=ARCH).model, tiny)
    assert model_files(str(index)) == [
        index, first, tmp_path / f"model-00002-of-00002{suffix}"
    ]  # fmt: skip
    assert refusal(first) == (
        ": the file holds one part of 2 of the weights; expected the index of all parts; "
        f"give {index}"
    )
    first.write_text(POINTER)
    assert "git lfs pull" in refusal(index)
    first.unlink()
    assert model_files(str(index)) is None
    assert refusal(index).endswith(f"{first.name}: there is no such weights file")
    index.unlink()
    second = tmp_path / f"model-00002-of-00002{suffix}"
    assert f"get {index.name} and the other parts" in refusal(second)


def test_an_index_that_is_wrong(tiny: DiT, tmp_path: Path) -> None:
    index = in_parts(tmp_path, tiny, ".bin")
    content = json.loads(index.read_text())
    content["weight_map"]["extra"] = "model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    assert "found extra in one of them only" in refusal(index)
    for wrong in ({"x": "../w.pt"}, {"x": "/w.pt"}, {"x": 3}, {"x": "code.py"}, {}, [], None):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert "not an index of weights files; expected the key weight_map" in refusal(index)
    for text, found in (("[", "JSONDecodeError"), ("{}", "KeyError"), (PAGE, "a web page")):
        index.write_text(text)
        assert f"found {found}" in refusal(index)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".pt2"])
def test_what_was_downloaded_in_place_of_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_text(POINTER)
    assert refusal(path) == (
        ": not a readable model file; found a git-lfs pointer, which stands for the file; "
        "fetch the file itself: git lfs pull"
    )
    path.write_text(PAGE)
    assert "found a web page; download the file itself" in refusal(path)
    path.write_text("")
    assert "found an empty file; get the file again" in refusal(path)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("harm",))


def test_advice_to_run_code_is_not_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with tarfile.open(tmp_path / "tar.pt", "w") as file:
        file.add(tmp_path / "script.pt", "x")
    for name in ("garbage", "pickle", "harmful"):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(
            b"garbage" if name == "garbage" else pickle.dumps(Harmful() if name == "harmful" else 1)
        )
    found = {path.stem: refusal(path) for path in tmp_path.iterdir()}
    assert len(found) == 5
    for message in found.values():
        assert "weights_only" not in message
        assert "pickle protocol" not in message
        assert "save only its weights: torch.save(model.state_dict(), 'weights.pt')" in message
    assert "found an archive of another kind (TorchScript)" in found["script"]
    assert "found UnpicklingError: Unsupported operand" in found["garbage"]
    assert "harm" not in capsys.readouterr().out
