"""Windowed time-dependent attention with a relative position bias, from packed qkv.

The letters: B batch; H, W token grid; C channels; nH heads; d = C / nH head_dim; L tokens a window.
"""

from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import autocast, check_activation, check_tensor


def window_attention(
    qkv: Tensor,
    relative_position_bias_table: Tensor | None = None,
    temb: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0,
    backend: str | None = None,
) -> Tensor:
    """TMSA's attention over non-overlapping windows (DiffiT, eq. 6).

    In every window of every sample, with the time token's parts (q_t, v_t) = ``temb``::

        out = softmax(scale · (q + q_t) kᵀ + B) v + v_t
        B[head, i, j] = table[(y_i - y_j + h - 1) · (2w - 1) + (x_i - x_j + w - 1), head]

    which equals attention over q + q_t, k + k_t, v + v_t: the key part adds the same number to
    every score of a row, and softmax cancels it; rows of softmax sum to one, so v_t leaves as it
    is (derivations 1 to 3 in reference/README.md).

    Args:
        qkv: (B, H, W, 3C), channels ordered (3, nH, d); float64, float32, bfloat16 or float16.
        relative_position_bias_table: ((2h-1)(2w-1), nH), or None for no bias; the dtype of ``qkv``
            or float32.
        temb: (B, 2C), the time token's q part, then its v part, or None; float32, bfloat16 or
            float16 unless ``qkv`` is float64.
        num_heads: nH.
        window_size: tokens of a window, (h, w) or one number for both; h divides H, w divides W.
        scale: factor of the scores; default d ** -0.5.
        dropout_p: probability of dropping an attention weight; no backend serves more than 0, as
            rows would no longer sum to one (derivation 11).
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (B, H, W, C) in the dtype of ``qkv``. Statistics and sums are accumulated in float32
        (float64 for float64). Differentiable once in ``qkv``, the table and ``temb``.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case, or ``dropout_p`` > 0.
    """
    op = "window_attention"
    # The default is an int: a float would be a symbol to Dynamo under dynamic=True, and this fails.
    if not (isinstance(dropout_p, float | int) and 0 <= dropout_p < 1):
        raise ValueError(f"{op}: dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if dropout_p > 0:
        raise NotImplementedError(
            f"{op}: no backend drops attention weights, got dropout_p={dropout_p}: rows would no "
            "longer sum to one, and v_t must stay inside. The literal equations can "
            "(use_fused_tmsa=False, or the module's own forward, which patched models train with)."
        )
    qkv, temb = autocast(qkv, temb)
    check_activation(op, "qkv", qkv, "B H W 3C")
    batch, height, width, channels3 = qkv.shape
    window = (window_size, window_size) if isinstance(window_size, int) else window_size
    if not (isinstance(window, tuple | list) and all(isinstance(n, int) for n in window)):
        raise TypeError(f"{op}: window_size must be an int or two ints, got {window_size!r}")
    if not isinstance(num_heads, int):
        raise TypeError(f"{op}: num_heads must be an int, got {num_heads!r}")
    if not isinstance(scale, float | int | None):
        raise TypeError(f"{op}: scale must be a number, got {scale!r}")
    if len(window) != 2 or min(window) < 1 or height % window[0] or width % window[1]:
        raise ValueError(
            f"{op}: window_size must divide the token grid: got window {window} "
            f"for the grid ({height}, {width})"
        )
    if num_heads < 1 or channels3 < 1 or channels3 % (3 * num_heads):
        raise ValueError(
            f"{op}: the last dimension of qkv must be 3 · num_heads · head_dim, "
            f"got {channels3} for num_heads={num_heads}"
        )
    channels = channels3 // 3
    if relative_position_bias_table is not None:
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        check_tensor(
            op,
            "relative_position_bias_table",
            relative_position_bias_table,
            rows,
            num_heads,
            like=qkv,
        )
    if temb is not None:
        check_tensor(op, "temb", temb, batch, 2 * channels, like=qkv, narrower=True)
    if scale is None:
        scale = (channels // num_heads) ** -0.5
    args = (qkv, temb, relative_position_bias_table, num_heads, window, scale)
    return _window_attention(qkv.device, *args, backend=backend)[0]


def _fake(qkv, temb, table, num_heads, window_size, scale):
    batch, height, width, channels3 = qkv.shape
    return qkv.new_empty(batch, height, width, channels3 // 3), qkv.new_empty(0)


def _backward_fake(grad_out, qkv, temb, table, out, lse, num_heads, window_size, scale):
    return tuple(
        qkv.new_empty(0) if t is None else t.new_empty(t.shape) for t in (qkv, temb, table)
    )


def _setup_context(ctx, inputs, output):
    qkv, temb, table, ctx.num_heads, ctx.window_size, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, temb, table, *output)


def _backward(op, ctx, grad_out, _):
    qkv, temb, table, out, lse = ctx.saved_tensors
    dqkv, dtemb, dtable = op(
        grad_out, qkv, temb, table, out, lse, ctx.num_heads, ctx.window_size, ctx.scale
    )
    dtemb, dtable = (None if t is None else d for t, d in ((temb, dtemb), (table, dtable)))
    return dqkv, dtemb, dtable, None, None, None


_window_attention = FusedOp(
    "window_attention",
    __name__,
    schema="(Tensor qkv, Tensor? temb, Tensor? relative_position_bias_table, int num_heads, "
    "int[2] window_size, float scale) -> (Tensor out, Tensor lse)",
    backward_schema="(Tensor grad_out, Tensor qkv, Tensor? temb, "
    "Tensor? relative_position_bias_table, Tensor out, Tensor lse, int num_heads, "
    "int[2] window_size, float scale) -> (Tensor dqkv, Tensor dtemb, Tensor dtable)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
