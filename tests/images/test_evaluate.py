"""Figures against their formulas, and sets of which the answer is known."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from typer.testing import CliRunner

from cachegraph.cli import app
from cachegraph.errors import InputError
from cachegraph.images import metrics
from cachegraph.images.evaluate import evaluate, read_samples
from cachegraph.images.features import extract, load_extractor
from cachegraph.zoo.digits_quality import psnr

pytest.importorskip("torchmetrics")


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return found @ mix + shift


def scipy_distance(one: np.ndarray, other: np.ndarray) -> float:
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(a @ b)
    mean = one.mean(0) - other.mean(0)
    return float(mean @ mean + np.trace(a + b - 2 * root.real))


def test_fid_is_its_formula() -> None:
    one, other = features(300, 0), features(200, 1, shift=0.3)
    wanted = scipy_distance(one.numpy(), other.numpy())
    assert metrics.frechet_distance(one, other) == pytest.approx(wanted, abs=1e-6)
    assert abs(metrics.frechet_distance(one, one)) < 1e-3
    mean, spread = other.mean(0), torch.from_numpy(np.cov(other.numpy(), rowvar=False))
    assert metrics.frechet_distance_to(one, mean, spread) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(InputError, match="two images"):
        metrics.frechet_distance(one[:1], other)


def test_inception_score_of_certain_and_of_clueless() -> None:
    certain = 100 * torch.eye(10, dtype=torch.float64).repeat(200, 1)
    assert metrics.inception_score(certain) == pytest.approx(10, rel=0.05)
    assert metrics.inception_score(torch.zeros(200, 10, dtype=torch.float64)) == pytest.approx(1)


def test_precision_is_of_the_images_and_recall_of_the_reference() -> None:
    reference = torch.arange(20, dtype=torch.float64)[:, None]
    half = reference[:10] + 0.1
    near, far = metrics.precision_recall(half, reference)
    assert near == 1
    assert far == 0.65  # 0 to 12: the last of the half reaches three further
    outside = torch.cat([half, half + 1000])
    assert metrics.precision_recall(outside, reference)[0] == 0.5
    assert metrics.precision_recall(reference, reference) == (1, 1)


def test_pairs() -> None:
    generator = np.random.default_rng(0)
    one = generator.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    other = np.clip(one.astype(int) + generator.integers(-9, 10, one.shape), 0, 255).astype(
        np.uint8
    )
    found = metrics.paired(one, other)
    scaled = [torch.from_numpy(part).permute(0, 3, 1, 2) / 127.5 - 1 for part in (one, other)]
    assert found["psnr"] == pytest.approx(psnr(*scaled), abs=1e-4)
    assert 0.5 < found["ssim"] < 1
    greys = [np.full((1, 16, 16, 3), grey, dtype=np.uint8) for grey in (100, 140)]
    assert metrics.paired(*greys)["flip"] > 0.05
    same = metrics.paired(one, one)
    assert same["ssim"] == pytest.approx(1)
    assert same["psnr"] > 120
    assert same["flip"] == 0


def test_drift_is_relative() -> None:
    other = np.ones((2, 3, 1, 2, 2))
    assert metrics.drift(other * [[[[[1.5]]]], [[[[1.0]]]]], other) == pytest.approx([0.5, 0])


def save(path: Path, pixels: np.ndarray, **run: object) -> Path:
    steps = np.full((4, 2, 1, 2, 2), float(pixels.mean() + 1))
    np.savez(path, arr_0=pixels, steps=steps, run=np.array(json.dumps(run)))
    return path


def digits(seed: int, count: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_the_command_tells_all_of_it(tmp_path: Path) -> None:
    noise = {"seed": 0, "conditions": "c", "classes": []}
    one = save(tmp_path / "a.npz", digits(0), **noise)
    other = save(tmp_path / "b.npz", digits(1), **noise)
    line = ["evaluate", str(one), str(other), "-o", str(tmp_path / "f.json")]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0, said.output
    told = json.loads((tmp_path / "f.json").read_text())
    named = {name.partition(" ")[0] for name in told}
    assert named >= {
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "psnr",
        "ssim",
        "drift",
    }
    assert "fid" not in told  # it is no FID of anybody else's
    assert told["fid (digits classifier)"] > 0
    assert len(told["drift"]) == 4
    assert "fid (digits classifier)" in said.output
    assert abs(evaluate(one, one)["fid (digits classifier)"]) < 1e-3


def test_pairs_are_of_the_same_noise(tmp_path: Path) -> None:
    one = save(tmp_path / "a.npz", digits(0), seed=0, conditions="c", classes=[])
    other = save(tmp_path / "b.npz", digits(1), seed=1, conditions="c", classes=[])
    assert "psnr" not in evaluate(one, other)
    assert "psnr" in evaluate(one, other, pairs=True)
    short = save(tmp_path / "c.npz", digits(1, 20), seed=0, conditions="c", classes=[])
    with pytest.raises(InputError, match="do not hold pairs"):
        evaluate(one, short)


def test_statistics_of_a_reference(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a.npz", digits(0)), digits(1)
    seen = extract(load_extractor("digits"), other).features.numpy()
    np.savez(tmp_path / "ref.npz", mu=seen.mean(0), sigma=np.cov(seen, rowvar=False))
    found = evaluate(one, tmp_path / "ref.npz")
    wanted = evaluate(one, save(tmp_path / "b.npz", other))["fid (digits classifier)"]
    assert found["fid (digits classifier)"] == pytest.approx(wanted, rel=1e-6)
    assert "precision (digits classifier)" not in found


def own_features(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"features": images.float().flatten(2).mean(2), "spatial": images.float()}


def wrong_features(images: torch.Tensor) -> list[torch.Tensor]:
    return [images]


def test_an_extractor_by_path(tmp_path: Path) -> None:
    one, other = (save(tmp_path / f"{i}.npz", digits(i)) for i in range(2))
    found = evaluate(one, other, extractor=f"{__name__}:own_features")
    wanted = scipy_distance(*(p.reshape(24, -1, 3).mean(1) for p in (digits(0), digits(1))))
    assert found["fid"] == pytest.approx(wanted, rel=1e-5)
    assert "inception_score" not in found
    with pytest.raises(InputError, match="answers with something else"):
        evaluate(one, extractor=f"{__name__}:wrong_features")
    (tmp_path / "no.pt").write_text("no")
    with pytest.raises(InputError, match="not an extractor"):
        load_extractor(str(tmp_path / "no.pt"))
    with zipfile.ZipFile(tmp_path / "no.pt2", "w") as archive:
        archive.writestr("no/data/weights/model_weights_config.json", '{"use_pickle": true}')
    with pytest.raises(InputError, match="the program is refused: torch would run code"):
        load_extractor(str(tmp_path / "no.pt2"))


def test_what_is_no_file_of_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 3)))
    (tmp_path / "b.npz").write_text("no")
    for name in ("a.npz", "b.npz", "c.npz"):
        with pytest.raises(InputError, match="not a file of samples"):
            read_samples(tmp_path / name)
