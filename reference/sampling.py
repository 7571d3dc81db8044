"""Guided ancestral sampling as published: 1000 linear betas, respaced, learned-range variance."""

import math

import torch
from torch import Tensor

from reference.latent import guided, latent_diffit

TRAINING_STEPS = 1000


def ancestral_sampling(
    state: dict[str, Tensor], z: Tensor, y: Tensor, noise: Tensor, num_heads: int, scale: float
) -> Tensor:
    """The latents x_0 of noise z (B, c, S, S) for the classes y (B,), in the dtype of ``state``.

    ``noise`` (steps, B, c, S, S) in the order of use; of the last step, which adds none, it is not
    read. The network sees [conditional; null] with the same latents and the original timesteps.
    """
    timesteps = respaced_timesteps(len(noise))
    null = torch.full_like(y, len(state["y_embedder.embedding_table.weight"]) - 1)
    x = z
    for step in reversed(range(len(timesteps))):
        t = torch.full((2 * len(y),), timesteps[step])
        prediction = latent_diffit(state, torch.cat((x, x)), t, torch.cat((y, null)), num_heads)
        prediction = guided(prediction, t, scale, z.shape[-1])[: len(y)]
        x = ancestral_step(x, prediction, noise[len(noise) - 1 - step], timesteps, step)
    return x


def respaced_timesteps(steps: int) -> list[int]:
    """An even stride from 0 to 999: t_i = round(i · 999 / (steps - 1))."""
    return [round(i * (TRAINING_STEPS - 1) / max(steps - 1, 1)) for i in range(steps)]


def ancestral_step(
    x: Tensor, prediction: Tensor, noise: Tensor, timesteps: list[int], step: int
) -> Tensor:
    """x_{i-1} = mean + exp(½ log variance) · noise, from a prediction (B, 2c, S, S) of [ε | v].

    ::

        β_i = 1 - ᾱ(t_i) / ᾱ(t_{i-1})                      the betas of the shorter chain
        x_0 = (x - √(1 - ᾱ_i) ε) / √ᾱ_i                    not clipped
        mean = (√ᾱ_{i-1} β_i x_0 + √(1 - β_i) (1 - ᾱ_{i-1}) x) / (1 - ᾱ_i)
        posterior variance = β_i (1 - ᾱ_{i-1}) / (1 - ᾱ_i)
        log variance = f log β_i + (1 - f) log posterior variance,  f = (v + 1) / 2
    """
    products = alpha_bars()
    abar = products[timesteps[step]]
    abar_before = products[timesteps[step - 1]] if step > 0 else 1.0
    beta = 1 - abar / abar_before
    epsilon, v = prediction.chunk(2, 1)
    start = (x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
    of_start = math.sqrt(abar_before) * beta
    of_x = math.sqrt(1 - beta) * (1 - abar_before)
    mean = (of_start * start + of_x * x) / (1 - abar)
    if step == 0:
        return mean
    fraction = (v + 1) / 2
    posterior_variance = beta * (1 - abar_before) / (1 - abar)
    log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(posterior_variance)
    return mean + torch.exp(0.5 * log_variance) * noise


def alpha_bars() -> list[float]:
    """ᾱ_t = Π_{s ≤ t} (1 - β_s), with β from 1e-4 to 0.02 in even steps."""
    products, product = [], 1.0
    for t in range(TRAINING_STEPS):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / (TRAINING_STEPS - 1))
        products.append(product)
    return products
