"""``diffit-kernels demo``: digits from the packaged model; the fused path against the literal."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffit_kernels.checkpoint import from_pretrained
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import check_extra, denoise, initial_noise, sample_generator
from diffit_kernels.sampling.decode import shuffle_decoder
from diffit_kernels.sampling.run import picture_grid, written_aside

STEPS, CFG_SCALE, PER_CLASS = 50, 3.0, 10
ROUNDS, WARM_UP = 12, 3


def demo(out: Path, device: str = "cpu", backend: str | None = None) -> str:
    """Sample every digit with guidance, write the picture to ``out``; returns the report.

    The report has the largest difference between the fused and the literal model and their times,
    for the digits model and for one block of the released model's width, measured in turn.
    """
    model = from_pretrained("digits", device=device, backend=backend)
    latents, labels = sample_digits(model, PER_CLASS)
    with written_aside(out) as file:
        picture_grid(shuffle_decoder()(latents), model.num_classes).save(file, "PNG")

    x = torch.randn(len(labels), *latents.shape[1:], device=device)
    t = torch.full_like(labels, 500)
    wide = DiffiT(
        input_size=32, hidden_size=1152, depth=1, num_heads=16, use_fused_tmsa=True, backend=backend
    ).to(device)
    torch.nn.init.normal_(wide.final_layer.linear.weight, std=0.02)
    inputs = (torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.tensor([207, 1000]))
    inputs = tuple(value.to(device) for value in inputs)
    lines = [
        f"wrote {out}: {len(labels)} digits, {STEPS} steps, guidance {CFG_SCALE}",
        f"fused against literal equations (use_fused_tmsa=False), float32, {device}, forward:",
        _compare("digits model, batch 100, 16 tokens", model, (x, t, labels)),
        _compare("one 1152-wide block, batch 2, 256 tokens", wide.eval(), inputs),
    ]
    return "\n".join(lines)


def sample_digits(model: DiffiT, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(10 · per_class, 4, 4, 4) latents and their labels, the classes in turn."""
    check_extra()
    from tqdm import tqdm

    count = per_class * model.num_classes
    labels = torch.arange(count, device=model.pos_embed.device) % model.num_classes
    generators = [sample_generator(seed, index) for index in range(count)]
    with tqdm(total=STEPS, unit="step", desc=f"{count} digits") as bar:
        latents = denoise(
            model,
            initial_noise(model, generators),
            labels,
            num_steps=STEPS,
            cfg_scale=CFG_SCALE,
            generators=generators,
            on_step=bar.update,
        )
    return latents, labels


@torch.inference_mode()
def _compare(name: str, model: DiffiT, inputs: tuple[Tensor, ...]) -> str:
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
