"""What entries for blocks, models, training and sampling share: cases, truth, floor and the loop.

A case's numbers (``sizes``, ``flops``), its literal module with random values where the published
start has zeros, the module's float64 truth by ``reference/``, the four products of its blocks alone
as the floor, and the sampling loop that all variants run in.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.race import DEVICE, DTYPES, Provider, moved_bytes
from diffit_kernels.block import DiffiTBlock, TimeDependentAttention
from diffit_kernels.model import DiffiT, Diffit
from diffit_kernels.ops import native_products
from diffit_kernels.sampling.schedule import (
    published_coefficients,
    published_step,
    respaced_timesteps,
)

WIDTH, HEADS = 1152, 16
RESOLUTIONS = {"256px": 256, "512px": 512}
PIXELS_PER_LATENT, PATCH = 8, 2
FLOOR = "products alone"
EARLY = 32  # timesteps
RATE = 1e-7  # of training


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that have gradients: not the position embedding."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def truth(
    function: Callable[..., Tensor],
    parameters: dict[str, Tensor],
    inputs: Sequence[Tensor],
    cotangent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``function(parameters, *inputs)`` in float64, a sample at a time for the sake of memory.

    With a cotangent also the gradients of those inputs and parameters that require one, of a
    parameter the sum over the samples.
    """
    train = cotangent is not None
    exact = {name: _exact(value, train) for name, value in parameters.items()}
    outputs, gradients = [], []
    with torch.set_grad_enabled(train), reference_on_device():
        for index in range(len(inputs[0])):
            one = slice(index, index + 1)
            sample = [_exact(value, train, one) for value in inputs]
            out = function(exact, *sample)
            outputs.append(out.detach())
            if train:
                out.backward(cotangent[one].double())
                gradients.append([value.grad for value in sample if value.requires_grad])
    of_inputs = [torch.cat(samples) for samples in zip(*gradients, strict=True)]
    return torch.cat(outputs), *of_inputs, *(v.grad for v in exact.values() if v.requires_grad)


def _exact(value: Tensor, train: bool, rows: slice = slice(None)) -> Tensor:
    """Rows of a tensor as a leaf of their own in float64; whole numbers as they are."""
    if not value.is_floating_point():
        return value[rows]
    leaf = value.detach()[rows].to(torch.float64, copy=True)
    return leaf.requires_grad_(train and value.requires_grad)


@contextlib.contextmanager
def reference_on_device() -> Iterator[None]:
    """Within the context the reference makes its tensors on the device, and each index once.

    It derives an index pair by pair, in seconds where there are 1024 tokens, in every block.
    """
    module = importlib.import_module("reference.tmsa")  # the package has a function of that name
    index = functools.cache(module.relative_position_index)
    with mock.patch.object(module, "relative_position_index", index), torch.device(DEVICE):
        yield


def new_block(side: int, dtype: str, **options) -> DiffiTBlock:
    """A literal block of the released width for ``side`` × ``side`` tokens."""
    torch.manual_seed(0)
    block = DiffiTBlock(WIDTH, HEADS, side, 4.0, **options)
    return with_random_tables(block).to(DEVICE, DTYPES[dtype])


def new_model(resolution: int, depth: int, dtype: str) -> DiffiT:
    """A literal model of the released width, in eval mode, so that no label is dropped.

    As initialised it gives zeros, whatever its blocks do; here its last layer is random.
    """
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Diffit(input_size=resolution // PIXELS_PER_LATENT, depth=depth)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return with_random_tables(model).to(DTYPES[dtype]).eval()


def with_random_tables(module: nn.Module) -> nn.Module:
    """The module, whose position biases are of the size of its scores."""
    for part in module.modules():
        table = getattr(part, "relative_position_bias_table", None)
        if isinstance(part, TimeDependentAttention) and table is not None:
            nn.init.normal_(table)
    return module


def model_inputs(model: DiffiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels.

    The timesteps are early ones. Of a late one the embedding's cosines, whose angles are float32 by
    definition, follow every rounding of the angles: where Inductor computes those, the embedding's
    gradients err by 1e-5, whatever the blocks do.
    """
    shape = (batch, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, device=DEVICE, dtype=model.pos_embed.dtype)
    t = torch.arange(1, batch + 1, device=DEVICE) % EARLY
    return x, t, torch.randint(model.num_classes, (batch,), device=DEVICE)


def sizes(batch: int, resolution: int, depth: int = 1) -> dict[str, int]:
    """A case of the released width, as its row tells it."""
    tokens = (resolution // PIXELS_PER_LATENT // PATCH) ** 2
    return {
        "batch": batch,
        "resolution": resolution,
        "tokens": tokens,
        "channels": WIDTH,
        "heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "depth": depth,
    }


def flops(sizes: dict[str, int], train: bool = False) -> int:
    """Useful operations of the blocks: qkv 3 C² multiplications a token, projection 1, MLP 8, and
    the attention 2 N C. A backward has twice those of the forward."""
    rows, channels = sizes["batch"] * sizes["tokens"], sizes["channels"]
    forward = 2 * rows * (12 * channels**2 + 2 * sizes["tokens"] * channels) * sizes["depth"]
    return forward * (3 if train else 1)


def moved(sizes: dict[str, int], dtype: str, train: bool = False) -> int:
    """The fewest bytes of the blocks: parameters and the first one's inputs are read, the last
    one's output is written; see :func:`benchmarks.race.moved_bytes`."""
    batch, channels, side = sizes["batch"], sizes["channels"], math.isqrt(sizes["tokens"])
    with torch.device("meta"):
        block = DiffiTBlock(channels, sizes["heads"], side, 4.0).to(DTYPES[dtype])
        x, temb = torch.empty(batch, side**2, channels), torch.empty(batch, channels)
    inputs = [t.to(DTYPES[dtype]) for t in (x, temb)]
    return moved_bytes([*inputs, *[*block.parameters()] * sizes["depth"]], inputs[:1], train)


def training(
    model: nn.Module, loss_of: Callable[[Callable[..., Tensor]], Tensor]
) -> tuple[Callable, Callable]:
    """What is verified and what is timed of a training step, as functions of a variant's function.

    Verified are the loss and all gradients, timed is the whole step with AdamW. The parameters are
    shared and move with every step; the rate is so small that they stay what they are for the time
    of a race.
    """
    optimizer = torch.optim.AdamW(trained(model), lr=RATE, fused=True)

    def results(function):
        optimizer.zero_grad()
        loss = loss_of(function)
        loss.backward()
        return loss, *(parameter.grad for parameter in trained(model))

    def step(function):
        results(function)
        optimizer.step()
        optimizer.zero_grad()  # gradients count as memory that a step takes

    return results, step


def products_alone(
    module: nn.Module, rows: int, *, train: bool = False, repeat: int = 1
) -> Provider:
    """The floor: the four products of every block with its weights, and nothing else.

    In training also the products for the gradients of inputs and weights. On a CPU by the faster of
    torch's library and the one of the native backend.
    """
    ends = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = [layer for name, layer in module.named_modules() if name.endswith(ends)]
    widths = {width for layer in layers for width in layer.weight.shape}
    like = {"device": DEVICE, "dtype": layers[0].weight.dtype}
    values = {width: torch.randn(rows, width, **like) for width in sorted(widths)}

    @torch.no_grad()
    def run(linear, product, sum_over_rows):
        for layer in layers * repeat:
            x, dout = values[layer.in_features], values[layer.out_features]
            last = linear(x, layer.weight, layer.bias)
            if train:
                product(dout, layer.weight)
                sum_over_rows(dout, x)
        return [last]

    libraries = [(F.linear, torch.mm, lambda a, b: a.t() @ b)]
    if DEVICE == "cpu":
        ours = native_products
        libraries.append((ours.linear, ours.product, ours.sum_over_rows))

    @functools.cache
    def fastest() -> Callable[[], list[Tensor]]:
        steps = [functools.partial(run, *library) for library in libraries]
        return min(steps, key=lambda step: min(measure.duration(step) for _ in range(3)))

    return Provider(lambda: fastest()(), None, "floor")


@torch.inference_mode()
def ancestral_sampling(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    labels: Tensor,
    null_class: int,
    noise: Tensor,
) -> Tensor:
    """The published sampler in ``len(noise)`` steps; the last adds no noise.

    ``predict(x, t, y)`` is the guided prediction [ε | v] for a batch [conditional; null]. The state
    is kept in float32, the constants in float64; ``latents`` are in the model's dtype.
    """
    dtype, latents = latents.dtype, latents.float()
    timesteps = respaced_timesteps(len(noise))
    table = torch.from_numpy(published_coefficients(timesteps, "ddpm")).to(latents.device)
    labels = torch.cat((labels, torch.full_like(labels, null_class)))
    for step, fresh in zip(reversed(range(len(noise))), noise, strict=True):
        t = torch.full_like(labels, int(timesteps[step]))
        x = latents.to(dtype)
        out = predict(torch.cat((x, x)), t, labels)[: len(latents)].float()
        latents = published_step(latents, out, fresh, table[step])
    return latents.to(dtype)
