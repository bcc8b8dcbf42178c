"""Compiling changes nothing about a model: it goes on like a twin that nobody touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import cachegraph as cg
from cachegraph.errors import CachegraphError
from tests.conftest import SHARED
from tests.models import build, fora, make_inputs, one_thread, read_configs  # noqa: F401

CONFIGS = SHARED / "models" / "tiny_configs.json"


class Resize:
    """Stands for torchvision's, which one model resizes a mask with."""

    class functional:
        InterpolationMode = type("InterpolationMode", (), {"NEAREST": "nearest"})

        @staticmethod
        def resize(mask: Tensor, size: Any, interpolation: Any = None) -> Tensor:
            return nn.functional.interpolate(mask, size=tuple(size), mode="nearest")

    InterpolationMode = functional.InterpolationMode


@torch.no_grad()
def outcome(model: nn.Module, config: dict[str, Any], seed: int) -> list[Any]:
    """What a call returns, as leaves; types tell tensors that have no data."""
    return _pytree.tree_leaves(model(**make_inputs(config, seed=seed)))


def same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # diffusers'
@pytest.mark.parametrize("name", sorted(read_configs(CONFIGS)) if CONFIGS.is_file() else ["any"])
def test_a_compiled_model_equals_its_twin(
    name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    if "Cosmos" in name:
        monkeypatch.setattr("diffusers.models.transformers.transformer_cosmos.transforms", Resize)
    config = read_configs(CONFIGS)[name]
    model = build(config)
    twin = copy.deepcopy(model)
    seeds = (0, 1)
    wanted = [outcome(twin, config, seed) for seed in seeds]
    refused = ""
    try:
        cg.compile(model, fora(4, 2), (), make_inputs(config), backend="eager")
    except CachegraphError as error:
        refused = f"refused: {error.what}"
    for seed, before in zip(seeds, wanted, strict=True):
        assert same(outcome(model, config, seed), before), refused
        assert same(outcome(twin, config, seed), before), refused  # what they share
    states = [one.state_dict() for one in (model, twin)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    print(f"{name}: {refused or 'compiled'}")
