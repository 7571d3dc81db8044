"""The loss of the training examples against the oracle's process and PyTorch's distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_loss import Diffusion, at, cosine_rate, hybrid_loss, update_ema, variational_bound
from reference.sampling import alpha_bars, ancestral_step
from tests.parity import assert_close

HALF_BIN = 1 / 16


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_bound_is_the_divergence_from_the_posterior(t):
    """In float64; both normal distributions from the oracle's step, as it samples them."""
    x0, epsilon, predicted = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    v = torch.rand_like(x0) * 2 - 1
    abar = alpha_bars()[t]
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * epsilon
    steps = list(range(1000))

    def step(epsilon, v, noise):
        return ancestral_step(x_t, torch.cat((epsilon, v), 1), noise, steps, t)

    def normal(epsilon, v):
        mean = step(epsilon, v, torch.zeros_like(x0))
        return Normal(mean, step(epsilon, v, torch.ones_like(x0)) - mean)

    posterior = normal(epsilon, torch.full_like(v, -1))  # the lower end of the range of variances
    expected = kl_divergence(posterior, normal(predicted, v)) / math.log(2)
    t = torch.full((2,), t)
    actual = variational_bound(Diffusion.linear(), x0, epsilon - predicted, v, t, HALF_BIN)
    assert_close(actual, expected, 1e-5)


def test_the_probabilities_of_all_grey_levels_add_up_to_one():
    levels = torch.linspace(-1, 1, 17).view(-1, 1, 1, 1)
    mean = torch.tensor([-1.2, -0.98, 0.01, 0.5, 1.1]).view(1, 1, 1, 5)
    diffusion = Diffusion.linear()
    t = torch.zeros(17, dtype=torch.long)
    x0 = levels.expand(17, 1, 1, 5)
    error = (mean - x0) / at(diffusion.mean_error, t)
    wide = torch.full_like(x0, 20.0)  # a deviation of many levels
    bits = variational_bound(diffusion, x0, error, wide, t, HALF_BIN)
    assert_close(torch.exp2(-bits).sum(0), torch.ones(1, 1, 5), 1e-5)


def test_the_bound_trains_the_variance_alone():
    x0, epsilon = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    out = torch.randn(3, 8, 2, 2, requires_grad=True)
    t, classes = torch.tensor([0, 10, 999]), torch.tensor([0, 1, 2])
    seen = []

    def predict(*inputs):
        seen.extend(inputs)
        return out.bfloat16()

    loss = hybrid_loss(predict, Diffusion.linear(), x0, classes, t, epsilon, HALF_BIN)
    assert all(part.dtype == torch.float32 for part in loss)
    abar = torch.tensor(alpha_bars(), dtype=torch.float64)[t].view(-1, 1, 1, 1)
    assert_close(seen[0], abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon, 1e-6)
    assert seen[1] is t and seen[2] is classes
    (of_bound,) = torch.autograd.grad(loss[1], out, retain_graph=True)
    assert not of_bound[:, :4].any() and of_bound[:, 4:].any()
    (of_noise,) = torch.autograd.grad(loss[0], out)
    assert of_noise[:, :4].any() and not of_noise[:, 4:].any()


def test_the_average_starts_fast_and_the_rate_slowly():
    model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = average.weight.detach().clone()
    for step, share in ((0, 0.1), (10**6, 0.999)):
        average.weight.data.copy_(before)
        update_ema(average, model, step)
        assert_close(average.weight, share * before + (1 - share) * model.weight, 1e-6)
    assert cosine_rate(0, 1000) == 0.01 and cosine_rate(500, 1000) == pytest.approx(0.5)
    assert cosine_rate(999, 1000) < 1e-5 and cosine_rate(0, 10, warm_up=0) == 1
