"""Train a small class-conditional DiffiT on scikit-learn's 8 × 8 digits: minutes on two CPU cores.

    python examples/train_digits.py

The images become 4 × 4 "latents" of 4 channels by ``pixel_unshuffle``, so that the published
model, guidance and samplers run on them unchanged; ``pixel_shuffle`` is the decoder. The process
and its loss are the published ones (``diffusion_loss.py``). For your own latents, in a run that
resumes, there is ``train_latents.py``.

The weights written are an exponential moving average. Ctrl-C stops early and keeps what it reached.
The packaged model is what this writes with its defaults; train_digits_loss.png is its loss.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from diffit_kernels import DiffiT
from diffusion_loss import NUM_TIMESTEPS, Diffusion, cosine_rate, hybrid_loss, update_ema
from run_folder import write_whole

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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_rate(i, steps))
    model.train()
    bar = tqdm(range(steps), desc="training", mininterval=0.5)
    for step in bar:
        index = torch.randint(len(latents), (batch_size,))
        x0 = latents[index]
        t, epsilon = torch.randint(NUM_TIMESTEPS, (batch_size,)), torch.randn_like(x0)
        mse, bound = hybrid_loss(model, diffusion, x0, classes[index], t, epsilon, HALF_BIN)
        optimizer.zero_grad(set_to_none=True)
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, step)
        parts = mse.item(), bound.item()
        bar.set_postfix(loss=f"{sum(parts):.4f}", refresh=False)
        yield parts


def save_weights(model: DiffiT, path: Path) -> None:
    """Write the state dict to ``path``; whatever happens, ``path`` is the old file or the new."""
    weights = save(model.state_dict(), metadata={"decoder": "pixel_shuffle"})
    write_whole(path, lambda file: file.write(weights))


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
