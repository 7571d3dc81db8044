"""``diffit-kernels demo``: digits from a packaged model; the fused path against the literal."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffit_kernels.checkpoint import from_pretrained
from diffit_kernels.checkpoint_files import written_aside
from diffit_kernels.image_model import ImageDiffiT, diffit_cifar10
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import check_extra, denoise, initial_noise, sample_generator
from diffit_kernels.sampling.decode import image_decoder, shuffle_decoder
from diffit_kernels.sampling.edm import heun_sample
from diffit_kernels.sampling.run import picture_grid

STEPS, CFG_SCALE, PER_CLASS = 50, 3.0, 10
IMAGE_STEPS, IMAGE_CFG_SCALE = 18, 2.0  # of Heun
ROUNDS, WARM_UP = 12, 3

Model = DiffiT | ImageDiffiT


def demo(out: Path, device: str = "cpu", backend: str | None = None, name: str = "digits") -> str:
    """Sample every digit with guidance, write the picture to ``out``; returns the report.

    The report has the largest difference between the fused and the literal model and their times,
    for the packaged model ``name`` ("digits" or "image_digits") and for a part of a published one:
    a block of the released width, or the paper's CIFAR-10 model; measured in turn.
    """
    model = from_pretrained(name, device=device, backend=backend)
    samples, labels = sample_digits(model, PER_CLASS)
    in_image_space = isinstance(model, ImageDiffiT)
    decoder = image_decoder() if in_image_space else shuffle_decoder()
    with written_aside(out) as file:
        picture_grid(decoder(samples), model.num_classes).save(file, "PNG")

    steps, scale = _process(model)
    x = torch.randn(samples.shape, device=device)
    if in_image_space:
        pixels = samples.shape[-1] ** 2
        time_token, larger = torch.zeros(len(x), device=device), _cifar10(device, backend)
    else:
        pixels = model.pos_embed.shape[1]
        time_token, larger = torch.full_like(labels, 500), _wide_block(device, backend)
    lines = [
        f"wrote {out}: {len(labels)} digits, {steps} steps, guidance {scale}",
        f"fused against literal equations (use_fused_tmsa=False), float32, {device}, forward:",
        _compare(f"{name} model, batch {len(x)}, {pixels} tokens", model, (x, time_token, labels)),
        _compare(*larger),
    ]
    return "\n".join(lines)


def sample_digits(model: Model, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents or images of a packaged model, 10 · per_class, and their labels, classes in turn."""
    check_extra()
    from tqdm import tqdm

    steps, scale = _process(model)
    count = per_class * model.num_classes
    labels = torch.arange(count, device=next(model.parameters()).device) % model.num_classes
    generators = [sample_generator(seed, index) for index in range(count)]
    with tqdm(total=steps, unit="step", desc=f"{count} digits") as bar:
        settings = {"num_steps": steps, "cfg_scale": scale, "on_step": bar.update}
        noise = initial_noise(model, generators)
        if isinstance(model, ImageDiffiT):
            return heun_sample(model, noise, labels, **settings).float(), labels
        return denoise(model, noise, labels, generators=generators, **settings), labels


def _process(model: Model) -> tuple[int, float]:
    """Steps and guidance."""
    if isinstance(model, ImageDiffiT):
        return IMAGE_STEPS, IMAGE_CFG_SCALE
    return STEPS, CFG_SCALE


def _wide_block(device: str, backend: str | None) -> tuple[str, Model, tuple[Tensor, ...]]:
    """What to compare: one block of the released latent model."""
    model = DiffiT(
        input_size=32, hidden_size=1152, depth=1, num_heads=16, use_fused_tmsa=True, backend=backend
    ).to(device)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    inputs = (torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.tensor([207, 1000]))
    inputs = tuple(value.to(device) for value in inputs)
    return "one 1152-wide block, batch 2, 256 tokens", model.eval(), inputs


def _cifar10(device: str, backend: str | None) -> tuple[str, Model, tuple[Tensor, ...]]:
    """What to compare: the paper's image-space model for CIFAR-10, with random weights."""
    model = diffit_cifar10(use_fused_tmsa=True, backend=backend).to(device)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    inputs = (torch.randn(2, 3, 32, 32, device=device), torch.tensor([-1.0, 0.5], device=device))
    return "CIFAR-10 model, batch 2, windows of 4 x 4", model.eval(), inputs


@torch.inference_mode()
def _compare(name: str, model: Model, inputs: tuple[Tensor, ...]) -> str:
    """Difference and median time of the two paths, measured in turn."""
    results, times = {}, {False: [], True: []}
    for _ in range(WARM_UP + ROUNDS):
        for fused in times:
            model.use_fused_tmsa = fused
            results[fused], seconds = _timed(lambda: model(*inputs), inputs[0].device)
            times[fused].append(seconds)
    difference = (results[True] - results[False]).abs().max() / results[False].abs().max()
    literal, fused = (1e3 * statistics.median(times[flag][WARM_UP:]) for flag in (False, True))
    return (
        f"  {name}: literal {literal:.1f} ms, fused {fused:.1f} ms ({literal / fused:.2f}x), "
        f"largest difference {difference:.1e} of the largest value"
    )


def _timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
