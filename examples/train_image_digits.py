"""Train a small class-conditional image-space DiffiT on scikit-learn's 8 × 8 digits, on two cores.

    python examples/train_image_digits.py

The recipe is EDM's (arXiv 2206.00364): noise levels from a log-normal distribution, and the
network preconditioned to a weight of one at each. Two stages, of 8 × 8 and 4 × 4 pixels, whose
attention has windows of 4 × 4.

The weights written are an exponential moving average. Ctrl-C stops early and keeps what it reached.
The packaged model is what this writes with its defaults.
"""

from pathlib import Path

import torch
from torch import Tensor

from diffit_kernels import ImageDiffiT, save_pretrained
from diffit_kernels.sampling.edm import edm_loss
from digits_recipe import argument_parser, averaged_copy, digit_images, interruptible, train


def main() -> None:
    args = argument_parser(
        "Train a small image-space DiffiT on scikit-learn's digits.",
        Path("image_digits.safetensors"),
        steps=1500,
        batch_size=128,
        lr=3e-3,
    ).parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails before the training, not after
    torch.manual_seed(args.seed)
    model = image_digits_model()
    ema = averaged_copy(model)
    images, classes = digit_images()

    def loss_of(index: Tensor) -> tuple[Tensor]:
        return (edm_loss(model, images[index], classes[index]),)

    losses = train(model, ema, loss_of, args.steps, args.batch_size, args.lr)
    done = len(interruptible(losses, args.steps))
    save_pretrained(ema, args.out)
    print(f"weights of step {done}: {args.out}")


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


if __name__ == "__main__":
    main()
