"""linear on a CPU: the faster of the libraries that torch comes with."""

from diffit_kernels import native_library
from diffit_kernels.ops import native_products


def can_run(x, weight, bias) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(x, weight, bias)


def forward(x, weight, bias):
    return native_products.linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])


def backward(grad_out, x, weight, bias):
    """dx = dO W    dW = dOᵀ x    db = Σ dO"""
    dout, rows = grad_out.contiguous().flatten(0, 1), x.flatten(0, 1)
    return (
        native_products.product(dout, weight.to(x.dtype)).view(x.shape),
        native_products.sum_over_rows(dout, rows).to(weight.dtype),
        x.new_empty(0) if bias is None else dout.sum(0, dtype=bias.dtype),
    )
