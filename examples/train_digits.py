"""Train a small class-conditional DiffiT on scikit-learn's 8 × 8 digits: minutes on two CPU cores.

    python examples/train_digits.py

The images become 4 × 4 "latents" of 4 channels by ``pixel_unshuffle``, so that the published
model, guidance and samplers run on them unchanged; ``pixel_shuffle`` is the decoder. The process
is the published one: 1000 steps, linear betas, noise prediction and a learned range of variances,
trained with the hybrid loss of Improved DDPM (arXiv 2102.09672, section 3.1).

The weights written are an exponential moving average. Ctrl-C stops early and keeps what it reached.
The packaged model is what this writes with its defaults; train_digits_loss.png is its loss.

The letters: B batch; t timesteps 0..999; x0 data; x_t = sqrt(ᾱ_t) x0 + sqrt(1 - ᾱ_t) ε.
"""

import argparse
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from diffit_kernels import DiffiT

NUM_TIMESTEPS = 1000
HALF_BIN = 1 / 16  # 17 grey levels on [-1, 1] are 2 / 16 apart


def main() -> None:
    args = parse_arguments()
    for path in (args.out, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)  # fails before the training, not after
    torch.manual_seed(args.seed)
    model = digits_model()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    losses = []
    try:
        for parts in train(model, ema, args.steps, args.batch_size, args.lr):
            losses.append(parts)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(losses)} of {args.steps} steps; saving what they reached")
    if not losses:
        raise SystemExit("no step was made: nothing written")
    save_weights(ema, args.out)
    plot_losses(losses, args.plot)
    print(f"weights of step {len(losses)}: {args.out}\nloss plot: {args.plot}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small class-conditional DiffiT on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out, plot = Path("digits.safetensors"), Path("digits_loss.png")
    parser.add_argument("--out", type=Path, default=out, help="weights to write")
    parser.add_argument("--plot", type=Path, default=plot, help="loss plot to write")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    args = parser.parse_args()
    for flag, value in (("steps", args.steps), ("batch-size", args.batch_size), ("lr", args.lr)):
        if not value > 0:
            parser.error(f"--{flag} must be positive, got {value}")
    return args


def digits_model() -> DiffiT:
    """The checkpoint's model: 0.6 M parameters, 16 tokens, 3 heads of 32, learned variance."""
    return DiffiT(
        input_size=4,
        patch_size=1,
        hidden_size=96,
        depth=4,
        num_heads=3,
        num_classes=10,
        use_fused_tmsa=True,
    )


def digits_latents() -> tuple[Tensor, Tensor]:
    """``pixel_unshuffle(pixels / 8 - 1, 2)`` of all digits, and their classes 0..9.

    (1797, 4, 4, 4) float32 in [-1, 1], and (1797,) int64.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8)
    return F.pixel_unshuffle(images, 2), torch.from_numpy(digits.target).long()


def train(
    model: DiffiT, ema: DiffiT, steps: int, batch_size: int, lr: float
) -> Iterator[tuple[float, float]]:
    """``steps`` steps of AdamW on ``model``, averaged into ``ema``; yields :func:`hybrid_loss`."""
    latents, classes = digits_latents()
    diffusion = Diffusion.linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(i, steps))
    model.train()
    bar = tqdm(range(steps), desc="training", mininterval=0.5)
    for step in bar:
        index = torch.randint(len(latents), (batch_size,))
        mse, bound = hybrid_loss(model, diffusion, latents[index], classes[index])
        optimizer.zero_grad(set_to_none=True)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, step)
        parts = mse.item(), bound.item()
        bar.set_postfix(loss=f"{sum(parts):.4f}", refresh=False)
        yield parts


def learning_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """min(1, (step + 1) / warm_up) · ½ (1 + cos(π step / steps)): the share of the peak rate."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema: DiffiT, model: DiffiT, step: int, decay: float = 0.999) -> None:
    """ema += (1 - d) (model - ema) with d = min(decay, (step + 1) / (step + 10)), in place.

    The smaller d of the first steps lets the average forget the random start.
    """
    rate = 1 - min(decay, (step + 1) / (step + 10))
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, rate)


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
    def linear(cls) -> "Diffusion":
        """β_t from 1e-4 to 0.02 in equal steps, computed in float64."""
        beta = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        posterior[0] = posterior[1]  # the last step has no posterior variance, and log 0 no value
        mean_error = beta / ((1 - beta) * (1 - alpha_bar)).sqrt()
        tables = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), mean_error, beta.log(), posterior.log()
        return cls(*(table.float() for table in tables))


def hybrid_loss(
    model: DiffiT, diffusion: Diffusion, x0: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """L_simple + λ L_vlb with λ = 1 / 1000, at one uniform timestep per sample.

    ::

        L_simple = mean (ε - ε_θ)²
        λ L_vlb  = mean L_t,  as L_vlb is the sum of E[L_t] over the 1000 timesteps

    ε_θ counts as a constant in L_vlb, which trains the variance only. x0 is (B, 4, 4, 4) float32,
    ``classes`` (B,) int64; returns the two scalars, the second in bits per pixel.
    """
    t = torch.randint(NUM_TIMESTEPS, (len(x0),))
    epsilon = torch.randn_like(x0)
    x_t = at(diffusion.signal, t) * x0 + at(diffusion.noise, t) * epsilon
    predicted, v = model(x_t, t, classes).chunk(2, 1)  # (B, 4, 4, 4) each
    bound = variational_bound(diffusion, x0, epsilon - predicted.detach(), v, t)
    return (epsilon - predicted).square().mean(), bound.mean()


def variational_bound(
    diffusion: Diffusion, x0: Tensor, epsilon_error: Tensor, v: Tensor, t: Tensor
) -> Tensor:
    """L_t per pixel, in bits::

        L_t = KL(N(μ, σ_q²) || N(μ_θ, σ²))
            = ½ (log σ² - log σ_q² - 1 + (σ_q² + (μ - μ_θ)²) / σ²)                         t > 0
        L_0 = -log(Φ((x0 + h - μ_θ) / σ) - Φ((x0 - h - μ_θ) / σ)),  h half a grey level    t = 0

    with log σ² = f log β_t + (1 - f) log σ_q², f = (v + 1) / 2, σ_q² the posterior variance, and
    μ_θ - μ = β_t / sqrt(α_t (1 - ᾱ_t)) · (ε - ε_θ); at t = 0, μ is x0.
    x0, ``epsilon_error`` = ε - ε_θ, v and the result are (B, 4, 4, 4) float32, t is (B,) int64.
    """
    log_q = at(diffusion.log_posterior, t)
    fraction = (v + 1) / 2
    log_variance = fraction * at(diffusion.log_beta, t) + (1 - fraction) * log_q
    error = at(diffusion.mean_error, t) * epsilon_error  # μ_θ - μ
    ratio = (log_q - log_variance).exp() + error.square() * (-log_variance).exp()
    divergence = 0.5 * (log_variance - log_q - 1 + ratio)

    deviation = (0.5 * log_variance).exp()
    # The outermost grey levels take the tails, so that the 17 probabilities add up to one.
    upper = torch.special.ndtr((HALF_BIN - error) / deviation).where(x0 < 1 - HALF_BIN, 1.0)
    lower = torch.special.ndtr((-HALF_BIN - error) / deviation).where(x0 > HALF_BIN - 1, 0.0)
    likelihood = -(upper - lower).clamp_min(1e-12).log()
    return torch.where(t.view(-1, 1, 1, 1) == 0, likelihood, divergence) / math.log(2)


def at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] as (B, 1, 1, 1), to broadcast over latents."""
    return table[t].view(-1, 1, 1, 1)


def save_weights(model: DiffiT, path: Path) -> None:
    """Write the state dict to ``path``; whatever happens, ``path`` is the old file or the new."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(save(model.state_dict(), metadata={"decoder": "pixel_shuffle"}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def plot_losses(losses: list[tuple[float, float]], path: Path, window: int = 50) -> None:
    """Plot both parts of the loss, averaged over ``window`` steps, on a logarithmic axis."""
    window = min(window, len(losses))
    noise, variance = F.avg_pool1d(torch.tensor(losses).T, window, stride=1)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(window, len(losses) + 1)
    axes.semilogy(steps, noise, label="noise, mean square")
    axes.semilogy(steps, variance, label="variance, bits per pixel")
    axes.set(xlabel="step", ylabel=f"loss (mean of {window} steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
