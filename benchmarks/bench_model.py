"""The released model's forward at both of its resolutions, and at a depth that two cores bear."""

import functools

import pytest
import torch

import reference
from benchmarks import race as races
from benchmarks.models import (
    FLOOR,
    HEADS,
    RESOLUTIONS,
    flops,
    model_inputs,
    moved,
    new_model,
    products_alone,
    sizes,
    trained,
    truth,
)
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, DTYPES, REPLAYED
from benchmarks.variants import VARIANTS, providers

pytestmark = REPLAYED
BATCH = {"cpu": {"256px": 1, "512px": 1}, "cuda": {"256px": 64, "512px": 16}}[DEVICE]


def make(about, dtype, train=False):
    """All providers of a case; to train, the parameters' gradients are results as well."""
    model = new_model(about["resolution"], about["depth"], dtype)
    inputs = model_inputs(model, about["batch"])
    grad = torch.randn_like(model(*inputs)) if train else None

    def results(function):
        return races.results(lambda: function(*inputs), (), grad, trained(model))

    oracle = functools.partial(reference.latent_diffit, num_heads=HEADS)
    exact = functools.partial(truth, oracle, dict(model.named_parameters()), inputs, grad)
    floor = products_alone(model, about["batch"] * about["tokens"], train=train)
    return providers(model, results, exact) | {FLOOR: floor}


@pytest.mark.parametrize("provider", parameters([*VARIANTS, FLOOR]))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("depth", parameters(["2", "28"], full=["28"]))
@pytest.mark.parametrize("shape", parameters(BATCH, full=["512px"]))
def bench_model(race, shape, depth, dtype, provider):
    about = sizes(BATCH[shape], RESOLUTIONS[shape], int(depth))
    race(
        lambda: make(about, dtype),
        sizes=about,
        flops=flops(about),
        moved=moved(about, dtype),
        floor=FLOOR,
    )
