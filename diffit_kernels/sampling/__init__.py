"""Guided sampling as published: schedule, denoising loop, decoding, and resumable runs to disk.

Latents by DDPM or DDIM; images by EDM, which also trains.
"""

from diffit_kernels.sampling.denoiser import Denoiser, denoise
from diffit_kernels.sampling.edm import (
    denoised,
    edm_loss,
    heun_sample,
    sigma_schedule,
)
from diffit_kernels.sampling.noise import initial_noise, sample_generator
from diffit_kernels.sampling.predict import Savings, guidance_steps
from diffit_kernels.sampling.schedule import check_extra, respaced_timesteps

__all__ = [
    "check_extra",
    "respaced_timesteps",
    "guidance_steps",
    "Savings",
    "sample_generator",
    "initial_noise",
    "denoise",
    "Denoiser",
    "sigma_schedule",
    "denoised",
    "edm_loss",
    "heun_sample",
]
