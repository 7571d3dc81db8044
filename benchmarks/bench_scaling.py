"""How forward and backward grow: a block with the batch and the tokens, a model with its depth."""

import copy

import pytest

from benchmarks import bench_block, bench_model
from benchmarks import race as races
from benchmarks.models import flops, sizes
from benchmarks.peers import parameters
from benchmarks.race import DEVICE, RECORDINGS, REPLAYED
from benchmarks.variants import DEFAULT, fused

pytestmark = REPLAYED
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}[DEVICE]
PROVIDERS = ["literal", "SDPA", DEFAULT]
if DEVICE == "cuda":
    PROVIDERS.insert(2, "SDPA, torch.compile")
BATCHES = ["1", "2", "4", "8"]
TOKENS = {"64": 128, "256": 256, "1024": 512, "4096": 1024}  # tokens: pixels a side
DEPTHS = ["1", "2", "4", "8"]
MOST_BY_REFERENCE = 1024  # tokens whose scores reference/ can hold in float64, several times


def by_eager(block, inputs, grad):
    """The float64 truth by the eager backend of the fused ops, which holds few scores at a time.

    The tests compare it with ``reference/``.
    """
    exact = copy.deepcopy(block).double()
    fused(exact, "eager")
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    return races.results(exact, leaves, grad.double(), exact.parameters())


def of_block(race, batch, resolution):
    about = sizes(batch, resolution)
    exact = by_eager if about["tokens"] > MOST_BY_REFERENCE else None
    side = round(about["tokens"] ** 0.5)
    race(
        lambda: bench_block.make(batch, side, True, DTYPE, exact),
        sizes=about,
        flops=flops(about, train=True),
        queued=True,
    )


@pytest.mark.parametrize("provider", parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", [DTYPE])
@pytest.mark.parametrize("batch", parameters(BATCHES, full=BATCHES[1:]))
def bench_scaling_batch(race, batch, dtype, provider):
    of_block(race, int(batch), 256)


@pytest.mark.parametrize("provider", parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", [DTYPE])
@pytest.mark.parametrize("tokens", parameters(TOKENS, full=list(TOKENS)[1:]))
def bench_scaling_tokens(race, tokens, dtype, provider):
    of_block(race, 1, TOKENS[tokens])


@pytest.mark.parametrize("provider", parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", [DTYPE])
@pytest.mark.parametrize("depth", parameters(DEPTHS, full=DEPTHS[1:]))
def bench_scaling_depth(race, depth, dtype, provider):
    about = sizes(1, 256, int(depth))
    race(
        lambda: bench_model.make(about, dtype, train=True),
        sizes=about,
        flops=flops(about, train=True),
        tolerance=RECORDINGS,
    )
