"""Device functions that several stages' Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(ptr, first, count, columns, offs_m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Columns offs_m of the sum of ``count`` rows from ``first`` on: (BLOCK_M,) float32.

    ptr: (rows, columns), of any floating-point type. The order of summation is fixed.
    """
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    valid_m = (offs_m < columns)[None, :]
    for start in range(0, count, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[:, None]
        at = (first + offs_n).to(tl.int64) * columns + offs_m[None, :]
        mask = (offs_n < count) & valid_m
        total += tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU(x) = x Φ(x) for float32 x; Φ by erf, or in the tanh form. Finite for every finite x."""
    return gelu_and_slope(x, EXACT)[0]


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """(GELU(x), GELU'(x)) for float32 x; both finite, and right in the limit, for every finite x.

    EXACT: x Φ(x) and Φ(x) + x φ(x). Else, with u = √(2/π) (x + 0.044715 x³), ½ (1 + tanh u) is
    σ(2u): x σ and σ + x 2u' σ (1 - σ).
    """
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        # Past |x| = 20 σ is 0 or 1 to the last digit: the bound only keeps 2u' from overflowing,
        # which would make NaN of its product with σ (1 - σ) = 0.
        square = tl.minimum(x * x, 400.0)
        twice_u = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
        decay = tl.exp(-tl.abs(twice_u))  # of at most 1, so nothing overflows
        larger = 1.0 / (1.0 + decay)  # the larger of σ and 1 - σ
        smaller = decay * larger
        cdf = tl.where(x >= 0, larger, smaller)
        rise = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = cdf + x * (rise * (larger * smaller))
    return x * cdf, slope
