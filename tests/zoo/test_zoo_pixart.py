"""PixArt-alpha: the published code's outputs, padded captions, recognition of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from cachegraph.errors import ModelError
from cachegraph.model.trace import trace
from cachegraph.zoo import PixArt, build_model, load_model, recognise
from cachegraph.zoo.pixart import CrossAttention

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recordings of published implementations are not here"
)
HEADS = "PixArt(num_heads=2)"
SIZES = "hidden_size=32, depth=2, caption_channels=12, model_max_length=5"
TINY = f"PixArt(num_heads=2, {SIZES})"
MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])  # published captions are padded at the end
FULL_STEPS = (0, 6, 9, 12, 15, 18)  # of ToCa with N=3 and T=20


@pytest.fixture
def tiny() -> PixArt:
    return build_model(TINY, input_size=8)


def on_meta(**sizes: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return PixArt(**sizes).state_dict()


def recognised(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], **metadata: str
) -> PixArt:
    monkeypatch.setattr(recognise, "read_weights", lambda path: (state, metadata))
    return load_model("weights.safetensors", device="meta")


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


# --- the published computation


@needs_golden
def test_recording_of_the_published_model_is_reproduced() -> None:
    model = load_model(GOLDEN / "pixart_tiny.safetensors", arch="PixArt(num_heads=4)")
    recording = load_file(GOLDEN / "pixart_toca_n3_r30.safetensors")
    steps, batch = recording["t"].shape
    y = recording["y"].repeat(steps, 1, 1, 1)
    # one call for all steps: samples do not see each other
    out = model(recording["x"].flatten(0, 1), recording["t"].flatten(), y)
    out = out.unflatten(0, (steps, batch))
    for step in range(steps):
        full, cached = recording["full"][step], recording["out"][step]
        assert (out[step] - full).norm() / full.norm() < 2e-6
        if step in FULL_STEPS:
            assert (out[step] - cached).norm() / cached.norm() < 2e-6


@needs_golden
def test_position_embedding_is_the_published_one() -> None:
    published = load_file(GOLDEN / "pixart_tiny.safetensors")["pos_embed"]
    own = PixArt(input_size=16, hidden_size=64, depth=1, num_heads=4).pos_embed
    assert torch.equal(own, published)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padded_captions_are_as_captions_without_padding(tiny: PixArt, dtype: torch.dtype) -> None:
    (x, t, y), _ = tiny.example_inputs(batch=2)
    out = tiny(x, t, y, MASK.to(dtype))
    for i, valid in enumerate(MASK.bool()):
        one = slice(i, i + 1)
        torch.testing.assert_close(out[one], tiny(x[one], t[one], y[one][:, :, valid]))
    assert (out - tiny(x, t, y)).norm() > 1e-3 * out.norm()
    assert torch.equal(out, tiny(x, t, y, mask=2 * MASK))
    assert torch.equal(out, tiny(x, t, y.squeeze(1), MASK))


def test_cross_attention_equals_the_block_diagonal_form() -> None:
    """The form of the published code: one sequence of all valid tokens, a block per sample."""
    torch.manual_seed(0)
    batch, tokens, heads, width = 2, 6, 2, 32
    layer = CrossAttention(width, heads)
    x, y = torch.randn(batch, tokens, width), torch.randn(batch, 5, width)
    valid = MASK.bool()
    out = layer(x, y, valid[:, None, None, :])

    query = layer.q_linear(x).reshape(-1, heads, width // heads)
    key, value = layer.kv_linear(y[valid]).reshape(-1, 2, heads, width // heads).unbind(1)
    owner = torch.arange(batch)[:, None].expand_as(valid)[valid]
    own = torch.arange(batch).repeat_interleave(tokens)[:, None] == owner
    scores = torch.einsum("qhd,khd->hqk", query, key) / (width // heads) ** 0.5
    weights = F.softmax(scores.masked_fill(~own, -torch.inf), dim=-1)
    strung = torch.einsum("hqk,khd->qhd", weights, value).reshape(batch, tokens, width)
    torch.testing.assert_close(out, layer.proj(strung))


def test_mask_of_one_half_serves_both(tiny: PixArt) -> None:
    (x, t, y), _ = tiny.example_inputs(batch=4)
    out = tiny(x, t, y, MASK)
    assert torch.equal(out, tiny(x, t, y, torch.cat([MASK, MASK])))
    assert not torch.equal(out, tiny(x, t, y, MASK.repeat_interleave(2, dim=0)))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("channels", "guided"), [(4, 3), (1, 1)])
def test_guidance_as_published(channels: int, guided: int, mask: Tensor | None) -> None:
    model = build_model(f"{TINY[:-1]}, in_channels={channels})", input_size=8)
    (x, t, y), _ = model.example_inputs(batch=4)
    y[2:] = model.y_embedder.y_embedding
    out = model.forward_with_cfg(x, t, y, 3.0, mask)
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y, mask).chunk(2)
    noise = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(out[:2, :guided], noise[:, :guided])
    torch.testing.assert_close(out[2:, :guided], noise[:, :guided])
    torch.testing.assert_close(out[:, guided:], torch.cat([cond, uncond])[:, guided:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run(tiny: PixArt, dtype: torch.dtype) -> None:
    args, _ = tiny.to(dtype).example_inputs()
    assert tiny(*args, MASK).dtype == dtype


def test_captions_are_dropped_in_training_only(tiny: PixArt) -> None:
    embedder = tiny.y_embedder
    y = torch.zeros(200, 5, 12)
    given, null = embedder.y_proj(y[0]), embedder.y_proj(embedder.y_embedding)
    torch.testing.assert_close(embedder(y), given.expand(200, 5, 32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = (embedder.train()(y) - null).abs().amax((1, 2)) < 1e-5
    assert 1 <= dropped.sum() <= 60  # a tenth of 200 is 20


# --- tracing


@pytest.mark.parametrize("mask", [None, MASK])
def test_export_keeps_the_batch_free_and_the_attention_whole(
    tiny: PixArt, mask: Tensor | None
) -> None:
    args, _ = tiny.example_inputs(batch=2)
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, batch, batch, None if mask is None else batch)
    program = torch.export.export(tiny, (*args, mask), dynamic_shapes=shapes, strict=False)
    other, _ = tiny.example_inputs(batch=5)
    more = None if mask is None else torch.cat([mask, mask, mask[:1]])
    torch.testing.assert_close(program.module()(*other, more), tiny(*other, more))
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert len(program.graph.find_nodes(op="call_function", target=attention)) == 4


@pytest.mark.parametrize("kwargs", [{}, {"mask": MASK}], ids=["whole", "padded"])
def test_every_block_has_three_sites(tiny: PixArt, kwargs: dict[str, Tensor]) -> None:
    traced = trace(tiny, tiny.example_inputs()[0], kwargs)
    kinds = ("attn", "cross_attn", "mlp")
    wanted = [(f"blocks.{i}.{kind}", kind) for i in range(2) for kind in kinds]
    assert [(site.name, site.kind.value) for site in traced.sites] == wanted
    assert [site.module for site in traced.sites] == [name for name, _ in wanted]
    assert traced.batch is not None


# --- recognition


def test_published_size_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recognised(monkeypatch, on_meta())
    assert model.arch == "PixArt-XL/2"
    assert (model.input_size, model.in_channels, model.num_heads) == (32, 4, 16)
    assert (model.caption_channels, model.model_max_length, model.pred_sigma) == (4096, 120, True)
    assert len(model.blocks) == 28
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert recognised(monkeypatch, on_meta(input_size=64)).input_size == 64


def test_unpublished_sizes_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"input_size": 12, "patch_size": 3, "in_channels": 1, "hidden_size": 40, "depth": 3}
    text = {"caption_channels": 7, "model_max_length": 9}
    state = on_meta(num_heads=5, mlp_ratio=1.7, pred_sigma=False, **sizes, **text)
    model = recognised(monkeypatch, state, num_heads="5")
    assert model.arch == "PixArt custom"
    assert (model.input_size, model.patch_size, model.in_channels) == (12, 3, 1)
    assert (model.num_heads, model.pred_sigma, len(model.blocks)) == (5, False, 3)
    assert (model.caption_channels, model.model_max_length) == (7, 9)
    assert model.blocks[0].mlp.fc1.out_features == 68


@pytest.mark.parametrize("key", ["state_dict", None])
def test_saved_weights_compute_the_same(tmp_path: Path, tiny: PixArt, key: str | None) -> None:
    state = tiny.state_dict()
    assert {"pos_embed", "y_embedder.y_embedding"} <= state.keys()
    # the published training script saves its epoch beside the weights
    loaded = load_model(saved(tmp_path, {key: state, "epoch": 3} if key else state), arch=HEADS)
    args, _ = tiny.example_inputs()
    assert torch.equal(loaded(*args, MASK), tiny(*args, MASK))
    assert torch.equal(loaded.y_embedder.y_embedding, tiny.y_embedder.y_embedding)


def test_position_embedding_of_the_file_is_used(tmp_path: Path, tiny: PixArt) -> None:
    state = tiny.state_dict() | {"pos_embed": torch.full_like(tiny.pos_embed, 0.5)}
    loaded = load_model(saved(tmp_path, state), arch=HEADS)
    assert torch.equal(loaded.pos_embed, state["pos_embed"])


def test_heads_that_cannot_be_known_are_asked_for(tmp_path: Path, tiny: PixArt) -> None:
    message = r"heads of a PixArt of width 32 .*\(1152\).*arch='PixArt\(num_heads=4\)'"
    with pytest.raises(ModelError, match=message):
        load_model(saved(tmp_path, tiny.state_dict()))
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata={"num_heads": "4"})
    assert load_model(tmp_path / "w.safetensors").num_heads == 4


@pytest.mark.parametrize("embedder", ["csize_embedder", "ar_embedder"])
def test_multi_scale_weights_are_refused(tmp_path: Path, tiny: PixArt, embedder: str) -> None:
    state = tiny.state_dict() | {f"{embedder}.mlp.0.weight": torch.zeros(4, 256)}
    with pytest.raises(ModelError, match=f"multi-scale .* found {embedder}.mlp.0.weight; use Pix"):
        load_model(saved(tmp_path, state))


def test_relatives_are_not_mistaken(tmp_path: Path, tiny: PixArt) -> None:
    """Open-Sora's STDiT3 has the same embedders."""
    state = {k.replace("blocks.", "spatial_blocks."): v for k, v in tiny.state_dict().items()}
    with pytest.raises(ModelError, match="no known architecture; expected DiT or PixArt"):
        load_model(saved(tmp_path, state))


def test_all_that_does_not_fit_is_named(tmp_path: Path, tiny: PixArt) -> None:
    state = tiny.state_dict()
    del state["blocks.1.cross_attn.kv_linear.bias"]
    state["blocks.1.attn.rel_pos_h"] = torch.zeros(1)
    state["t_block.1.bias"] = torch.zeros(7)
    with pytest.raises(ModelError) as refusal:
        load_model(saved(tmp_path, state), arch=HEADS)
    text = str(refusal.value)
    assert "missing: blocks.1.cross_attn.kv_linear.bias;" in text
    assert "unknown: blocks.1.attn.rel_pos_h;" in text
    assert "of another shape: t_block.1.bias (7,) instead of (192,)" in text


# --- by name, and refusals


def test_models_are_built_by_name() -> None:
    model = build_model("PixArt-XL/2", device="meta")
    assert (model.arch, model.input_size) == ("PixArt-XL/2", 32)
    args, kwargs = model.example_inputs(batch=3)
    assert kwargs == {}
    assert args[2].shape == (3, 1, 120, 4096)
    assert model(*args).shape == (3, 8, 32, 32)
    assert model.pos_embed.is_meta


def test_random_weights_are_seeded(tiny: PixArt) -> None:
    again, other = build_model(TINY, input_size=8), build_model(TINY, input_size=8, seed=1)
    for key, value in tiny.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        if key != "pos_embed":
            assert not torch.equal(other.state_dict()[key], value)
            assert value.abs().min() > 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :3], r"expected \(B, 4, 8, 8\); found \(2, 3, 8, 8\)"),
        ("y", lambda y: y[..., :7], r"\(B, 1, L, 12\) or \(B, L, 12\); found \(2, 1, 5, 7\)"),
        ("y", lambda y: y.repeat(1, 2, 1, 1), r"text of .*found \(2, 2, 5, 12\)"),
        ("y", lambda y: y[:, 0, 0], r"text of .*found \(2, 12\)"),
        ("mask", lambda mask: mask[:, :4], r"expected \(2, 5\), or a divisor .*found \(2, 4\)"),
        ("mask", lambda mask: mask[:0], r"mask of .*found \(0, 5\)"),
        ("mask", lambda mask: mask.repeat(2, 1), r"mask of .*found \(4, 5\)"),
        ("mask", lambda mask: mask[0], r"mask of .*found \(5,\)"),
    ],
)
def test_wrong_shapes_are_refused(tiny: PixArt, name: str, change: Any, message: str) -> None:
    x, t, y = tiny.example_inputs()[0]
    inputs = {"x": x, "t": t, "y": y, "mask": MASK}
    inputs[name] = change(inputs[name])
    with pytest.raises(ModelError, match=message):
        tiny(**inputs)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("PixArt-XL/4", "unknown architecture 'PixArt-XL/4'.*did you mean 'PixArt-XL/2'"),
        ("PixArt(num_classes=4)", "unknown option 'num_classes' of PixArt"),
        ("PixArt(hidden_size=30, num_heads=4)", "cannot be divided by num_heads"),
    ],
)
def test_unknown_names_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(arch, device="meta")
