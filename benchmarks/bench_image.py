"""The image-space model of the paper's CIFAR-10: forward, and a training step with AdamW.

The loss is EDM's as the network sees it: the squared error of F, of weight one at every noise
level. Verified are the outputs, or the loss and all gradients; timed is the whole step. All
variants get their images channels last, the order in which convolutions are fastest.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reference
from benchmarks import race as races
from benchmarks.models import training, truth, with_random_tables
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, DTYPES, RECORDINGS, REPLAYED
from benchmarks.variants import VARIANTS, providers
from diffit_kernels.image_model import ImageDiffiT, diffit_cifar10

pytestmark = REPLAYED
COMPILED = [name for name in VARIANTS if "compile" in name]  # training takes minutes to compile
BATCH = {"cpu": 4, "cuda": 256}[DEVICE]
SIZES = {"batch": BATCH, "resolution": 32, "window": 4, "heads": 4}


def new_model(dtype: str) -> ImageDiffiT:
    """As initialised it gives zeros, whatever its cells do; here its head is random."""
    torch.manual_seed(0)
    model = diffit_cifar10(num_heads=SIZES["heads"])
    nn.init.normal_(model.head.weight, std=0.02)
    return with_random_tables(model).to(DEVICE, DTYPES[dtype]).eval()


def inputs_of(model: ImageDiffiT) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled noisy images, and ln(σ) / 4 over the range that is trained."""
    dtype = model.tokenizer.weight.dtype
    x = torch.randn(BATCH, 3, 32, 32, device=DEVICE, dtype=dtype)
    c_noise = torch.linspace(-1, 0.3, BATCH, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last), c_noise


def flops(train: bool) -> int:
    """Of the literal model, as PyTorch counts them; a backward has twice those of the forward."""
    with torch.device("meta"):
        model = diffit_cifar10(num_heads=SIZES["heads"])
        inputs = torch.empty(BATCH, 3, 32, 32), torch.empty(BATCH)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    return counter.get_total_flops() * (3 if train else 1)


def make(dtype):
    model = new_model(dtype)
    inputs = inputs_of(model)

    def results(function):
        return races.results(lambda: function(*inputs), ())

    exact = functools.partial(truth, reference.image_diffit, dict(model.named_parameters()), inputs)
    return providers(model, results, exact)


def make_training(dtype):
    model = new_model(dtype)
    inputs = inputs_of(model)
    target = torch.randn_like(inputs[0])

    def loss_of(function):
        return F.mse_loss(function(*inputs), target)

    results, step = training(model, loss_of)

    def of_sample(parameters, x, c_noise, target_of_sample):
        out = reference.image_diffit(parameters, x, c_noise)
        return ((out - target_of_sample) ** 2).sum().view(1) / target.numel()

    def exact():
        weights = torch.ones(BATCH, device=DEVICE)
        of_parameters = dict(model.named_parameters())
        losses, *gradients = truth(of_sample, of_parameters, (*inputs, target), weights)
        return losses.sum(), *gradients

    return providers(model, results, exact, step=step)


@pytest.mark.parametrize("provider", parameters(VARIANTS))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
def bench_image_model(race, dtype, provider):
    race(lambda: make(dtype), sizes=SIZES, flops=flops(False), tolerance=RECORDINGS)


@pytest.mark.parametrize("provider", parameters(VARIANTS, full=COMPILED))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
def bench_image_training(race, dtype, provider):
    race(lambda: make_training(dtype), sizes=SIZES, flops=flops(True), tolerance=RECORDINGS)
