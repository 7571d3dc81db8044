"""time_projection and time_projections on NVIDIA GPUs, in Triton: the launchers.

The kernels are in triton_projection.py and triton_many.py.
"""

import torch
import triton

from diffit_kernels.ops import triton_launch
from diffit_kernels.ops.time_projection import launch as tiles
from diffit_kernels.ops.time_projection.triton_many import (
    many_dtemb_kernel,
    many_dweight_kernel,
    many_finish_kernel,
    many_forward_kernel,
)
from diffit_kernels.ops.time_projection.triton_projection import (
    finish_sums_kernel,
    projection_kernel,
    token_sums_kernel,
)
from diffit_kernels.ops.triton_launch import dot_precision, dtype_name, launch

MOST_BLOCKS = 128  # whose pointers fit a kernel's arguments


def can_run(x, weight, bias, temb):
    return triton_launch.refusal(x, weight, bias, temb)


def forward(x, weight, bias, temb):
    """out[b, n] = weight x[b, n] + bias + temb[b], the sums in float32: out is written once.

    x is read once from memory and the weight once, as far as the L2 cache serves their tiles to
    the programs of a group; no pass for the bias or for temb.
    """
    batch, tokens, channels = x.shape
    features = weight.shape[0]
    out = x.new_empty(batch, tokens, features)
    config = tiles.PROJECTION.config(
        x.device,
        dtype=dtype_name(x.dtype),
        tokens=tokens,
        features=features,
        channels=channels,
    )
    block_n, block_m = config.blocks["BLOCK_N"], config.blocks["BLOCK_M"]
    launch(
        projection_kernel,
        (triton.cdiv(batch * tokens, block_n) * triton.cdiv(features, block_m),),
        x.contiguous(),
        weight.to(x.dtype).contiguous(),
        None if bias is None else bias.contiguous(),
        temb.contiguous(),
        *(out, batch * tokens, tokens, features, channels),
        config=config,
        ONE_SAMPLE=tokens % block_n == 0,
        EVEN_K=channels % config.blocks["BLOCK_K"] == 0,
        PRECISION=dot_precision(x.dtype),
    )
    return out


def backward(grad_out, x, weight, bias, temb):
    """dx = dO W    dW = dOᵀ x    dtemb[b] = Σ_n dO[b, n]    dbias = Σ_b dtemb[b]

    The products are the vendor library's. Both sums take one more read of dO, and a read and a
    write of a few partial sums in float32.
    """
    dout = grad_out.contiguous()
    dx = dout @ weight.to(x.dtype)
    dweight = (dout.flatten(0, 1).t() @ x.flatten(0, 1)).to(weight.dtype)
    dtemb, dbias = _token_sums(dout, temb, bias)
    return dx, dweight, dbias, dtemb


def _token_sums(dout, temb, bias):
    batch, tokens, features = dout.shape
    config = tiles.SUMS.config(dout.device, dtype=dout.dtype, features=features)
    block_n, block_m = config.blocks["BLOCK_N"], config.blocks["BLOCK_M"]
    column_blocks = triton.cdiv(features, block_m)
    groups, each = tiles.token_groups(batch, tokens, column_blocks, block_n)
    partial = dout.new_empty(batch * groups, features, dtype=torch.float32)
    launch(
        token_sums_kernel,
        (batch * groups * column_blocks,),
        *(dout, partial, tokens, groups, each, features),
        config=config,
    )
    dtemb = torch.empty_like(temb, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    column_blocks = triton.cdiv(features, tiles.FINISH.blocks["BLOCK_M"])
    launch(
        finish_sums_kernel,
        ((batch + (bias is not None)) * column_blocks,),
        *(partial, dtemb, dbias, batch, groups, features),
        config=tiles.FINISH,
    )
    return dtemb, dout.new_empty(0) if bias is None else dbias


def many_can_run(temb, weights, biases):
    if len(weights) > MOST_BLOCKS:
        return f"Triton kernels take at most {MOST_BLOCKS} blocks a call, got {len(weights)}"
    return triton_launch.refusal(temb, *weights, *biases)


def many_forward(temb, weights, biases):
    """One launch: the q and v rows of every weight are read once, temb by every program.

    K is not split: for a single block the partial sums, written and read in float32, would be as
    many bytes as half its weights, and the launch that adds them longer than what it saves.
    """
    many = _Many(temb, weights, biases)
    out = temb.new_empty(many.blocks, many.batch, 2 * many.width)
    config = tiles.MANY.config(temb.device, **many.key)
    block_n, block_m, block_k = many.sizes(config)
    launch(
        many_forward_kernel,
        (many.blocks * 2 * triton.cdiv(many.width, block_m) * triton.cdiv(many.batch, block_n),),
        *(many.temb, many.weights, many.biases, out, many.batch, many.width, many.channels),
        config=config,
        EVEN=many.even(block_m, block_k),
        PRECISION=many.precision,
    )
    return out


def many_backward(grad_out, temb, weights, biases):
    """dtemb = Σ_i dO_i (W_q, W_v)_i    dW_i = (dO_qᵀ temb, 0, dO_vᵀ temb)_i    db_i likewise

    Three launches for all blocks. dtemb: the q and v rows of every weight are read once, and
    partial sums in float32 written and read once. dW and db: written once, the zeros included;
    dO and temb, a few percent of that, are read by every program that needs them.
    """
    many = _Many(temb, weights, biases)
    dout = grad_out.contiguous()
    return (_many_dtemb(dout, many), *_many_parameters(dout, many, weights, biases))


def _many_dtemb(dout, many):
    config = tiles.MANY_INPUT.config(dout.device, **many.key)
    block_n, block_m, block_k = many.sizes(config)
    programs = triton.cdiv(many.channels, block_k) * triton.cdiv(many.batch, block_n)
    chunks, each = tiles.row_chunks(many.width, 2 * many.blocks * programs, block_m)
    parts = many.blocks * 2 * chunks
    partial = dout.new_empty(parts, *many.temb.shape, dtype=torch.float32)
    launch(
        many_dtemb_kernel,
        (parts * programs,),
        *(dout, many.weights, partial, many.batch, many.width, many.channels, chunks, each),
        config=config,
        EVEN=many.even(block_m, block_k),
        PRECISION=many.precision,
    )
    dtemb = torch.empty_like(many.temb)
    launch(
        many_finish_kernel,
        (triton.cdiv(dtemb.numel(), tiles.FINISH.blocks["BLOCK_M"]),),
        *(partial, dtemb, parts, dtemb.numel()),
        config=tiles.FINISH,
    )
    return dtemb


def _many_parameters(dout, many, weights, biases):
    dweights = tuple(torch.empty_like(weight) for weight in many.weights)
    dbiases = None if many.biases is None else tuple(map(torch.empty_like, many.biases))
    config = tiles.MANY_WEIGHT.config(dout.device, **many.key)
    _, block_m, block_k = many.sizes(config)
    launch(
        many_dweight_kernel,
        (many.blocks * 3 * triton.cdiv(many.width, block_m) * triton.cdiv(many.channels, block_k),),
        *(dout, many.temb, dweights, dbiases, many.batch, many.width, many.channels),
        config=config,
        PRECISION=many.precision,
    )
    return (
        [grad.to(weight.dtype) for grad, weight in zip(dweights, weights, strict=True)],
        [grad.to(bias.dtype) for grad, bias in zip(dbiases or (), biases, strict=True)],
    )


class _Many:
    """The tensors of one call as the kernels take them, and its sizes."""

    def __init__(self, temb, weights, biases):
        self.temb = temb.contiguous()
        self.weights = _of_one_dtype(weights)
        self.biases = _of_one_dtype(biases) if biases else None
        self.blocks = len(weights)
        self.batch, self.channels = temb.shape
        self.width = weights[0].shape[0] // 3
        self.precision = dot_precision(temb.dtype)
        self.key = {
            "dtype": dtype_name(temb.dtype),
            "blocks": self.blocks,
            "batch": tiles.batch_bucket(self.batch),
            "width": self.width,
            "channels": self.channels,
        }

    def even(self, block_m, block_k):
        return self.width % block_m == 0 and self.channels % block_k == 0

    @staticmethod
    def sizes(config):
        return tuple(config.blocks[name] for name in ("BLOCK_N", "BLOCK_M", "BLOCK_K"))


def _of_one_dtype(tensors):
    """A kernel picks one of several pointers, which must be of one type: float32 if they differ."""
    mixed = len({t.dtype for t in tensors}) > 1
    return tuple((t.float() if mixed else t).contiguous() for t in tensors)
