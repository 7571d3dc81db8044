"""Train a small class-conditional image-space DiffiT on scikit-learn's 8 × 8 digits, on two cores.

    python examples/train_image_digits.py

The recipe is EDM's (arXiv 2206.00364): noise levels from a log-normal distribution, and the
network preconditioned to a weight of one at each. Two stages, of 8 × 8 and 4 × 4 pixels, whose
attention has windows of 4 × 4.

The weights written are an exponential moving average. Ctrl-C stops early and keeps what it reached.
The packaged model is what this writes with its defaults.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from diffit_kernels import ImageDiffiT, save_pretrained
from diffit_kernels.sampling.edm import edm_loss
from diffusion_loss import cosine_rate, update_ema


def main() -> None:
    args = parse_arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before the training, not after
    torch.manual_seed(args.seed)
    model = image_digits_model()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    done = 0
    try:
        for _ in train(model, ema, args.steps, args.batch_size, args.lr):
            done += 1
    except KeyboardInterrupt:
        print(f"\ninterrupted after {done} of {args.steps} steps; saving what they reached")
    if not done:
        raise SystemExit("no step was made: nothing written")
    save_pretrained(ema, args.out)
    print(f"weights of step {done}: {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small image-space DiffiT on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = Path("image_digits.safetensors")
    parser.add_argument("--out", type=Path, default=out, help="weights to write")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    args = parser.parse_args()
    for flag, value in (("steps", args.steps), ("batch-size", args.batch_size), ("lr", args.lr)):
        if not value > 0:
            parser.error(f"--{flag} must be positive, got {value}")
    return args


def image_digits_model() -> ImageDiffiT:
    """The checkpoint's model: four cells, heads of 16 and 32, one class for each digit."""
    return ImageDiffiT(
        image_size=8,
        in_channels=1,
        channels=(48, 96),
        num_cells=1,
        window_size=4,
        num_heads=3,
        temb_size=96,
        num_classes=10,
        use_fused_tmsa=True,
    )


def digit_images() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) float32 in [-1, 1], and their classes 0..9, (1797,) int64."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def train(
    model: ImageDiffiT, ema: ImageDiffiT, steps: int, batch_size: int, lr: float
) -> Iterator[float]:
    """``steps`` steps of AdamW on ``model``, averaged into ``ema``; yields the loss of each."""
    images, classes = digit_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_rate(i, steps))
    model.train()
    bar = tqdm(range(steps), desc="training", mininterval=0.5)
    for step in bar:
        index = torch.randint(len(images), (batch_size,))
        loss = edm_loss(model, images[index], classes[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, step)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        yield loss.item()


if __name__ == "__main__":
    main()
