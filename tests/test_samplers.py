"""Samplers by name: the same steps of the same process, and one limit for those without noise."""

import functools

import numpy as np
import pytest
import torch

from diffit_kernels import DiffiT, from_pretrained
from diffit_kernels.sampling import denoise, initial_noise, sample_generator
from diffit_kernels.sampling.schedule import (
    BETAS,
    PUBLISHED,
    SAMPLERS,
    SPACINGS,
    default_spacing,
    make_solver,
    published_coefficients,
    published_step,
    respaced_timesteps,
)
from tests.parity import assert_close, relative_error

pytest.importorskip("diffusers", reason="the sample extra is not installed")
SOLVERS = [name for name in SAMPLERS if name not in PUBLISHED]
WITHOUT_NOISE = [name for name in SAMPLERS if name != "ddpm"]
LABELS = torch.tensor([3, 8])


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_solvers_take_every_respaced_step_once(sampler, spacing, num_steps):
    """Indices of the shortened chain downwards, whose noise levels are those of the timesteps."""
    scheduler = make_solver(num_steps, sampler, spacing)
    assert scheduler.timesteps.tolist() == list(range(num_steps))[::-1]
    timesteps = respaced_timesteps(num_steps, spacing)
    expected = torch.from_numpy(np.cumprod(1 - BETAS)[timesteps])
    assert_close(scheduler.alphas_cumprod, expected, 1e-5)
    sigmas = ((1 - expected) / expected).sqrt().flip(0)
    assert_close(scheduler.sigmas[:-1], sigmas, 1e-3)  # betas are rounded to float32
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("num_steps", [1, 2, 7, 250, 1000])
@pytest.mark.parametrize("sampler", PUBLISHED)
def test_published_steps_are_those_of_diffusers(sampler, num_steps, monkeypatch):
    """At every step of the chain, but for the schedule that diffusers rounds to float32."""
    import diffusers

    timesteps = respaced_timesteps(num_steps)
    abar = np.cumprod(1 - BETAS)[timesteps]
    betas = 1 - abar / np.concatenate(([1.0], abar[:-1]))
    chain = {"num_train_timesteps": num_steps, "trained_betas": betas, "clip_sample": False}
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(**chain, variance_type="learned_range")
    else:
        scheduler = diffusers.DDIMScheduler(**chain)
    scheduler.set_timesteps(num_steps)
    scheduler.betas = torch.from_numpy(betas)  # in float64, as are we
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)

    x, epsilon, v, noise = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64).unbind()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    table = torch.from_numpy(published_coefficients(timesteps, sampler))
    drawn = noise if sampler == "ddpm" else None
    for i in range(num_steps):
        out = torch.cat((epsilon, v), 1) if sampler == "ddpm" else epsilon
        expected = scheduler.step(out, i, x).prev_sample
        assert_close(published_step(x, out, drawn, table[i]), expected, 1e-9, f"step {i}")
    last = published_step(x, torch.cat((epsilon, v), 1), None, table[0])
    start = (x - np.sqrt(1 - abar[0]) * epsilon) / np.sqrt(abar[0])
    assert_close(last, start, 1e-12, "the last step ends with x_0")


def test_the_default_spacing_is_the_published_one_or_the_solvers():
    assert {default_spacing(sampler) for sampler in PUBLISHED} == {"even"}
    assert {default_spacing(sampler) for sampler in SOLVERS} == {"quadratic"}
    assert (
        make_solver(25, "unipc").alphas_cumprod[1]
        > make_solver(25, "unipc", "even").alphas_cumprod[1]
    )


def test_quadratic_timesteps_ascend_from_the_first_to_the_last():
    for num_steps in range(2, 1001):
        timesteps = respaced_timesteps(num_steps, "quadratic")
        assert timesteps[0] == 0 and timesteps[-1] == 999 and (np.diff(timesteps) > 0).all()
    assert respaced_timesteps(1, "quadratic").tolist() == [0]


@pytest.fixture(scope="module")
def digits():
    """(sampler, num_steps, spacing) -> latents of one noise, by the trained model."""
    model = from_pretrained("digits", use_fused_tmsa=True)
    noise = initial_noise(model, [sample_generator(0, index) for index in range(len(LABELS))])

    @functools.cache
    def run(sampler, num_steps, spacing="even"):
        steps = {"num_steps": num_steps, "sampler": sampler, "spacing": spacing}
        return denoise(model, noise, LABELS, cfg_scale=2.0, **steps)

    return run


@pytest.fixture(scope="module")
def limit(digits):
    """What DDIM tends to: its error is in proportion to the length of a step."""
    return 2 * digits("ddim", 1000) - digits("ddim", 500)


@pytest.mark.parametrize("sampler, power", [("ddim", 0.9), ("dpmsolver++", 1.5), ("unipc", 1.5)])
def test_one_limit(sampler, power, digits, limit):
    """DDIM's error falls with the number of steps, the solvers' nearly with its square."""
    few, many = (relative_error(digits(sampler, steps), limit) for steps in (100, 500))
    assert many < 0.01 and many < few / 5**power


@pytest.mark.parametrize("sampler", ["dpmsolver++", "unipc"])
def test_solvers_need_few_quadratic_steps(sampler, digits, limit):
    error = relative_error(digits(sampler, 25, "quadratic"), limit)
    assert error < relative_error(digits("ddim", 100), limit)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, learn_sigma=False).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    return model


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", WITHOUT_NOISE)
def test_no_noise_and_no_variances_are_needed(sampler, num_steps, small):
    noise = torch.randn(2, 4, 4, 4)
    first, again = (
        denoise(small, noise, LABELS, num_steps=num_steps, sampler=sampler) for _ in range(2)
    )
    assert first.isfinite().all() and torch.equal(first, again)


def test_use_ddim_is_a_sampler(small):
    noise = torch.randn(2, 4, 4, 4)
    flag = denoise(small, noise, LABELS, num_steps=4, use_ddim=True)
    assert torch.equal(flag, denoise(small, noise, LABELS, num_steps=4, sampler="ddim"))


def test_errors(small):
    noise = torch.randn(2, 4, 4, 4)
    choices = r"'ddpm', 'ddim', 'dpmsolver\+\+', 'unipc'"
    with pytest.raises(ValueError, match=rf"sampler must be one of \({choices}\), got 'euler'"):
        denoise(small, noise, LABELS, num_steps=4, sampler="euler")
    with pytest.raises(ValueError, match=rf"one of \({choices}\), got True"):
        denoise(small, noise, LABELS, num_steps=4, sampler=True)
    with pytest.raises(ValueError, match="use_ddim=True is sampler='ddim', got sampler='unipc'"):
        denoise(small, noise, LABELS, num_steps=4, sampler="unipc", use_ddim=True)
    with pytest.raises(ValueError, match=r"spacing must be one of \('even', .* got 'cosine'"):
        denoise(small, noise, LABELS, num_steps=4, sampler="ddim", spacing="cosine")
    with pytest.raises(ValueError, match="needs a model with learn_sigma=True"):
        denoise(small, noise, LABELS, num_steps=4)
    with pytest.raises(ValueError, match="guidance_eps must be at least 0, got -1"):
        denoise(small, noise, LABELS, num_steps=4, sampler="ddim", cfg_scale=2.0, guidance_eps=-1)
