"""Guided sampling as published: schedule, denoising loop, decoding, and resumable runs to disk.

Latents by DDPM or DDIM; images by EDM, which also trains.
"""

from diffit_kernels.sampling.denoise import denoise, initial_noise, sample_generator
from diffit_kernels.sampling.edm import (
    denoised,
    edm_loss,
    heun_sample,
    sigma_schedule,
)
from diffit_kernels.sampling.schedule import check_extra, make_scheduler, respaced_timesteps

__all__ = [
    "check_extra",
    "respaced_timesteps",
    "make_scheduler",
    "sample_generator",
    "initial_noise",
    "denoise",
    "sigma_schedule",
    "denoised",
    "edm_loss",
    "heun_sample",
]
