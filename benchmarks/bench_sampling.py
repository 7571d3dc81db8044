"""Guided ancestral sampling as published; a row's ``sizes`` has the number of steps.

Every provider runs the same loop on the same noise, so what differs is the model's forward; the
package's own sampler is one more, and again without each of its savings. Its tables, and on CUDA
its graphs, are made before it is timed, once as in a run of many batches.

Few steps: rounding grows from step to step, and a rule of closeness says little about a long chain.
Ten, as then the share of steps that need no guidance (t = 999) is that of the published 250, where
it is 24. ``digits`` is a trained model.
"""

from dataclasses import fields, replace

import pytest
import torch

from benchmarks.models import (
    FLOOR,
    ancestral_sampling,
    flops,
    new_model,
    products_alone,
    reference_on_device,
    sizes,
)
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, DTYPES, REPLAYED, Provider
from benchmarks.variants import DEFAULT, VARIANTS, providers, twin
from diffit_kernels import from_pretrained
from diffit_kernels.sampling import Denoiser
from diffit_kernels.sampling.predict import ALL_SAVINGS
from reference import ancestral_sampling as literal_sampling

pytestmark = REPLAYED
WIDE = {"cpu": 1, "cuda": 32}[DEVICE]  # batch
STEPS = 10
CASES = {  # model: (resolution or None, depth, batch, steps, strength of guidance)
    "digits": (None, None, 10, STEPS, 3.0),
    "256px, depth 2": (256, 2, WIDE, STEPS, 4.4),
    "256px, depth 28": (256, 28, WIDE, STEPS, 4.4),
}
DENOISE = "fused, denoise()"
WITHOUT = {  # a saving switched off: the field of Savings
    f"{DENOISE} without {field.name.replace('_', ' ')}": field.name for field in fields(ALL_SAVINGS)
}
SEED = 1  # of the noise
OWN_COMPILED = f"{DENOISE} compiled"
COMPILED = [OWN_COMPILED, *(name for name, variant in VARIANTS.items() if variant.mode)]
PROVIDERS = [*VARIANTS, DENOISE, OWN_COMPILED, *WITHOUT, FLOOR]


def sizes_of(case):
    """Sizes of a model's own for ``digits``; guidance doubles the batch that the network sees."""
    resolution, depth, batch, steps, _ = CASES[case]
    if resolution is not None:
        return sizes(batch, resolution, depth) | {"steps": steps}
    model = from_pretrained("digits")
    heads, (_, tokens, channels) = model.num_heads, model.pos_embed.shape
    found = {"batch": batch, "tokens": tokens, "channels": channels, "heads": heads}
    return found | {"head_dim": channels // heads, "depth": len(model.blocks), "steps": steps}


def make(case, about, dtype):
    """All providers of a case, of which the latents after all steps are verified."""
    resolution, depth, batch, steps, scale = CASES[case]
    if resolution is None:
        model = from_pretrained("digits", device=DEVICE, dtype=DTYPES[dtype])
    else:
        model = new_model(resolution, depth, dtype)
    labels = torch.arange(batch, device=DEVICE) % model.num_classes
    shape = (batch, model.in_channels, model.input_size, model.input_size)
    torch.manual_seed(SEED - 1)
    latents = torch.randn(shape, device=DEVICE).to(DTYPES[dtype])
    torch.manual_seed(SEED)
    noise = torch.stack([torch.randn(shape, device=DEVICE) for _ in range(steps)])

    def guided(module):
        return lambda x, t, y: module.forward_with_cfg(x, t, y, cfg_scale=scale)

    def results(predict):
        return [ancestral_sampling(predict, latents, labels, model.num_classes, noise)]

    def exact():
        state = {name: value.double() for name, value in model.named_parameters()}
        start, fresh, heads = latents.double(), noise.double(), model.num_heads
        with torch.no_grad(), reference_on_device():
            return [literal_sampling(state, start, labels, fresh, heads, scale)]

    found = providers(model, results, exact, call=guided)
    rows = 2 * batch * about["tokens"]
    found[FLOOR] = products_alone(model, rows, repeat=steps)
    truth = found["literal"].expected
    for name, saving in {DENOISE: None, OWN_COMPILED: None, **WITHOUT}.items():
        compiled = name == OWN_COMPILED
        found[name] = by_package(model, latents, labels, steps, scale, saving, compiled, truth)
    return found


def by_package(model, latents, labels, steps, scale, without, compiled, truth):
    """The package's sampler, drawing the same noise by the same seed; or why it is missing."""
    if without == "step_graph" and DEVICE == "cpu":
        return "a CPU has no CUDA graphs"
    savings = ALL_SAVINGS if without is None else replace(ALL_SAVINGS, **{without: False})
    own, variant = twin(model), VARIANTS[DEFAULT]
    variant.change(own)
    sampler = Denoiser(own, num_steps=steps, cfg_scale=scale, savings=savings, compiled=compiled)

    def results():
        torch.manual_seed(SEED)
        return [sampler(latents.float(), labels).to(latents.dtype)]

    return Provider(results, truth, variant.role, variant.backend)


@pytest.mark.parametrize("provider", parameters(PROVIDERS, full=[*COMPILED, *WITHOUT]))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("model", parameters(CASES, full=["256px, depth 28"]))
def bench_sampling(race, model, dtype, provider):
    about = sizes_of(model)
    guided = about | {"batch": 2 * about["batch"]}  # [conditional; null]
    race(
        lambda: make(model, about, dtype),
        sizes=about,
        flops=flops(guided) * about["steps"],
        floor=FLOOR,
    )
