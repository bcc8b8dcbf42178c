"""The shipped digit model and its sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cachegraph.errors import InputError, ModelError
from cachegraph.zoo import DiT, load_model
from cachegraph.zoo.digits import WEIGHTS, ddim_timesteps, load_digits_model, sample_digits


def test_digits_are_shipped_and_small() -> None:
    model = load_model("digits")
    assert isinstance(model, DiT)
    assert WEIGHTS.stat().st_size < 12_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    args, _ = model.example_inputs()
    # the file alone says as much
    by_path = load_model(WEIGHTS).float()
    assert by_path.num_heads == model.num_heads
    assert torch.equal(by_path(*args), model(*args))


def test_shipped_models_take_no_architecture() -> None:
    with pytest.raises(ModelError, match=r"takes no architecture.*found arch='DiT-S/2'"):
        load_model("digits", arch="DiT-S/2")


def test_digits_denoise() -> None:
    """The model is trained: it knows the noise far better than who takes the whole input for it."""
    model = load_digits_model()
    images = sample_digits(model, [3, 7], steps=10)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    signal = (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0)[500]
    noisy = signal.sqrt() * images + (1 - signal).sqrt() * noise
    predicted = model(noisy, torch.full((2,), 500), torch.tensor([3, 7]))
    error = (predicted - noise).norm() / noise.norm()
    assert error < 0.1
    assert error < 0.5 * (noisy - noise).norm() / noise.norm()


def test_timesteps() -> None:
    assert ddim_timesteps(50) == list(range(981, 0, -20))
    assert ddim_timesteps(20)[:2] == [951, 901]
    assert ddim_timesteps(1) == [1]
    assert ddim_timesteps(999)[0] == 999
    for steps in (0, 1000):
        with pytest.raises(InputError, match="1 to 999"):
            ddim_timesteps(steps)


def test_sampler_calls_once_a_step_on_the_doubled_batch() -> None:
    calls, done = [], []

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((x.clone(), t, y))
        return torch.zeros_like(x)

    first = sample_digits(noise, [4, 2], steps=5, seed=3, progress=done.append)
    assert done == [1, 2, 3, 4, 5]
    assert [t.tolist() for _, t, _ in calls] == [[t] * 4 for t in (801, 601, 401, 201, 1)]
    assert all(y.tolist() == [4, 2, 10, 10] for _, _, y in calls)
    assert all(torch.equal(x[:2], x[2:]) for x, _, _ in calls)
    assert first.shape == (2, 1, 16, 16)
    assert first.abs().max() <= 1
    assert torch.equal(first, sample_digits(noise, torch.tensor([4, 2]), steps=5, seed=3))
    assert not torch.equal(first, sample_digits(noise, [4, 2], steps=5, seed=4))


def test_sampler_finds_the_image_of_a_perfect_model() -> None:
    """With the exact noise of one image at every step, DDIM ends at that image."""
    image = torch.linspace(-0.9, 0.9, 256).reshape(1, 1, 16, 16)
    share = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)

    def noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal = share[t].float()[:, None, None, None]
        exact = (x - signal.sqrt() * image) / (1 - signal).sqrt()
        # guidance must give cond + (scale - 1) * (cond - uncond): the halves differ, the sum not
        return exact + torch.where(y == 10, -2.0, -1.0)[:, None, None, None]

    torch.testing.assert_close(
        sample_digits(noise, [5], steps=7, cfg_scale=2.0), image, atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("labels", [[], [10], [-1], [[1, 2]]])
def test_odd_labels_are_refused(labels: list[Any]) -> None:
    with pytest.raises(InputError, match="digits 0 to 9"):
        sample_digits(lambda x, t, y: x, labels)
