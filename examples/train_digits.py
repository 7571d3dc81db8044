"""Train a small class-conditional DiffiT on scikit-learn's 8 × 8 digits: minutes on two CPU cores.

    python examples/train_digits.py

The images become 4 × 4 "latents" of 4 channels by ``pixel_unshuffle``, so that the published
model, guidance and samplers run on them unchanged; ``pixel_shuffle`` is the decoder. The process
and its loss are the published ones (``diffusion_loss.py``). For your own latents, in a run that
resumes, there is ``train_latents.py``.

The weights written are an exponential moving average. Ctrl-C stops early and keeps what it reached.
The packaged model is what this writes with its defaults; train_digits_loss.png is its loss.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from diffit_kernels import DiffiT, save_pretrained
from diffusion_loss import NUM_TIMESTEPS, Diffusion, hybrid_loss
from digits_recipe import argument_parser, averaged_copy, digit_images, interruptible
from digits_recipe import train as train_on

HALF_BIN = 1 / 16  # 17 grey levels on [-1, 1] are 2 / 16 apart


def main() -> None:
    parser = argument_parser(
        "Train a small class-conditional DiffiT on scikit-learn's digits.",
        Path("digits.safetensors"),
        steps=2500,
        batch_size=256,
        lr=4e-3,
    )
    parser.add_argument("--plot", type=Path, default=Path("digits_loss.png"), help="loss plot")
    args = parser.parse_args()
    for path in (args.out, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)  # fails before the training, not after
    torch.manual_seed(args.seed)
    model = digits_model()
    ema = averaged_copy(model)
    losses = interruptible(train(model, ema, args.steps, args.batch_size, args.lr), args.steps)
    save_pretrained(ema, args.out, {"decoder": "pixel_shuffle"})
    plot_losses(losses, args.plot)
    print(f"weights of step {len(losses)}: {args.out}\nloss plot: {args.plot}")


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
    """``pixel_unshuffle`` of all digits by 2, and their classes 0..9.

    (1797, 4, 4, 4) float32 in [-1, 1], and (1797,) int64.
    """
    images, classes = digit_images()
    return F.pixel_unshuffle(images, 2), classes


def train(
    model: DiffiT, ema: DiffiT, steps: int, batch_size: int, lr: float
) -> Iterator[tuple[float, float]]:
    """``steps`` steps of AdamW on ``model``, averaged into ``ema``; yields :func:`hybrid_loss`."""
    latents, classes = digits_latents()
    diffusion = Diffusion.linear()

    def loss_of(index: Tensor) -> tuple[Tensor, Tensor]:
        x0 = latents[index]
        t, epsilon = torch.randint(NUM_TIMESTEPS, (len(x0),)), torch.randn_like(x0)
        return hybrid_loss(model, diffusion, x0, classes[index], t, epsilon, HALF_BIN)

    return train_on(model, ema, loss_of, steps, batch_size, lr)


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
