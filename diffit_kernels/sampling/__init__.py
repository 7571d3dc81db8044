"""Guided sampling as published: schedule, denoising loop, decoding, and resumable runs to disk."""

from diffit_kernels.sampling.denoise import denoise, initial_noise, sample_generator
from diffit_kernels.sampling.schedule import check_extra, make_scheduler, respaced_timesteps

__all__ = [
    "check_extra",
    "respaced_timesteps",
    "make_scheduler",
    "sample_generator",
    "initial_noise",
    "denoise",
]
