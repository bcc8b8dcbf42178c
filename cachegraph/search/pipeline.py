"""A diffusers pipeline of the user's own as a sampler, with the prompts of a text file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachegraph.errors import InputError


class PipelineSampler:
    """Samples every prompt once; the seed decides the noise.

    Attributes:
        model: the pipeline's transformer.
    """

    def __init__(self, pipe: Any, prompts: list[str], steps: int) -> None:
        self.pipe, self.prompts, self.steps = pipe, prompts, steps
        self.model: nn.Module = pipe.transformer.eval()
        taken = inspect.signature(type(pipe).__call__).parameters
        self.key = "prompt" if "prompt" in taken else "class_labels"
        self.given = prompts if self.key == "prompt" else [int(line) for line in prompts]

    def __call__(self, model_fn: Callable[..., Any], seed: int) -> Any:
        """Images of one noise for every prompt."""
        before, self.pipe.transformer = self.pipe.transformer, model_fn
        try:
            return self.pipe(
                **{self.key: self.given},
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt" if hasattr(self.pipe, "image_processor") else "np",
            )
        finally:
            self.pipe.transformer = before


def pipeline_sampler(folder: Path, prompts: Path, steps: int) -> PipelineSampler:
    """The pipeline that ``save_pretrained`` wrote.

    Args:
        folder: of the pipeline.
        prompts: a text file, one a line; of class labels where the pipeline takes these.
        steps: model calls.

    Raises:
        InputError: there is no such pipeline or file, no prompt, or diffusers is missing.
    """
    if not (folder / "model_index.json").is_file():
        what, expected = "not a diffusers pipeline", "a folder with a model_index.json"
        raise InputError(what, place=str(folder), expected=expected)
    if not prompts.is_file():
        raise InputError("no such file", place=str(prompts), expected="one prompt a line")
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise InputError("the file holds no prompt", place=str(prompts), expected="one a line")
    try:
        import diffusers
    except ImportError as error:
        remedy = "pip install 'cachegraph[diffusers]'"
        raise InputError("a pipeline needs diffusers", place=str(folder), remedy=remedy) from error
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if getattr(pipe, "transformer", None) is None:
        what = "the pipeline has no transformer"
        raise InputError(what, place=str(folder), found=type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    try:
        return PipelineSampler(pipe, lines, steps)
    except ValueError as error:
        expected = "class labels, whole numbers"
        raise InputError("not a label", place=str(prompts), expected=expected) from error
