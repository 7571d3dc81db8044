"""EDM: preconditioning, noise levels, loss and sampler, against the reference and closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn

import reference
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.sampling import initial_noise, sample_generator
from diffit_kernels.sampling.edm import (
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    denoised,
    edm_loss,
    heun_sample,
    preconditioning,
    sigma_schedule,
)
from tests.parity import assert_close

EXACT = 1e-12
LEVELS = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0], dtype=torch.float64)


@pytest.fixture
def model():
    """A small model with classes, whose output is not the zero that training starts from."""
    return make_model()


def make_model(**kwargs):
    torch.manual_seed(0)
    small = {"image_size": 8, "channels": (8, 16), "num_cells": 1, "window_size": 2}
    small |= {"num_heads": 2, "num_groups": 4, "temb_size": 8, "num_classes": 5}
    model = ImageDiffiT(**small | kwargs).eval()
    nn.init.normal_(model.head.weight, std=0.1)
    return model


class Gaussian:
    """F of the ideal denoiser of images from N(mean, deviation²), pixel by pixel.

    D(x; σ) = (s² x + σ² μ) / (s² + σ²). The probability-flow ODE dx/dσ = (x - D) / σ then has the
    solution x(σ) = μ + (x(σ_0) - μ) √((s² + σ²) / (s² + σ_0²)).
    """

    def __init__(self, mean, deviation):
        self.mean, self.deviation, self.levels = mean, deviation, []

    def __call__(self, scaled, c_noise):
        self.levels.append((4 * c_noise[0]).exp().item())
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        c_skip, c_out, c_in, _ = preconditioning(sigma)
        x = scaled / c_in
        return (self.ideal(x, sigma) - c_skip * x) / c_out

    def ideal(self, x, sigma):
        variance = self.deviation**2
        return (variance * x + sigma**2 * self.mean) / (variance + sigma**2)

    def sample(self, noise):
        """Where the exact solution from σ_max to σ_min, and then the last step, leads."""
        variance = self.deviation**2
        shrink = ((variance + SIGMA_MIN**2) / (variance + SIGMA_MAX**2)).sqrt()
        x = self.mean + (SIGMA_MAX * noise - self.mean) * shrink
        return self.ideal(x, SIGMA_MIN)


@pytest.fixture
def gaussian():
    mean = torch.tensor([-0.5, 0.0, 0.8], dtype=torch.float64).view(3, 1, 1)
    deviation = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1)
    return Gaussian(mean, deviation)


def test_preconditioning_agrees_with_the_reference():
    ours = torch.stack(preconditioning(LEVELS), 1)
    expected = [reference.preconditioning(sigma) for sigma in LEVELS.tolist()]
    ratio = ours / torch.tensor(expected, dtype=torch.float64)
    assert_close(ratio, torch.ones(5, 4), EXACT)


def test_preconditioning_keeps_unit_variances():
    """Of the network's input, and of its target for the images of deviation σ_d."""
    c_skip, c_out, c_in, _ = preconditioning(LEVELS)
    ones = torch.ones_like(LEVELS)
    assert_close(c_in**2 * (LEVELS**2 + SIGMA_DATA**2), ones, EXACT)
    of_target = (1 - c_skip) ** 2 * SIGMA_DATA**2 + (c_skip * LEVELS) ** 2
    assert_close(of_target / c_out**2, ones, 1e-10)


def test_denoised_agrees_with_the_reference(model):
    model.double()
    x, labels = 40 * torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 4, 5])
    one_by_one = [
        reference.denoised(lambda *given, y=y: model(*given, y[None]), x[None], sigma[None])[0]
        for x, sigma, y in zip(x, LEVELS, labels, strict=True)
    ]
    out = denoised(model, x, LEVELS, labels)
    assert_close(out, torch.stack(one_by_one), EXACT)
    assert torch.equal(model.denoise(x, LEVELS, labels), out)


@pytest.mark.parametrize("steps", [1, 2, 18, 40])
def test_schedule_agrees_with_the_reference(steps):
    ours = sigma_schedule(steps)
    assert ours.dtype == torch.float64 and ours.shape == (steps + 1,)
    assert_close(ours, torch.tensor(reference.sigma_schedule(steps), dtype=torch.float64), EXACT)
    assert math.isclose(ours[0], 80) and ours[-1] == 0
    assert steps == 1 or math.isclose(ours[-2], 0.002)
    assert torch.all(ours[:-1] > ours[1:])


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_schedule_and_preconditioning_are_those_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers", reason="the sample extra is not installed")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7)
    scheduler.set_timesteps(steps)
    ours = sigma_schedule(steps)
    assert_close(ours[:-1] / scheduler.sigmas[:-1], torch.ones(steps), 1e-6)  # theirs are float32
    assert scheduler.sigmas[-1] == 0

    sigma = scheduler.sigmas[0]
    x, prediction = torch.randn(2, 2, 3, 4, 4)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    assert_close(c_in * x, scheduler.precondition_inputs(x, sigma), 1e-6)
    assert_close(c_noise, scheduler.timesteps[0], 1e-6)
    out = scheduler.precondition_outputs(x, prediction, sigma)
    assert_close(c_skip * x + c_out * prediction, out, 1e-6)


def test_sampler_agrees_with_the_reference(model):
    model.double()
    noise, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5])
    with torch.no_grad():
        expected = reference.heun_sampling(
            lambda x, sigma: reference.denoised(lambda *given: model(*given, labels[:1]), x, sigma),
            noise[:1],
            5,
        )
    assert_close(heun_sample(model, noise, labels, num_steps=5)[:1], expected, 1e-10)


def test_sampler_is_of_second_order(gaussian):
    """Half the step, a quarter of the error; against the closed form, in float64."""
    noise = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    expected = gaussian.sample(noise)
    errors = [
        (heun_sample(gaussian, noise, num_steps=steps) - expected).abs().amax((0, 2, 3))
        for steps in (64, 128, 256, 512)
    ]
    orders = [(coarse / fine).log2() for coarse, fine in itertools.pairwise(errors)]
    for order in orders:
        assert torch.all((order - 2).abs() < 0.1), orders
    assert errors[-1].max() < 1e-4


def test_sampler_for_images_of_deviation_sigma_data():
    """For N(0, σ_d²) F is zero: the whole path is c_skip's."""
    gaussian = Gaussian(torch.zeros(()), torch.tensor(SIGMA_DATA))
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    zero = heun_sample(lambda scaled, c_noise: torch.zeros_like(scaled), noise)
    assert_close(heun_sample(gaussian, noise), zero, 1e-7)


def test_sampler_evaluates_35_times_in_18_steps(gaussian):
    steps = []
    heun_sample(gaussian, torch.randn(1, 3, 2, 2), on_step=lambda: steps.append(0))
    assert len(gaussian.levels) == 35 and len(steps) == 18
    levels = sigma_schedule(18)[:-1].tolist()
    expected = [levels[0], *(level for level in levels[1:] for _ in range(2))]
    assert_close(torch.tensor(gaussian.levels), torch.tensor(expected), 1e-6)


def test_a_sample_does_not_depend_on_its_batch(model, gaussian):
    """To the bit where no products of another shape are in between."""
    noise = initial_noise(model, [sample_generator(3, index) for index in range(5)])
    assert noise.shape == (5, 3, 8, 8) and noise.dtype == torch.float32
    alone = initial_noise(model, [sample_generator(3, 4)])
    assert torch.equal(noise[4:], alone)
    assert not torch.equal(noise[0], noise[1])
    whole = heun_sample(gaussian, noise)
    assert torch.equal(whole, torch.cat([heun_sample(gaussian, part) for part in noise.split(2)]))

    labels = torch.tensor([0, 1, 2, 3, 5])
    whole = heun_sample(model, noise, labels, num_steps=4, cfg_scale=2.0)
    assert torch.equal(heun_sample(model, noise, labels, num_steps=4, cfg_scale=2.0), whole)
    parts = [
        heun_sample(model, part, y, num_steps=4, cfg_scale=2.0)
        for part, y in zip(noise.split(2), labels.split(2), strict=True)
    ]
    assert_close(torch.cat(parts), whole, 1e-5)


def test_guidance(model):
    """D_null + w (D_labels - D_null), of the same x."""
    model.double()
    noise, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])

    def guided(x, sigma):
        conditional = model.denoise(x, sigma, labels)
        unconditional = model.denoise(x, sigma, torch.full_like(labels, 5))
        return unconditional + 2.5 * (conditional - unconditional)

    with torch.no_grad():
        expected = reference.heun_sampling(guided, noise, 4)
    out = heun_sample(model, noise, labels, num_steps=4, cfg_scale=2.5)
    assert_close(out, expected, 1e-10)
    plain = heun_sample(model, noise, labels, num_steps=4)
    assert (out - plain).abs().max() > 1e-3
    assert_close(heun_sample(model, noise, labels, num_steps=4, cfg_scale=1.0), plain, 1e-10)


class Recorder(nn.Module):
    """A wrapped network, which notes what it is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x, c_noise, *labels):
        self.seen.append((x, c_noise, *labels))
        return self.network(x, c_noise, *labels)


@pytest.mark.parametrize(
    "network, image, result",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_what_is_around_the_network_is_in_float32_or_more(network, image, result, model):
    recorder = Recorder(model.to(network))
    sigma = torch.tensor([0.002, 40.0])
    x = torch.randn(2, 3, 8, 8).to(image)
    out = denoised(recorder, x, sigma, torch.tensor([0, 1]))
    ((scaled, c_noise, _),) = recorder.seen
    assert (scaled.dtype, c_noise.dtype, out.dtype) == (network, result, result)
    c_skip, c_out, _, _ = preconditioning(sigma.to(result).view(-1, 1, 1, 1))
    prediction = model(scaled, c_noise, torch.tensor([0, 1])).to(result)
    assert torch.equal(out, c_skip * x.to(result) + c_out * prediction)
    sample = heun_sample(recorder, x, torch.tensor([0, 1]), num_steps=2)
    assert sample.dtype == torch.float64 and sample.isfinite().all()


def test_wrapped_networks_are_called_themselves(model):
    """As a compiled or distributed one must be, in training and in sampling."""
    wrapped = Recorder(model)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    edm_loss(wrapped, images, labels).backward()
    assert len(wrapped.seen) == 1 and model.head.weight.grad.abs().max() > 0
    heun_sample(wrapped, images, labels, num_steps=3)
    assert len(wrapped.seen) == 1 + 5


def test_loss_agrees_with_the_reference(model):
    model.double()
    images, noise = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    labels = torch.full((5,), 2)
    loss = edm_loss(model, images, labels, sigma=LEVELS, noise=noise)
    expected = reference.edm_loss(lambda *given: model(*given, labels[:1]), images, LEVELS, noise)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert_close(loss, expected, EXACT)
    ours, theirs = (torch.autograd.grad(value, model.head.weight)[0] for value in (loss, expected))
    assert_close(ours, theirs, 1e-10)


def test_loss_draws_noise_as_the_recipe_says():
    """Mean and deviation of ln σ over 40 000 samples, to five standard errors; noise of N(0, 1)."""
    levels, noises = [], []

    def network(scaled, c_noise):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        levels.append(4 * c_noise)
        noises.append(scaled / preconditioning(sigma)[2] / sigma)  # the images are zero
        return torch.zeros_like(scaled)

    count = 40_000
    zeros = torch.zeros(count, 1, 1, 1)
    edm_loss(network, zeros, generator=torch.Generator().manual_seed(1))
    (ln_sigma,), (noise,) = levels, noises
    assert abs(ln_sigma.mean() + 1.2) < 5 * 1.2 / count**0.5
    assert abs(ln_sigma.std() - 1.2) < 5 * 1.2 / (2 * count) ** 0.5
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.std() - 1) < 5 / (2 * count) ** 0.5
    assert abs(torch.corrcoef(torch.stack((ln_sigma, noise.flatten())))[0, 1]) < 5 / count**0.5
    edm_loss(network, zeros, generator=torch.Generator().manual_seed(1))
    assert torch.equal(levels[0], levels[1]) and torch.equal(noises[0], noises[1])


def test_loss_of_the_ideal_denoiser_is_one():
    """For images of N(0, σ_d²), where F = 0 is ideal, at every σ: that is what λ is for."""
    images = SIGMA_DATA * torch.randn(5, 1, 400, 400, dtype=torch.float64)
    for sigma in LEVELS:
        loss = edm_loss(lambda x, c: torch.zeros_like(x), images, sigma=sigma.expand(5))
        assert abs(loss - 1) < 5 * math.sqrt(2 / images.numel())


ERRORS = {
    "denoised: x must be floating point, got torch.uint8": (
        TypeError,
        lambda m: denoised(m, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2)),
    ),
    "denoised: x must be a tensor, got list": (TypeError, lambda m: denoised(m, [], torch.ones(2))),
    r"denoised: sigma must have shape \(2,\), got \(\)": (
        ValueError,
        lambda m: denoised(m, torch.zeros(2, 3, 8, 8), torch.ones(())),
    ),
    "denoised: sigma must be a tensor, got float": (
        TypeError,
        lambda m: denoised(m, torch.zeros(2, 3, 8, 8), 1.0),
    ),
    r"edm_loss: sigma must have shape \(2,\), got \(3,\)": (
        ValueError,
        lambda m: edm_loss(m, torch.zeros(2, 3, 8, 8), sigma=torch.ones(3)),
    ),
    r"edm_loss: noise must have shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)": (
        ValueError,
        lambda m: edm_loss(m, torch.zeros(2, 3, 8, 8), noise=torch.ones(1, 3, 8, 8)),
    ),
    "edm_loss: images must be floating point, got torch.int64": (
        TypeError,
        lambda m: edm_loss(m, torch.zeros(2, 3, 8, 8).long()),
    ),
    "num_steps must be at least 1, got 0": (ValueError, lambda m: sigma_schedule(0)),
    "got sigma_min=90, sigma_max=80.0, rho=7.0": (
        ValueError,
        lambda m: sigma_schedule(4, sigma_min=90),
    ),
    "rho > 0 must hold, got .* rho=0": (ValueError, lambda m: sigma_schedule(4, rho=0)),
    "heun_sample: noise must be floating point, got torch.int64": (
        TypeError,
        lambda m: heun_sample(m, torch.zeros(1, 3, 8, 8).long()),
    ),
    "cfg_scale needs labels, .* got labels=None, null_class=5": (
        ValueError,
        lambda m: heun_sample(m, torch.zeros(1, 3, 8, 8), cfg_scale=2.0),
    ),
    "cfg_scale needs labels, .* got labels=a tensor, null_class=None": (
        ValueError,
        lambda m: heun_sample(
            make_model(class_dropout_prob=0.0),
            torch.zeros(1, 3, 8, 8),
            torch.tensor([1]),
            cfg_scale=2.0,
        ),
    ),
    "y must be given, num_classes is 5": (
        ValueError,
        lambda m: heun_sample(m, torch.zeros(1, 3, 8, 8)),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_rule_and_value(message, model):
    kind, call = ERRORS[message]
    with pytest.raises(kind, match=message):
        call(model)
