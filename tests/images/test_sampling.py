"""Images by index: the same file for any batch, number of processes and restart."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cachegraph as cg
from cachegraph.diffusion.process import Process
from cachegraph.errors import InputError
from cachegraph.images.decode import load_decoder, to_pixels
from cachegraph.images.evaluate import read_samples
from cachegraph.images.run import Drawing, _missing, sample_images
from cachegraph.images.sampler import Labels, Sampler
from cachegraph.images.source import Asked, drawing_of
from cachegraph.world import World
from cachegraph.zoo.dit import DiT
from tests.processes import command, killed_when

CPU = torch.device("cpu")
SAMPLER = Sampler(Process.of(3), "ddpm", 1.5, (3, 4, 4), Labels("y", 10), seed=5)


def model(x: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
    scaled = x * torch.linspace(0.5, 1, 3).view(3, 1, 1) + y.view(-1, 1, 1, 1) / 50
    return torch.cat([scaled, scaled * 0.1], dim=1)


def drawing(**changes: Any) -> Drawing:
    return Drawing(lambda: model, replace(SAMPLER, **changes), lambda images: images, CPU)


def draw(out: Path, count: int = 11, **options: Any) -> Path:
    known = {"per_call": 2, "batch": 4, "world": World(), "asked": {"program": "model"}}
    made = options.pop("drawing", drawing())
    sample_images(made, out, count, **{**known, **options})
    return out


def test_the_file_is_the_same_however_it_is_made(tmp_path: Path) -> None:
    wanted = draw(tmp_path / "a.npz").read_bytes()
    assert draw(tmp_path / "b.npz", batch=1).read_bytes() == wanted
    assert draw(tmp_path / "c.npz", batch=64).read_bytes() == wanted
    out = tmp_path / "d.npz"
    for moment in (1, 2, 1, 2, 1):

        def kill(_text: str, _done: int, _count: int, left: list[int] = [moment]) -> None:  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        try:
            draw(out, batch=2, progress=kill)
        except KeyboardInterrupt:
            assert not out.exists()
        parts = tmp_path / "d.npz.parts"
        if parts.exists():
            (parts / ".00000002-00000004.npz.partial").write_text("half")
    assert draw(out).read_bytes() == wanted
    assert not parts.exists()


def test_other_seeds_and_samplers_make_other_images(tmp_path: Path) -> None:
    made = {
        hashlib.sha256(
            np.load(draw(tmp_path / f"{i}.npz", drawing=drawing(**change)))["arr_0"]
        ).hexdigest()
        for i, change in enumerate(({}, {"seed": 6}, {"kind": "ddim"}, {"cfg_scale": 1}))
    }
    assert len(made) == 4


def test_what_the_file_holds(tmp_path: Path) -> None:
    out = draw(tmp_path / "a.npz")
    found = read_samples(out)
    assert found.pixels is not None
    assert found.pixels.shape == (11, 4, 4, 3)
    assert found.pixels.dtype == np.uint8
    assert found.run["images"] == 11
    with np.load(out) as opened:
        images = to_pixels(SAMPLER.draw(model, 4, 2, CPU))
        assert np.array_equal(opened["arr_0"][4:6], images)
        assert np.array_equal(opened["arr_1"], SAMPLER.labels(0, 11))
        assert opened["steps"].shape == (3, 2, 3, 4, 4)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_are_drawn_or_taken_in_turn() -> None:
    drawn = SAMPLER.labels(0, 200)
    assert set(drawn) == set(range(10))
    given = replace(SAMPLER, conditions=Labels("y", 10, (3, 7)))
    assert given.labels(1, 4).tolist() == [7, 3, 7, 3]


def test_a_file_of_another_run_is_left(tmp_path: Path) -> None:
    out = draw(tmp_path / "a.npz")
    before = out.read_bytes()
    assert draw(out) == out  # whole already
    for options in ({"count": 12}, {"per_call": 3}, {"asked": {"program": "other"}}):
        with pytest.raises(InputError, match="images of another"):
            draw(out, **options)
    (tmp_path / "b.npz").write_text("mine")
    with pytest.raises(InputError, match="no file of samples"):
        draw(tmp_path / "b.npz")
    assert (tmp_path / "b.npz").read_text() == "mine"
    assert out.read_bytes() == before


def test_what_is_missing_is_shared_out() -> None:
    assert list(_missing([], 11, 2, 4)) == [(0, 4), (4, 8), (8, 12)]
    assert list(_missing([(4, 8)], 11, 2, 64)) == [(0, 4), (8, 12)]
    assert list(_missing([(0, 12)], 11, 2, 4)) == []


def test_images_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    broken = replace(drawing(), session=lambda: lambda **k: model(**k) * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        draw(tmp_path / "a.npz", drawing=broken)
    assert not (tmp_path / "a.npz").exists()


def test_latents_go_through_an_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(InputError, match="4 channels are no pixels"):
        load_decoder(None, 4, CPU)
    with pytest.raises(InputError, match="not a diffusers model folder"):
        load_decoder(tmp_path, 4, CPU)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, sample_size=8
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(2, 4, 8, 8)
    made = load_decoder(tmp_path / "vae", 4, CPU)(latents)
    with torch.no_grad():
        wanted = vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(made, wanted)
    with pytest.raises(InputError, match="other latents"):
        load_decoder(tmp_path / "vae", 8, CPU)


def test_pixels_are_rounded_as_published() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0]).view(1, 1, 1, 5)
    assert to_pixels(images)[0, 0, :, 1].tolist() == [0, 0, 128, 255, 255]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels = DiT(4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=10).eval()
    out = tmp_path_factory.mktemp("artifact") / "small.cgraph"
    schedule = {"cachegraph": 1, "steps": 3, "policy": {"method": "fora", "interval": 2}}
    cg.compile(pixels, schedule, backend="eager", out=out)
    return out


def test_processes_make_the_file_that_one_makes(tmp_path: Path, artifact: Path) -> None:
    asked = ("sample", str(artifact), "--num", "9", "--per-call", "2", "--num-classes", "10")
    two = tmp_path / "two.npz"
    command(*asked, "--batch-size", "2", "-o", two, processes=2)
    one = tmp_path / "one.npz"
    assert "one.npz: 9 images" in command(*asked, "-o", one)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_same_file(tmp_path: Path, artifact: Path) -> None:
    asked = ("sample", str(artifact), "--num", "1200", "--num-classes", "10")
    command(*asked, "-o", tmp_path / "whole.npz")
    asked += ("--batch-size", "16")
    out = tmp_path / "broken.npz"
    parts = out.with_name(f"{out.name}.parts")
    for count in sorted(random.Random(0).sample(range(1, 70), 5)):
        killed_when(
            lambda count=count: len(list(parts.glob("[0-9]*.npz"))) >= count, *asked, "-o", out
        )
        assert not out.exists()
    command(*asked, "-o", out)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_texts_take_the_place_of_classes(tmp_path: Path, artifact: Path) -> None:
    runner = cg.load(artifact)
    prompts, embeddings = tmp_path / "p.txt", tmp_path / "e.safetensors"
    prompts.write_text("a cat\na dog\n\na fish\n")
    asked = Asked(prompts=prompts, embeddings=embeddings)
    save_file({"y": torch.tensor([4, 5, 6]), "null.y": torch.tensor(10)}, embeddings)
    texts = drawing_of(runner, asked).sampler
    classes = drawing_of(runner, Asked(classes=(4, 5, 6), num_classes=10)).sampler
    # labels stand for embeddings here; with classes one more number is drawn from the noise
    shown = [
        texts.conditions.rows(2, [0, 0], doubled=True),
        classes.conditions.rows(2, [0, 0], doubled=True),
    ]
    assert torch.equal(shown[0]["y"], shown[1]["y"])
    assert shown[0]["y"].tolist() == [6, 4, 10, 10]
    assert texts.labels(2, 2).tolist() == [2, 0]
    save_file({"y": torch.tensor([4, 5])}, embeddings)
    with pytest.raises(InputError, match="no embeddings 'y' of these prompts"):
        drawing_of(runner, asked)
    save_file({"y": torch.tensor([4, 5, 6])}, embeddings)
    with pytest.raises(InputError, match=r"null\.y"):
        drawing_of(runner, asked)
    with pytest.raises(InputError, match="go together"):
        drawing_of(runner, replace(asked, prompts=None))
    with pytest.raises(InputError, match="out of range"):
        drawing_of(runner, Asked(classes=(10,), num_classes=10))
