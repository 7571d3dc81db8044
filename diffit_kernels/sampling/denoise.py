"""From noise to latents: the guided loop, with random numbers that belong to the sample."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffit_kernels.model import DiffiT
from diffit_kernels.sampling.predict import ALL_SAVINGS, Predictor, Savings
from diffit_kernels.sampling.schedule import make_scheduler, sampler_name


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample ``index`` of a run, whoever draws it, in whatever batch."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def initial_noise(model: nn.Module, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, in_channels, S, S) float32 on the model's device, one sample from each generator.

    For latents and images: the shape is the model's ``sample_shape``.
    """
    shape = model.sample_shape
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(next(model.parameters()).device)


@torch.inference_mode()
def denoise(
    model: DiffiT,
    latents: Tensor,
    labels: Tensor,
    *,
    num_steps: int = 250,
    cfg_scale: float | None = None,
    scale_pow: float = 4.0,
    sampler: str = "ddpm",
    use_ddim: bool = False,
    spacing: str | None = None,
    guidance_eps: float = 0.0,
    savings: Savings = ALL_SAVINGS,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise latents with the published sampler, or another of :data:`schedule.SAMPLERS`.

    Args:
        model: a latent DiffiT in eval mode, with learned variances if ``sampler`` is "ddpm".
        latents: (B, in_channels, S, S), floating point, standard normal.
        labels: (B,) int64 classes.
        num_steps: network evaluations per sample, respaced from 1000.
        cfg_scale: strength of classifier-free guidance; None samples without.
        scale_pow: the power of the guidance schedule, see :meth:`DiffiT.forward_with_cfg`.
        sampler: "ddpm", ancestral as published; or "ddim", "dpmsolver++", "unipc", which add no
            noise, see :func:`~diffit_kernels.sampling.schedule.make_scheduler`.
        use_ddim: another name for ``sampler="ddim"``.
        spacing: of the timesteps, "even" as published, or "quadratic", with which the solvers need
            few steps and which is their default
            (:func:`~diffit_kernels.sampling.schedule.respaced_timesteps`).
        guidance_eps: no guidance where its weight differs from 1 by at most this: 0 is exact, see
            :func:`~diffit_kernels.sampling.predict.guidance_steps`.
        savings: what is computed once, see :class:`~diffit_kernels.sampling.predict.Predictor`.
        generators: one per sample for the noise of ancestral steps; default the global one.
        on_step: called after every step.

    Returns:
        (B, in_channels, S, S) float32, or float64 for float64 ``latents``: the dtype of the state,
        whatever the model's. "dpmsolver++" computes its steps in float32 even then.

    Raises:
        ValueError: an unknown ``sampler`` or ``spacing``, ``guidance_eps`` < 0, or ancestral
            sampling from a model without learned variances.
    """
    sampler = sampler_name(sampler, use_ddim)
    if sampler == "ddpm" and not model.learn_sigma:
        raise ValueError(
            "ancestral sampling needs a model with learn_sigma=True; the other samplers do not"
        )
    scheduler, timesteps = make_scheduler(num_steps, sampler, spacing=spacing)
    dtype = model.x_embedder.proj.weight.dtype
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    predict = Predictor(
        model,
        labels,
        timesteps,
        cfg_scale,
        scale_pow,
        guidance_eps=guidance_eps,
        savings=savings,
    )
    for step in scheduler.timesteps.tolist():
        out = predict(latents.to(dtype), step).to(latents.dtype)
        if sampler == "ddpm":
            generator = None if generators is None else list(generators)
            update = scheduler.step(out, step, latents, generator=generator)
        else:
            update = scheduler.step(out[:, : model.in_channels], step, latents)
        latents = update.prev_sample
        on_step()
    return latents
