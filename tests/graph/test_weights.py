"""Weights on disk: aligned, without copies of what is tied, readable by safetensors itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cachegraph.errors import ArtifactError
from cachegraph.graph.weights import distinct, load_weights, save_weights

CPU = torch.device("cpu")


def test_distinct_tells_views_from_aliases(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    weights = {"a": base, "b": base, "c": base[:3], "d": base.view(2, 3), "e": torch.empty(0)}
    stored, aliases = distinct(weights | {"f": torch.empty(0)})
    assert sorted(stored) == ["a", "c", "d", "e", "f"]
    assert aliases == {"b": "a"}
    save_weights(stored, tmp_path / "w")
    again = load_weights(tmp_path / "w", torch.device("cpu"))
    assert {name: t.tolist() for name, t in again.items()} == {
        name: t.tolist() for name, t in stored.items()
    }


def test_weights_are_aligned_as_torch_aligns_them(tmp_path: Path) -> None:
    weights = {f"w{n}": torch.randn(n) for n in (0, 1, 3, 16, 17, 1024)}
    weights |= {"half": torch.randn(5, 3).bfloat16(), "mask": torch.ones(3).bool()}
    weights |= {"turned": torch.randn(4, 6).T, "number": torch.tensor(3)}
    save_weights(weights, tmp_path / "w")
    for found in (load_weights(tmp_path / "w", torch.device("cpu")), load_file(tmp_path / "w")):
        assert {n: (t.dtype, t.tolist()) for n, t in found.items()} == {
            n: (t.dtype, t.tolist()) for n, t in weights.items()
        }
    again = load_weights(tmp_path / "w", torch.device("cpu"))
    assert {t.data_ptr() % 64 for t in again.values()} == {0}
    mapped = load_file(tmp_path / "w")  # without copies
    assert mapped["w16"].data_ptr() % 64 == mapped["w1024"].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
    ],
)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.arange(64, dtype=torch.uint8).bitwise_and(1).view(dtype)
    save_weights({"w": weight}, tmp_path / "w")
    for found in (load_weights(tmp_path / "w", CPU)["w"], load_file(tmp_path / "w")["w"]):
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128 on cpu"),
        (torch.zeros(2, device="meta"), "torch.float32 on meta"),
    ],
)
def test_what_cannot_be_written(weight: torch.Tensor, found: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        save_weights({"a": torch.zeros(2), "w": weight}, tmp_path / "w")
    assert str(caught.value) == (
        "w: a weight cannot be written; expected a model whose weights are loaded, in a dtype of "
        f"safetensors; found {found}"
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", None])
def test_what_is_no_file_of_weights(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_weights(path, CPU)
    assert str(caught.value).startswith(f"{path}: the weights cannot be read; found ")
