"""The published diffusion process and its hybrid loss, and what both training examples share.

1000 steps, linear betas, noise prediction and a learned range of variances, trained with the hybrid
loss of Improved DDPM (arXiv 2102.09672, section 3.1).

The letters: B batch; t timesteps 0..999; x0 data; x_t = sqrt(ᾱ_t) x0 + sqrt(1 - ᾱ_t) ε.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Diffusion:
    """What the loss needs of the noise schedule: (1000,) float32 each, indexed by t.

    The mean of x_{t-1} given x_t is (x_t - β_t / sqrt(1 - ᾱ_t) ε) / sqrt(α_t), so that an error of
    ε moves it by ``mean_error`` times as much. ``log_beta`` and ``log_posterior`` are the ends of
    the learned range of log variances.
    """

    signal: Tensor  # sqrt(ᾱ_t)
    noise: Tensor  # sqrt(1 - ᾱ_t)
    mean_error: Tensor  # β_t / sqrt(α_t (1 - ᾱ_t))
    log_beta: Tensor  # log β_t
    log_posterior: Tensor  # log of β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)

    @classmethod
    def linear(cls, device: torch.device | str = "cpu") -> "Diffusion":
        """β_t from 1e-4 to 0.02 in equal steps, computed in float64."""
        beta = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        posterior[0] = posterior[1]  # the last step has no posterior variance, and log 0 no value
        mean_error = beta / ((1 - beta) * (1 - alpha_bar)).sqrt()
        tables = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), mean_error, beta.log(), posterior.log()
        return cls(*(table.float().to(device) for table in tables))


def hybrid_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    x0: Tensor,
    classes: Tensor,
    t: Tensor,
    epsilon: Tensor,
    half_bin: float,
) -> tuple[Tensor, Tensor]:
    """L_simple + λ L_vlb with λ = 1 / 1000, at one timestep per sample.

    ::

        L_simple = mean (ε - ε_θ)²
        λ L_vlb  = mean L_t,  as L_vlb is the sum of E[L_t] over the 1000 timesteps

    ε_θ counts as a constant in L_vlb, which trains the variance only. ``predict`` is the model,
    (x_t, t, classes) -> (B, 2C, S, S) in any dtype. x0 and ``epsilon`` are (B, C, S, S) float32, t
    and ``classes`` (B,) int64; ``half_bin`` is h of :func:`variational_bound`. Returns the two
    scalars, float32, the second in bits per element.
    """
    x_t = at(diffusion.signal, t) * x0 + at(diffusion.noise, t) * epsilon
    predicted, v = predict(x_t, t, classes).float().chunk(2, 1)  # (B, C, S, S) each
    bound = variational_bound(diffusion, x0, epsilon - predicted.detach(), v, t, half_bin)
    return (epsilon - predicted).square().mean(), bound.mean()


def variational_bound(
    diffusion: Diffusion, x0: Tensor, epsilon_error: Tensor, v: Tensor, t: Tensor, half_bin: float
) -> Tensor:
    """L_t per element, in bits::

        L_t = KL(N(μ, σ_q²) || N(μ_θ, σ²))
            = ½ (log σ² - log σ_q² - 1 + (σ_q² + (μ - μ_θ)²) / σ²)                         t > 0
        L_0 = -log(Φ((x0 + h - μ_θ) / σ) - Φ((x0 - h - μ_θ) / σ)),  h half a grey level    t = 0

    with log σ² = f log β_t + (1 - f) log σ_q², f = (v + 1) / 2, σ_q² the posterior variance, and
    μ_θ - μ = β_t / sqrt(α_t (1 - ᾱ_t)) · (ε - ε_θ); at t = 0, μ is x0. Grey levels end at -1 and 1.
    x0, ``epsilon_error`` = ε - ε_θ, v and the result are (B, C, S, S) float32, t is (B,) int64.
    """
    log_q = at(diffusion.log_posterior, t)
    fraction = (v + 1) / 2
    log_variance = fraction * at(diffusion.log_beta, t) + (1 - fraction) * log_q
    error = at(diffusion.mean_error, t) * epsilon_error  # μ_θ - μ
    ratio = (log_q - log_variance).exp() + error.square() * (-log_variance).exp()
    divergence = 0.5 * (log_variance - log_q - 1 + ratio)

    deviation = (0.5 * log_variance).exp()
    # The outermost grey levels take the tails, so that the probabilities add up to one.
    upper = torch.special.ndtr((half_bin - error) / deviation).where(x0 < 1 - half_bin, 1.0)
    lower = torch.special.ndtr((-half_bin - error) / deviation).where(x0 > half_bin - 1, 0.0)
    likelihood = -(upper - lower).clamp_min(1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, likelihood, divergence) / math.log(2)


def at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] as (B, 1, 1, 1), to broadcast over latents."""
    return table[t].view(-1, 1, 1, 1)


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """min(1, (step + 1) / warm_up) · ½ (1 + cos(π step / steps)): the share of the peak rate."""
    return constant_rate(step, warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def constant_rate(step: int, warm_up: int = 100) -> float:
    """min(1, (step + 1) / warm_up): the share of the peak rate."""
    return min(1.0, (step + 1) / max(1, warm_up))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float = 0.999) -> None:
    """ema += (1 - d) (model - ema) with d = min(decay, (step + 1) / (step + 10)), in place.

    The smaller d of the first steps lets the average forget the random start.
    """
    rate = 1 - min(decay, (step + 1) / (step + 10))
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, rate)
