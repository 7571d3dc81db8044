"""From noise to latents: the guided loop, with random numbers that belong to the sample."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffit_kernels.model import DiffiT
from diffit_kernels.sampling.schedule import make_scheduler


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample ``index`` of a run, whoever draws it, in whatever batch."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def initial_noise(model: DiffiT, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, in_channels, S, S) float32 on the model's device, one sample from each generator."""
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(model.pos_embed.device)


@torch.inference_mode()
def denoise(
    model: DiffiT,
    latents: Tensor,
    labels: Tensor,
    *,
    num_steps: int = 250,
    cfg_scale: float | None = None,
    scale_pow: float = 4.0,
    use_ddim: bool = False,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise latents with the published sampler.

    Args:
        model: a latent DiffiT in eval mode, with learned variances unless ``use_ddim``.
        latents: (B, in_channels, S, S) float32, standard normal.
        labels: (B,) int64 classes.
        num_steps: network evaluations per sample, respaced from 1000.
        cfg_scale: strength of classifier-free guidance; None samples without.
        scale_pow: the power of the guidance schedule, see :meth:`DiffiT.forward_with_cfg`.
        use_ddim: DDIM with eta 0 instead of ancestral sampling.
        generators: one per sample for the noise of ancestral steps; default the global one.
        on_step: called after every step.

    Returns:
        (B, in_channels, S, S) float32. The state is kept in float32 whatever the model's dtype.

    Raises:
        ValueError: ancestral sampling from a model without learned variances.
    """
    if not (model.learn_sigma or use_ddim):
        raise ValueError(
            "ancestral sampling needs a model with learn_sigma=True; use_ddim does not"
        )
    scheduler, timesteps = make_scheduler(num_steps, use_ddim)
    dtype = model.x_embedder.proj.weight.dtype
    null = torch.full_like(labels, model.num_classes)
    for step in scheduler.timesteps.tolist():
        x = latents.to(dtype)
        t = torch.full_like(labels, int(timesteps[step]))
        if cfg_scale is None:
            out = model(x, t, labels)
        else:
            pair = (torch.cat((a, b)) for a, b in ((x, x), (t, t), (labels, null)))
            out = model.forward_with_cfg(*pair, cfg_scale=cfg_scale, scale_pow=scale_pow)
            out = out[: len(latents)]
        out = out.float()
        if use_ddim:
            update = scheduler.step(out[:, : model.in_channels], step, latents)
        else:
            generator = None if generators is None else list(generators)
            update = scheduler.step(out, step, latents, generator=generator)
        latents = update.prev_sample
        on_step()
    return latents
