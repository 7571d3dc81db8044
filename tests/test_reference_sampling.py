"""The reference's sampler agrees with the recordings, and with what is known of its ends."""

import math

import pytest
import torch

from reference import sampling
from tests.golden_files import recording
from tests.parity import assert_close


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-3)])
def test_trajectory_agrees_with_the_recording(dtype, tolerance):
    golden, small = recording("sampling_ancestral_10"), recording("latent_small")
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in small.under("state.").items()
    }
    # The recording's second half is the unconditional batch; guidance uses the first's latents.
    z, y, noise = golden["z"][:2].to(dtype), golden["y"][:2], golden["noise"][:, :2].to(dtype)
    sample = sampling.ancestral_sampling(state, z, y, noise, small.config["num_heads"], 4.4)
    assert_close(sample, golden["sample"][:2], tolerance)


def test_timesteps_are_the_published_ones():
    assert sampling.respaced_timesteps(250) == recording("respacing_250")["timesteps"].tolist()
    assert sampling.respaced_timesteps(1) == [0]


@pytest.mark.parametrize("v, variance", [(1, "beta"), (-1, "posterior")])
def test_variance_reaches_from_the_posterior_to_beta(v, variance):
    """The ends of the learned range, read from what a step adds to its mean."""
    timesteps, step = sampling.respaced_timesteps(10), 4
    products = sampling.alpha_bars()
    abar, before = products[timesteps[step]], products[timesteps[step - 1]]
    expected = {"beta": 1 - abar / before}
    expected["posterior"] = expected["beta"] * (1 - before) / (1 - abar)
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    prediction = torch.cat((x, torch.full_like(x, v)), 1)
    out = sampling.ancestral_step(x, prediction, torch.ones_like(x), timesteps, step)
    assert_close(out, torch.full_like(x, math.sqrt(expected[variance])), 1e-12)


def test_the_last_step_gives_the_start_that_the_noise_implies():
    """At t = 0 nothing of x is left in the mean: x = √ᾱ x_0 + √(1 - ᾱ) ε gives x_0 back."""
    start, epsilon = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    abar = sampling.alpha_bars()[0]
    x = math.sqrt(abar) * start + math.sqrt(1 - abar) * epsilon
    prediction = torch.cat((epsilon, torch.randn_like(epsilon)), 1)
    out = sampling.ancestral_step(x, prediction, torch.full_like(x, math.nan), [0, 999], 0)
    assert_close(out, start, 1e-12)
