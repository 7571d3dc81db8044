"""One block of the released model (1152 wide, 16 heads): forward, and forward and backward.

And one of DiT-XL, of the same width: adaLN-Zero instead of the time token, and no position bias.
"""

import functools

import pytest
import torch

import reference
from benchmarks import race as races
from benchmarks.models import (
    FLOOR,
    HEADS,
    RESOLUTIONS,
    WIDTH,
    flops,
    moved,
    new_block,
    products_alone,
    sizes,
    truth,
)
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, DIRECTIONS, DTYPES, REPLAYED
from benchmarks.variants import VARIANTS, providers

pytestmark = REPLAYED
BATCH = {"cpu": {"256px": 4, "512px": 1}, "cuda": {"256px": 64, "512px": 16}}[DEVICE]


DIT = {"conditioning": "adaln_zero", "position_bias": False}


def make(batch, side, train, dtype, exact=None, **options):
    """All providers of a case: gradients are of the tokens, the time token and all parameters.

    ``exact(block, inputs, grad)`` gives the float64 truth, by default that of ``reference/``;
    ``options`` are the block's.
    """
    block = new_block(side, dtype, **options)
    new = functools.partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
    inputs = [new(batch, side * side, WIDTH), new(batch, WIDTH)]
    inputs = [t.requires_grad_(train) for t in inputs]
    grad = torch.randn_like(inputs[0]) if train else None

    def results(function):
        return races.results(function, inputs, grad, block.parameters())

    exact = functools.partial(exact or by_reference, block, inputs, grad)
    floor = products_alone(block, batch * side * side, train=train)
    return providers(block, results, exact) | {FLOOR: floor}


def by_reference(block, inputs, grad):
    """The block's outputs and gradients in float64 by its literal equations."""
    (side, _) = window = block.attn.window_size

    def function(parameters, x, temb):
        x = x.unflatten(1, (side, side))
        return reference.block(x, temb, parameters, HEADS, window).flatten(1, 2)

    return truth(function, dict(block.named_parameters()), inputs, grad)


def race_blocks(race, shape, direction, dtype, **options):
    about, train = sizes(BATCH[shape], RESOLUTIONS[shape]), direction != "forward"
    side = round(about["tokens"] ** 0.5)
    race(
        lambda: make(about["batch"], side, train, dtype, **options),
        sizes=about,
        flops=flops(about, train),
        moved=None if options else moved(about, dtype, train),
        floor=FLOOR,
        queued=True,
    )


@pytest.mark.parametrize("provider", parameters([*VARIANTS, FLOOR]))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", parameters(BATCH, full=["512px"]))
def bench_block(race, shape, direction, dtype, provider):
    race_blocks(race, shape, direction, dtype)


@pytest.mark.parametrize("provider", parameters([*VARIANTS, FLOOR]))
@pytest.mark.parametrize("dtype", parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", parameters(BATCH, full=["512px"]))
def bench_dit_block(race, shape, direction, dtype, provider):
    race_blocks(race, shape, direction, dtype, **DIT)
