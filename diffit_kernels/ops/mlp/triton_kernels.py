"""mlp on NVIDIA GPUs: products by the vendor library, what lies between them in Triton."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from diffit_kernels.ops import triton_launch
from diffit_kernels.ops.mlp import launch as tiles
from diffit_kernels.ops.triton_launch import launch
from diffit_kernels.ops.triton_math import gelu, gelu_and_slope, sum_rows


def can_run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden):
    return triton_launch.refusal(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden):
    """Passes over the hidden layer outside the products, which add their bias as they write:

    hidden kept: one read, one write. Not kept: none for the tanh form in half precision on CUDA,
    whose product applies GELU as it writes; else one read, one write in place.
    """
    rows = x.flatten(0, 1)
    if keep_hidden:
        hidden = _linear(rows, fc1_weight, fc1_bias)
        activation = _gelu(hidden, torch.empty_like(hidden), approximate)
        hidden = hidden.unflatten(0, x.shape[:2])
    else:
        activation = _linear_gelu(rows, fc1_weight, fc1_bias, approximate)
        hidden = x.new_empty(0)
    return _linear(activation, fc2_weight, fc2_bias).unflatten(0, x.shape[:2]), hidden


def backward(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate):
    """da = dO W2    dh = da ∘ GELU'(h)    dx = dh W1    dW2 = dOᵀ GELU(h)    dW1 = dhᵀ x

    Passes over the hidden layer outside the products: one, which reads h and da and writes dh over
    da and GELU(h), summing dh's columns on its way: two reads, two writes. The partial sums of the
    columns are under 2 % of that, and dO is read once more for the sums of its columns.
    """
    dout = grad_out.contiguous().flatten(0, 1)
    rows = x.flatten(0, 1)
    kept = hidden.numel() > 0
    h = hidden.contiguous().flatten(0, 1) if kept else _linear(rows, fc1_weight, fc1_bias)
    grad = dout @ fc2_weight.to(x.dtype)
    activation = torch.empty_like(h) if kept else h
    dfc1_bias = _gelu_backward(h, grad, activation, fc1_bias, approximate)
    dfc2_weight = dout.t() @ activation
    dfc1_weight = grad.t() @ rows
    dx = (grad @ fc1_weight.to(x.dtype)).view(x.shape)
    dfc2_bias = x.new_empty(0) if fc2_bias is None else dout.sum(0, dtype=fc2_bias.dtype)
    return (
        dx,
        dfc1_weight.to(fc1_weight.dtype),
        dfc1_bias,
        dfc2_weight.to(fc2_weight.dtype),
        dfc2_bias,
    )


def _linear(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linear_gelu(x, weight, bias, approximate):
    """GELU(x Wᵀ + b) where x Wᵀ + b itself is not wanted."""
    # On CUDA, and only there, the GELU of _addmm_activation is the tanh form, in the product's
    # epilogue. The vendor's tanh may be an approximate one: half precision only.
    if approximate == "tanh" and x.is_cuda and x.dtype.itemsize == 2:
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        weight = weight.to(x.dtype).t()
        return torch._addmm_activation(bias.to(x.dtype), x, weight, use_gelu=True)
    hidden = _linear(x, weight, bias)
    return _gelu(hidden, hidden, approximate)


def _gelu(hidden, out, approximate):
    """GELU(hidden) into ``out``, which may be ``hidden``."""
    config = tiles.GELU.config(hidden.device, dtype=hidden.dtype)
    launch(
        gelu_kernel,
        (triton.cdiv(hidden.numel(), config.blocks["BLOCK"]),),
        *(hidden, out, hidden.numel()),
        config=config,
        EXACT=approximate == "none",
    )
    return out


def _gelu_backward(hidden, grad, activation, bias, approximate):
    """GELU(hidden) into ``activation``, grad · GELU'(hidden) over ``grad``; the sum of its rows."""
    rows, columns = hidden.shape
    config = tiles.BACKWARD.config(hidden.device, dtype=hidden.dtype, hidden=columns)
    block_n, block_m = config.blocks["BLOCK_N"], config.blocks["BLOCK_M"]
    each = tiles.rows_each(rows, columns, block_n, block_m)
    groups = triton.cdiv(rows, each)
    partial = None if bias is None else hidden.new_empty(groups, columns, dtype=torch.float32)
    launch(
        gelu_backward_kernel,
        (groups * triton.cdiv(columns, block_m),),
        *(hidden, grad, activation, partial, rows, columns, each),
        config=config,
        EXACT=approximate == "none",
    )
    if bias is None:
        return hidden.new_empty(0)
    total = torch.empty_like(bias, memory_format=torch.contiguous_format)
    launch(
        sum_kernel,
        (triton.cdiv(columns, tiles.SUM.blocks["BLOCK_M"]),),
        *(partial, total, groups, columns),
        config=tiles.SUM,
    )
    return total


@triton.jit
def gelu_kernel(hidden_ptr, out_ptr, size, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """out = GELU(hidden), element by element; out_ptr may be hidden_ptr."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, gelu(hidden, EXACT).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    hidden_ptr,
    grad_ptr,
    activation_ptr,
    partial_ptr,
    rows,
    columns,
    rows_each,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """activation = GELU(h), grad = grad · GELU'(h) in place, and grad's column sums by program.

    A program takes BLOCK_M columns of rows_each rows, BLOCK_N at a time, and keeps one sum per
    element of its tile until the end. activation_ptr may be hidden_ptr.
    partial_ptr: (programs of a column, columns) float32, or None.
    """
    column_blocks = tl.cdiv(columns, BLOCK_M)
    group = tl.program_id(0) // column_blocks
    offs_m = (tl.program_id(0) % column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = offs_m < columns
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        offs_n = group * rows_each + start + tl.arange(0, BLOCK_N)
        mask = (offs_n < rows)[:, None] & valid_m[None, :]
        at = offs_n[:, None].to(tl.int64) * columns + offs_m[None, :]
        hidden = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        activation, slope = gelu_and_slope(hidden, EXACT)
        grad *= slope
        tl.store(activation_ptr + at, activation.to(activation_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        total += grad
    if partial_ptr is not None:
        row = partial_ptr + group.to(tl.int64) * columns
        tl.store(row + offs_m, tl.sum(total, 0), mask=valid_m)


@triton.jit
def sum_kernel(partial_ptr, out_ptr, rows, columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """out = the sum of partial's rows."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = sum_rows(partial_ptr, 0, rows, columns, offs_m, BLOCK_N, BLOCK_M)
    tl.store(out_ptr + offs_m, total.to(out_ptr.dtype.element_ty), mask=offs_m < columns)
