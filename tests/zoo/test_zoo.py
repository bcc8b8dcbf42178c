"""The known architectures: the published code's outputs, recognition of weights, refusals."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cachegraph.errors import ModelError
from cachegraph.zoo import DiT, build_model, load_model, recognise

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recordings of published implementations are not here"
)
TINY = "DiT(hidden_size=32, depth=2, num_heads=2)"
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.fixture
def tiny() -> DiT:
    return build_model(TINY, input_size=8)


def on_meta(**sizes: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return DiT(**sizes).state_dict()


def recognised(
    monkeypatch: pytest.MonkeyPatch,
    state: dict[str, Tensor],
    device: str = "meta",
    **metadata: str,
) -> DiT:
    monkeypatch.setattr(recognise, "read_weights", lambda path: (state, metadata))
    return load_model("weights.safetensors", device=device)


def saved(folder: Path, content: object, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


# --- the published computation


@needs_golden
def test_recording_of_the_published_model_is_reproduced() -> None:
    model = load_model(GOLDEN / "dit_tiny.safetensors", arch="DiT(num_heads=4)")
    recording = load_file(GOLDEN / "plain_ddim20.safetensors")
    y = recording["y"]
    for x, t, wanted in zip(recording["x"], recording["t"], recording["out"], strict=True):
        error = (model(x, t, y) - wanted).norm() / wanted.norm()
        assert error < 1e-5  # a GELU without tanh would make 1e-4


@needs_golden
def test_position_embedding_is_the_published_one() -> None:
    published = load_file(GOLDEN / "dit_tiny.safetensors")["pos_embed"]
    own = DiT(input_size=16, hidden_size=64, depth=1, num_heads=4).pos_embed
    assert torch.equal(own, published)


def test_export_keeps_the_batch_free_and_the_attention_whole(tiny: DiT) -> None:
    args, kwargs = tiny.example_inputs(batch=2)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        tiny, args, kwargs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False
    )
    other, _ = tiny.example_inputs(batch=5)
    torch.testing.assert_close(program.module()(*other), tiny(*other))
    assert "scaled_dot_product_attention" in program.graph_module.code


@pytest.mark.parametrize(("channels", "guided"), [(4, 3), (1, 1)])
def test_guidance_as_published(channels: int, guided: int) -> None:
    options = f"hidden_size=32, depth=2, num_heads=2, in_channels={channels}"
    model = build_model(f"DiT({options})", input_size=8)
    (x, t, y), _ = model.example_inputs(batch=4)
    y[2:] = model.num_classes
    out = model.forward_with_cfg(x, t, y, 3.0)
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    noise = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(out[:2, :guided], noise[:, :guided])
    torch.testing.assert_close(out[2:, :guided], noise[:, :guided])
    torch.testing.assert_close(out[:, guided:], torch.cat([cond, uncond])[:, guided:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run(dtype: torch.dtype) -> None:
    model = build_model(TINY, input_size=8).to(dtype)
    args, _ = model.example_inputs()
    assert model(*args).dtype == dtype


def test_labels_are_dropped_in_training_only() -> None:
    model = build_model(TINY, input_size=8)
    embedder = model.y_embedder
    y = torch.zeros(200, dtype=torch.int64)
    assert torch.equal(embedder(y), embedder.embedding_table(y))
    null = embedder.embedding_table.weight[model.num_classes]
    dropped = (embedder.train()(y) == null).all(1).sum()
    assert 1 <= dropped <= 60  # a tenth of 200 is 20


def test_wrong_shapes_are_refused(tiny: DiT) -> None:
    (x, t, y), _ = tiny.example_inputs()
    with pytest.raises(ModelError, match=r"wrong shape; expected \(B, 4, 8, 8\); found \(2, 3, 8"):
        tiny(x[:, :3], t, y)
    with pytest.raises(ModelError, match="hidden_size 30 cannot be divided by num_heads"):
        DiT(hidden_size=30, depth=1, num_heads=4)
    with pytest.raises(ModelError, match="input_size 9 cannot be divided by patch_size"):
        DiT(input_size=9, hidden_size=32, depth=1, num_heads=4)


# --- recognition


@pytest.mark.parametrize("letter", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes_are_recognised(
    monkeypatch: pytest.MonkeyPatch, letter: str, patch: int
) -> None:
    depth, hidden, heads = SIZES[letter]
    state = on_meta(
        input_size=64, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads
    )
    model = recognised(monkeypatch, state)
    assert model.arch == f"DiT-{letter}/{patch}"
    assert (model.input_size, model.in_channels, model.num_classes) == (64, 4, 1000)
    assert model.learn_sigma
    assert len(model.blocks) == depth
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_unpublished_sizes_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"input_size": 12, "patch_size": 3, "in_channels": 1, "hidden_size": 40, "depth": 3}
    more = {"mlp_ratio": 1.7, "num_classes": 7, "learn_sigma": False}
    state = on_meta(num_heads=5, **sizes, **more)
    model = recognised(monkeypatch, state, num_heads="5")
    assert model.arch == "DiT custom"
    assert (model.input_size, model.patch_size, model.in_channels) == (12, 3, 1)
    assert (model.num_classes, model.num_heads, model.learn_sigma) == (7, 5, False)
    assert model.blocks[0].mlp.fc1.out_features == 68


def test_heads_that_cannot_be_known_are_asked_for(tmp_path: Path, tiny: DiT) -> None:
    path = saved(tmp_path, tiny.state_dict())
    with pytest.raises(ModelError, match=r"weights\.pt: the number of .*arch='DiT\(num_heads=4\)'"):
        load_model(path)
    assert load_model(path, arch="DiT(num_heads=2)").num_heads == 2
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata={"num_heads": "2"})
    loaded = load_model(tmp_path / "w.safetensors")
    args, _ = tiny.example_inputs()
    assert torch.equal(loaded(*args), tiny(*args))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("key", ["ema", "model", "state_dict", None])
def test_nested_state_dicts_are_found(
    tmp_path: Path, tiny: DiT, key: str | None, suffix: str
) -> None:
    state = OrderedDict(tiny.state_dict())
    # what DiT's training script saves beside the weights
    content = state if key is None else {key: state, "args": argparse.Namespace(lr=1), "epoch": 3}
    loaded = load_model(saved(tmp_path, content, f"weights{suffix}"), arch="DiT(num_heads=2)")
    assert torch.equal(loaded.x_embedder.proj.weight, tiny.x_embedder.proj.weight)


def test_averaged_weights_are_preferred(tmp_path: Path, tiny: DiT) -> None:
    other = build_model(TINY, input_size=8, seed=1)
    content = {"model": other.state_dict(), "ema": tiny.state_dict()}
    loaded = load_model(saved(tmp_path, content), arch="DiT(num_heads=2)")
    assert torch.equal(loaded.final_layer.linear.weight, tiny.final_layer.linear.weight)


def test_tensors_become_the_parameters(tiny: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {key: tensor.clone() for key, tensor in tiny.state_dict().items()}
    model = recognised(monkeypatch, state, device="cpu", num_heads="2")
    for key, parameter in model.named_parameters():
        assert parameter.data_ptr() == state[key].data_ptr()


def is_mapped(tensor: Tensor, path: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if line.endswith(f" {path}") and start <= tensor.data_ptr() < end:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files here")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_are_mapped_instead_of_read(tmp_path: Path, tiny: DiT, name: str) -> None:
    if name.endswith(".pt"):
        saved(tmp_path, tiny.state_dict(), name)
    else:
        save_file(tiny.state_dict(), tmp_path / name)
    model = load_model(tmp_path / name, arch="DiT(num_heads=2)")
    assert all(is_mapped(parameter, tmp_path / name) for parameter in model.parameters())


def test_old_torch_format_is_read(tmp_path: Path, tiny: DiT) -> None:
    path = tmp_path / "old.pt"
    torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=False)
    assert load_model(path, arch="DiT(num_heads=2)").arch == "DiT custom"


# --- refusals


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_pickled_modules_are_refused(tmp_path: Path, tiny: DiT) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(saved(tmp_path, tiny))
    assert "found the class cachegraph.zoo.dit.DiT" in str(refusal.value)
    assert "torch.save(model.state_dict(), " in str(refusal.value)
    assert str(tmp_path / "weights.pt") in str(refusal.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, tiny: DiT, zipped: bool) -> None:
    path = tmp_path / "trap.pt"
    content = {"ema": tiny.state_dict(), "args": Trap()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"can run code when they are read.*exec"):
        load_model(path)


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    state = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).state_dict()
    message = (
        r"no known architecture; expected DiT or PixArt or FLUX or STDiT3; "
        r"found 8 tensors: 0\.weight, .* and 3 more"
    )
    with pytest.raises(ModelError, match=message):
        load_model(saved(tmp_path, state))


def test_all_that_does_not_fit_is_named(tmp_path: Path, tiny: DiT) -> None:
    state = tiny.state_dict()
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.1.attn.extra"] = torch.zeros(1)
    state["t_embedder.mlp.2.bias"] = torch.zeros(7)
    with pytest.raises(ModelError) as refusal:
        load_model(saved(tmp_path, state), arch="DiT(num_heads=2)")
    text = str(refusal.value)
    assert "missing: blocks.1.attn.qkv.bias;" in text
    assert "unknown: blocks.1.attn.extra;" in text
    assert "of another shape: t_embedder.mlp.2.bias (7,) instead of (32,)" in text


def test_arch_that_the_weights_are_not_is_refused(tmp_path: Path, tiny: DiT) -> None:
    with pytest.raises(ModelError, match=r"tensors of DiT-S/2; found missing: blocks\.2\."):
        load_model(saved(tmp_path, tiny.state_dict()), arch="DiT-S/2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 15, 32)}, "square number of tokens; found 15"),
        ({"pos_embed": torch.zeros(15, 32)}, "3 dimensions, none of them 0; found \\(15, 32\\)"),
        ({"final_layer.linear.weight": torch.zeros(32, 0)}, "none of them 0"),
        ({"pos_embed": None}, "lack a tensor .*expected pos_embed"),
        ({"pos_embed": 3}, "not all entries .*found pos_embed"),
        ({7: torch.zeros(1)}, "not all entries .*found 7"),
        ({"blocks.123456789.attn.qkv.bias": torch.zeros(1)}, "unknown: blocks.123456789"),
    ],
)
def test_odd_weights_are_refused(
    tmp_path: Path, tiny: DiT, change: dict[Any, object], message: str
) -> None:
    state = {k: v for k, v in (tiny.state_dict() | change).items() if v is not None}
    with pytest.raises(ModelError, match=f"weights.pt.*{message}"):
        load_model(saved(tmp_path, state), arch="DiT(num_heads=2)")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", bytes(2000)])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}: not a readable"):
        load_model(tmp_path / name)


def test_truncated_files_are_refused(tmp_path: Path, tiny: DiT) -> None:
    path = saved(tmp_path, tiny.state_dict())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="not a readable"):
        load_model(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("digit", "no weights file.*did you mean 'digits'"),
        ("DiT-XL/2", r"no weights file.*build_model\('DiT-XL/2'\)"),
        ("weights.ckpt", r"expected a name in \.pt, \.pth, \.safetensors"),
        ("missing.pt", r"missing\.pt: there is no such weights file"),
    ],
)
def test_names_that_are_no_weights_are_refused(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_damaged_bytes_are_refused(tmp_path: Path, tiny: DiT) -> None:
    """Whichever byte of the pickle is changed, torch's many exceptions become one of ours."""
    path = saved(tmp_path, {"pos_embed": tiny.pos_embed.data[:, :1]})
    whole = path.read_bytes()
    start = whole.index(b"pos_embed")
    for place in range(start, start + 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        with pytest.raises(ModelError):
            load_model(path)


def test_archives_of_something_else_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ModelError, match=r"other\.pt: not a readable weights file; found Runtime"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2)])
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ModelError, match="no state dict in the file"):
        load_model(saved(tmp_path, content))


# --- random models by name


def test_models_are_built_by_name() -> None:
    model = build_model("DiT-XL/2", input_size=64, device="meta")
    assert (model.arch, model.input_size) == ("DiT-XL/2", 64)
    args, kwargs = model.example_inputs(batch=3)
    assert kwargs == {}
    assert model(*args).shape == (3, 8, 64, 64)
    assert model.pos_embed.is_meta


def test_random_weights_are_seeded_and_nowhere_zero(tiny: DiT) -> None:
    torch.rand(1)  # else the state would be the one that building the fixture left
    before = torch.get_rng_state()
    again = build_model(TINY, input_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    other = build_model(TINY, input_size=8, seed=1)
    for key, value in tiny.named_parameters():
        assert torch.equal(again.get_parameter(key), value)
        if key != "pos_embed":  # it is no random number, and sin 0 is 0
            assert not torch.equal(other.get_parameter(key), value)
            assert value.abs().min() > 0


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("DiT-XL/3", r"unknown architecture 'DiT-XL/3'.*did you mean 'DiT-XL/\d'"),
        ("DiT-tiny", "unknown architecture"),
        ("UNet(depth=3)", "unknown architecture"),
        ("DiT(num_head=4)", "unknown option 'num_head' of DiT.*did you mean 'num_heads'"),
        ("DiT(num_heads=four)", "option 'num_heads' .* found 'four'"),
        ("DiT(num_heads=0)", "a positive whole number"),
        ("DiT(hidden_size=64, num_heads=5)", "cannot be divided by num_heads"),
    ],
)
def test_unknown_names_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(arch, device="meta")
