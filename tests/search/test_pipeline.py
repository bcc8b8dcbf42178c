"""A search on a diffusers pipeline in a folder, one prompt or label a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cachegraph.errors import InputError
from cachegraph.search.images import images_of
from cachegraph.search.pipeline import PipelineSampler, pipeline_sampler
from cachegraph.search.run import Budget, run_search
from tests.pipes import PIPELINES

STEPS = 6
QUIET: dict[str, Any] = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    made = tmp_path_factory.mktemp("pipe") / "dit"
    PIPELINES["DiT"].build().save_pretrained(made)
    return made


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("3\n\n7\n")
    return path


def test_images_are_those_of_the_pipeline(folder: Path, labels: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sampler = pipeline_sampler(folder, labels, STEPS)
    assert isinstance(sampler, PipelineSampler)
    found = images_of(sampler(sampler.model, 5))
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    wanted = pipe([3, 7], num_inference_steps=STEPS, generator=noise, output_type="np").images
    assert found.shape == wanted.shape
    assert torch.equal(found, torch.from_numpy(wanted))


def test_a_schedule_is_found_and_checked(folder: Path, labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.yaml"
    given = {"prompts": labels, "steps": STEPS, "trials": 12, "noises": 1, "check": 1}
    found = run_search(str(folder), out, Budget(full_steps=3), **given, **QUIET)
    assert found.judged[0].full_steps == 3
    assert found.judged[0].images == 2
    assert 0 < found.judged[0].psnr < 200
    assert out.read_text().startswith(f"# Found by search on {folder}: 3 of 6 steps full")


def test_what_is_no_pipeline_or_no_prompts(folder: Path, labels: Path, tmp_path: Path) -> None:
    for place, prompts, message in (
        (tmp_path, labels, "not a diffusers pipeline"),
        (folder, tmp_path / "none.txt", "no such file"),
        (folder, folder / "model_index.json", "not a label"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline_sampler(place, prompts, STEPS)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(InputError, match="the file holds no prompt"):
        pipeline_sampler(folder, empty, STEPS)
