"""Random numbers that belong to the sample, whoever draws it, in whatever batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample ``index`` of a run."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def initial_noise(model: nn.Module, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, in_channels, S, S) float32 on the model's device, one sample from each generator.

    For latents and images: the shape is the model's ``sample_shape``.
    """
    shape = model.sample_shape
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(next(model.parameters()).device)


def step_noise(latents: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal numbers like ``latents``, from one generator per sample, or one for all.

    On the generators' device; for a GPU in pinned memory, from where it can be fetched while the
    host goes on. None: the global generator of the latents' device.
    """
    if generators is None:
        return torch.randn_like(latents)
    counts = [len(latents)] if len(generators) == 1 else [1] * len(latents)
    drawn = []
    for generator, count in zip(generators, counts, strict=True):
        about = {"generator": generator, "device": generator.device, "dtype": latents.dtype}
        drawn.append(torch.randn((count, *latents.shape[1:]), **about))
    noise = torch.cat(drawn)
    return noise.pin_memory() if noise.device.type != latents.device.type == "cuda" else noise
