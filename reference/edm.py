"""EDM (arXiv 2206.00364), with which the image-space DiffiT is trained and sampled."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0

# F(x; c_noise) of the network, or D(x; σ) of a denoiser: (B, c, S, S), (B,) -> (B, c, S, S).
Function = Callable[[Tensor, Tensor], Tensor]


def preconditioning(sigma: float) -> tuple[float, float, float, float]:
    """(c_skip, c_out, c_in, c_noise) of one noise level (EDM, table 1).

    ::

        c_skip = σ_d² / (σ² + σ_d²)         c_out   = σ σ_d / √(σ² + σ_d²)
        c_in   = 1 / √(σ² + σ_d²)           c_noise = ln(σ) / 4
    """
    total = sigma**2 + SIGMA_DATA**2
    c_skip = SIGMA_DATA**2 / total
    c_out = sigma * SIGMA_DATA / math.sqrt(total)
    return c_skip, c_out, 1 / math.sqrt(total), math.log(sigma) / 4


def denoised(network: Function, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise), sample by sample."""
    samples = []
    for one, level in zip(x, sigma.tolist(), strict=True):
        c_skip, c_out, c_in, c_noise = preconditioning(level)
        prediction = network(c_in * one[None], torch.tensor([c_noise], dtype=x.dtype))
        samples.append(c_skip * one + c_out * prediction[0])
    return torch.stack(samples)


def edm_loss(network: Function, images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The mean of λ(σ) (D(x + σ n; σ) - x)², λ(σ) = (σ² + σ_d²) / (σ σ_d)², over all numbers."""
    losses = []
    for image, level, n in zip(images, sigma, noise, strict=True):
        clean = denoised(network, (image + level * n)[None], level[None])[0]
        weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
        losses.append(weight * (clean - image) ** 2)
    return torch.stack(losses).mean()


def sigma_schedule(steps: int) -> list[float]:
    """σ_i = (σ_max^(1/ρ) + i / (steps - 1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, i < steps; then 0."""
    first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [(first + i / max(steps - 1, 1) * (last - first)) ** RHO for i in range(steps)]
    return [*levels, 0.0]


def heun_sampling(denoiser: Function, noise: Tensor, steps: int) -> Tensor:
    """The deterministic sampler (EDM, algorithm 1), from standard normal noise (B, c, S, S).

    ::

        d  = (x - D(x; σ_i)) / σ_i               x' = x + (σ_{i+1} - σ_i) d
        d' = (x' - D(x'; σ_{i+1})) / σ_{i+1}     x  = x + (σ_{i+1} - σ_i) (d + d') / 2

    The last step, to σ = 0, ends with x': 2 steps - 1 evaluations.
    """
    levels = sigma_schedule(steps)
    x = levels[0] * noise
    for now, after in itertools.pairwise(levels):
        slope = (x - denoiser(x, torch.full((len(x),), now, dtype=x.dtype))) / now
        ahead = x + (after - now) * slope
        if after > 0:
            end = (ahead - denoiser(ahead, torch.full((len(x),), after, dtype=x.dtype))) / after
            ahead = x + (after - now) * (slope + end) / 2
        x = ahead
    return x
