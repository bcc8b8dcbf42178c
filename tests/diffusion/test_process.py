"""Steps against the formulas of the papers, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cachegraph.diffusion.draw import draw_image
from cachegraph.diffusion.process import Process, guide, guided, spaced_timesteps
from cachegraph.errors import InputError

BETAS = np.linspace(1e-4, 2e-2, 1000)
SIGNAL = np.cumprod(1 - BETAS)


def test_timesteps_are_spread_over_all_of_training() -> None:
    assert spaced_timesteps(10) == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert spaced_timesteps(1) == (0,)
    with pytest.raises(InputError, match="out of range"):
        spaced_timesteps(1001)


def test_timesteps_of_a_sampler() -> None:
    assert Process.of(3, (901, 501, 1)).timesteps == (1, 501, 901)
    for wrong in ((1, 2), (1, 3, 2), (1, 2, 1000)):
        with pytest.raises(InputError):
            Process.of(3, wrong)


@pytest.mark.parametrize("i", [4, 2, 0])
def test_ddim_is_its_formula(i: int) -> None:
    process = Process.of(5)
    x, output = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)
    here = SIGNAL[process.timesteps[i]]
    after = SIGNAL[process.timesteps[i - 1]] if i else 1.0
    noise = output[:, :4].double()
    image = (x.double() - (1 - here) ** 0.5 * noise) / here**0.5
    wanted = after**0.5 * image + (1 - after) ** 0.5 * noise
    torch.testing.assert_close(process.ddim(x, output, i).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("i", [4, 1, 0])
def test_ddpm_is_its_formula(i: int, *, variance: bool) -> None:
    process = Process.of(5)
    x, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    output = torch.randn(2, 8 if variance else 4, 3, 3)
    here = SIGNAL[process.timesteps[i]]
    after = SIGNAL[process.timesteps[i - 1]] if i else 1.0
    beta = 1 - here / after
    image = (x.double() - (1 - here) ** 0.5 * output[:, :4].double()) / here**0.5
    mean = beta * after**0.5 / (1 - here) * image
    mean = mean + (1 - after) * (1 - beta) ** 0.5 / (1 - here) * x.double()
    if i:
        log = np.log(beta) * torch.ones_like(mean)
        if variance:
            share = (output[:, 4:].double() + 1) / 2
            log = share * np.log(beta) + (1 - share) * np.log(beta * (1 - after) / (1 - here))
        mean = mean + (0.5 * log).exp() * noise
    made = process.ddpm(x, output, i, noise).double()
    torch.testing.assert_close(made, mean, rtol=1e-4, atol=1e-4)


def test_guidance_of_three_channels() -> None:
    output = torch.randn(4, 8, 2, 2)
    made = guide(output, 1.5)
    wanted = output[2:, :3] + 1.5 * (output[:2, :3] - output[2:, :3])
    torch.testing.assert_close(made[:2, :3], wanted)
    torch.testing.assert_close(made[2:, :3], wanted)
    assert torch.equal(made[:, 3:], output[:, 3:])


def test_a_guided_model_sees_the_first_half_twice() -> None:
    x = torch.randn(4, 4, 2, 2)
    seen = []
    guided(lambda x, t, y: seen.append(x) or x, 1.0)(x, torch.zeros(4), torch.zeros(4))
    assert torch.equal(seen[0], torch.cat([x[:2], x[:2]]))


def test_an_image_depends_on_its_place_alone() -> None:
    one, label, later = draw_image(3, 7, shape=(2, 2), classes=10)
    same, again, too = draw_image(3, 7, shape=(2, 2), classes=10)
    assert torch.equal(one, same)
    assert label == again
    assert torch.equal(torch.randn(2, generator=later), torch.randn(2, generator=too))
    for seed, place in ((3, 8), (4, 7)):
        assert not torch.equal(one, draw_image(seed, place, shape=(2, 2), classes=10)[0])
