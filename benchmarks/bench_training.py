"""A training step: gradients of the noise's squared error, then AdamW."""

import pytest
import torch
import torch.nn.functional as F

import reference
from benchmarks.models import (
    FLOOR,
    HEADS,
    RESOLUTIONS,
    flops,
    model_inputs,
    new_model,
    products_alone,
    sizes,
    training,
    truth,
)
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, DTYPES, RECORDINGS, REPLAYED
from benchmarks.variants import VARIANTS, providers

pytestmark = REPLAYED
BATCH = {"cpu": {"256px": 1, "512px": 1}, "cuda": {"256px": 32, "512px": 8}}[DEVICE]
DEPTHS = {"cpu": ["2"], "cuda": ["28"]}[DEVICE]


def make(about, dtype):
    """All providers of a case; the float64 loss is a sum over the samples' own."""
    model = new_model(about["resolution"], about["depth"], dtype)
    inputs = model_inputs(model, about["batch"])
    target = torch.randn_like(inputs[0])

    def loss_of(function):
        return F.mse_loss(function(*inputs)[:, : model.in_channels], target)

    results, step = training(model, loss_of)

    def of_sample(parameters, x, t, y, target_of_sample):
        noise = reference.latent_diffit(parameters, x, t, y, HEADS)[:, : model.in_channels]
        return ((noise - target_of_sample) ** 2).sum().view(1) / target.numel()

    def exact():
        ones = torch.ones(about["batch"], device=DEVICE)
        parameters = dict(model.named_parameters())
        losses, *gradients = truth(of_sample, parameters, (*inputs, target), ones)
        return losses.sum(), *gradients

    floor = products_alone(model, about["batch"] * about["tokens"], train=True)
    return providers(model, results, exact, step=step) | {FLOOR: floor}


@pytest.mark.parametrize("provider", parameters([*VARIANTS, FLOOR]))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("shape", parameters(BATCH, full=["512px"]))
def bench_training(race, shape, depth, dtype, provider):
    about = sizes(BATCH[shape], RESOLUTIONS[shape], int(depth))
    race(
        lambda: make(about, dtype),
        sizes=about,
        flops=flops(about, train=True),
        floor=FLOOR,
        tolerance=RECORDINGS,
    )
