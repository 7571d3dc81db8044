"""A linear layer that multiplies 8-bit floating-point numbers, for inference."""

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from diffit_kernels.ops.checks import FLOAT_DTYPES

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
MULTIPLE = 16  # of which hardware wants both sizes of a weight to be


class Fp8Linear(nn.Module):
    """y = x Wᵀ + b, of numbers rounded to e4m3 by rows (NVIDIA's and others', arXiv 2209.05433).

    ::

        s(row) = max |row| / 448;   x̂ = e4m3(x / s_x),  Ŵ = e4m3(W / s_w)
        y = s_x s_wᵀ (x̂ Ŵᵀ) + b

    Every output channel of W has its scale, made once, and every token of x, made at each call.
    Rounding changes a number by at most 2^-4 of it, or 2^-10 of its row's scale where that is more.
    Sums are float32: with ``use_fast_accum`` Hopper keeps some 14 bits of them (arXiv 2412.19437).

    x: (..., K), bfloat16; or float16 or float32, where torch's product on the device gives these.
    y: (..., N), in x's dtype, which the bias must have. Buffers: the weight in float8_e4m3fn (N, K)
    and its scales in float32 (N, 1), which keep their dtypes in ``module.to(dtype)``, and the bias.

    Args:
        linear: what to replace. Its parameters are read, and not kept.

    Raises:
        ValueError: K or N is no multiple of 16.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if reason := refusal(linear):
            raise ValueError(f"Fp8Linear: {reason}")
        weight, scale = quantized(linear.weight.detach())
        self.register_buffer("weight_fp8", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N).

        Raises:
            RuntimeError: a gradient would be wanted of it.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "Fp8Linear is for inference and has no gradient: call the model within "
                "torch.no_grad() or torch.inference_mode()"
            )
        size = (*x.shape[:-1], len(self.weight_fp8))
        if x.numel() == 0:
            return x.new_empty(size)
        rows, scale = quantized(x.reshape(-1, x.shape[-1]))
        by_row = ScalingType.RowWise
        out = scaled_mm(
            rows,
            self.weight_fp8.mT,
            scale,
            by_row,
            self.weight_scale.mT,
            by_row,
            bias=self.bias,
            output_dtype=x.dtype,
            use_fast_accum=False,
        )
        return out.view(size)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight_fp8.shape
        return f"{in_features=}, {out_features=}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        """As any module's, but to a change of dtype weight and scales show nothing but bytes."""
        own = self.weight_fp8, self.weight_scale

        def on_bytes(tensor: Tensor) -> Tensor:
            if any(tensor is kept for kept in own):
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(on_bytes, recurse)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ and s of (R, K): e4m3 (R, K), and float32 (R, 1) that is positive for a row of zeros too.

    A row with a NaN or an infinity has NaN in it, as its product would.
    """
    largest = rows.abs().amax(-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    return (rows / scale).to(torch.float8_e4m3fn), scale


def refusal(linear: nn.Linear) -> str | None:
    """Why a layer has no form in e4m3, or None."""
    sizes = linear.in_features, linear.out_features
    if any(size % MULTIPLE or size == 0 for size in sizes):
        return f"in_features and out_features must be multiples of {MULTIPLE}, got {sizes}"
    if linear.weight.dtype not in FLOAT_DTYPES:
        return f"the weight must be one of {FLOAT_DTYPES}, got {linear.weight.dtype}"
    return None
