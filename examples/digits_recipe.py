"""What the two digit examples share: scikit-learn's 8 × 8 digits, the arguments, and the loop."""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_loss import cosine_rate, update_ema


def digit_images() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) float32 in [-1, 1], and their classes 0..9, (1797,) int64."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def argument_parser(
    description: str, out: Path, *, steps: int, batch_size: int, lr: float
) -> argparse.ArgumentParser:
    """A parser of what both examples take, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=out, help="weights to write")
    parser.add_argument("--steps", type=positive(int), default=steps, help="optimizer steps")
    parser.add_argument(
        "--batch-size", type=positive(int), default=batch_size, help="images per step"
    )
    parser.add_argument("--lr", type=positive(float), default=lr, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    return parser


def positive(kind: type) -> Callable[[str], int | float]:
    """An argument's type: a number above zero."""

    def parse(text: str) -> int | float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # in argparse's messages
    return parse


def averaged_copy(model: nn.Module) -> nn.Module:
    """What :func:`train` averages into: a copy without gradients, in eval mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def train(
    model: nn.Module,
    ema: nn.Module,
    loss_of: Callable[[Tensor], Sequence[Tensor]],
    steps: int,
    batch_size: int,
    lr: float,
) -> Iterator[tuple[float, ...]]:
    """``steps`` steps of AdamW on ``model``, averaged into ``ema``; yields the parts of each loss.

    ``loss_of(index)`` gives the loss of the images with these numbers, in parts.
    """
    images = len(load_digits().target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_rate(i, steps))
    model.train()
    bar = tqdm(range(steps), desc="training", mininterval=0.5)
    for step in bar:
        losses = loss_of(torch.randint(images, (batch_size,)))
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, step)
        parts = tuple(loss.item() for loss in losses)
        bar.set_postfix(loss=f"{sum(parts):.4f}", refresh=False)
        yield parts


def interruptible(losses: Iterator[tuple[float, ...]], steps: int) -> list[tuple[float, ...]]:
    """All losses, or those up to Ctrl-C, which is said.

    Raises:
        SystemExit: there are none.
    """
    done = []
    try:
        done.extend(losses)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(done)} of {steps} steps; saving what they reached")
    if not done:
        raise SystemExit("no step was made: nothing written")
    return done
