"""One line here, in cache-dit and in diffusers: what a user writes, and what becomes of mistakes.

What is measured must stand in the table of ``docs/side-by-side.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import cachegraph as cg
from tests.pipes import PIPELINES, traced_once
from tools.pipeline_matrix import relative_error

FLUX = PIPELINES["Flux"]
PAGE = Path(__file__).parents[2] / "docs" / "side-by-side.md"
# What a user writes, given a pipeline; and the same with a key misspelt.
OURS = """\
import cachegraph
cachegraph.accelerate(pipe, {"cachegraph": 1, "policy": {"method": "fora", "interval": 2}})
"""
CACHE_DIT = """\
import cache_dit
config = cache_dit.DBCacheConfig(max_warmup_steps=1, Fn_compute_blocks=1, Bn_compute_blocks=0)
cache_dit.enable_cache(pipe, cache_config=config.update(residual_diff_threshold=0.9))
"""
DIFFUSERS = """\
from diffusers import PyramidAttentionBroadcastConfig
config = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(-1, 1001),
    current_timestep_callback=lambda: pipe.current_timestep,
)
pipe.transformer.enable_cache(config)
"""
CODES = {
    "cachegraph": (OURS, ("interval", "intervall")),
    "cache-dit": (CACHE_DIT, ("residual_diff_threshold", "residual_diff_treshold")),
    "diffusers": (
        DIFFUSERS,
        ("spatial_attention_block_skip_range", "spatial_attention_block_skip_rang"),
    ),
}


class AbortError(Exception):
    """Raised in a callback."""


def written(code: str) -> Any:
    """A pipeline after what a user writes."""
    pipe = FLUX.build(num_layers=3)
    exec(code, {"pipe": pipe})
    return pipe


def after(code: str, other: Callable[[Any], Any], **options: Any) -> str:
    """Whether an image is the one that the pipeline draws first, though something came before."""
    pipe = written(code)
    try:
        other(pipe)
        found = FLUX.draw(pipe, seed=3, prompt=1, **options)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__
    alone: Tensor = FLUX.draw(written(code), seed=3, prompt=1, **options)
    plain = FLUX.draw(FLUX.build(num_layers=3), seed=3, prompt=1, **options)
    assert relative_error(alone, plain) > 1e-5  # something is reused
    return "right" if relative_error(found, alone) <= 1e-5 else "wrong"


def aborted(last: int) -> Callable[[Any], None]:
    """What draws an image up to a step."""

    def stop(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == last:
            raise AbortError
        return {}

    def draw(pipe: Any) -> None:
        with pytest.raises(AbortError):
            FLUX.draw(pipe, seed=1, callback_on_step_end=stop)

    return draw


def misspelt(code: str, right: str, wrong: str) -> str:
    try:
        written(code.replace(right, wrong))
    except (cg.CachegraphError, TypeError, ValueError, AttributeError) as error:
        return (
            "refused, with the right one" if f"did you mean '{right}'" in str(error) else "refused"
        )
    return "ignored"


@pytest.fixture(params=CODES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("transformers")
    if request.param == "cache-dit":
        pytest.importorskip("cache_dit")
    from cachegraph.pipelines import accelerate as module

    monkeypatch.setitem(module.accelerate.__kwdefaults__, "backend", "eager")
    with traced_once():
        yield request.param


@pytest.mark.slow
def test_side_by_side(name: str) -> None:
    code, keys = CODES[name]
    found = {
        "lines": str(code.count("\n")),
        "after an abort": max(after(code, aborted(last)) for last in range(4)),
        "another size": after(code, FLUX.draw, height=96),
        "other steps": after(code, FLUX.draw, steps=9),
        "a misspelt key": misspelt(code, *keys),
    }
    print(name, found)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {name} "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == list(found.values())
