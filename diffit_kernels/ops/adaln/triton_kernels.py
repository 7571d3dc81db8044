"""adaln in Triton: launching the kernels of triton_forward.py and triton_backward.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffit_kernels.ops import split, triton_launch
from diffit_kernels.ops.adaln import launch
from diffit_kernels.ops.adaln.triton_backward import backward_kernel, finish_kernel
from diffit_kernels.ops.adaln.triton_forward import forward_kernel


def can_run(x, y, gate, shift, scale, weight, bias, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    channels = x.shape[-1]
    if not 1 <= channels <= launch.MAX_CHANNELS:
        return (
            f"Triton's adaln holds whole rows in registers: C must be 1 to {launch.MAX_CHANNELS}, "
            f"got {channels}"
        )
    return triton_launch.refusal(x, y, gate, shift, scale, weight, bias)


class Modulation(NamedTuple):
    """A modulation, as the kernels find the row of a token in it, and its gradient."""

    tensor: Tensor | None
    stride: int  # between samples, where they have one row each
    per_token: bool
    grad: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor | None, tokens: int, grad: Tensor | None = None) -> "Modulation":
        """A row per sample may be a slice of a wider one, as chunks of a projection are."""
        if tensor is None:
            return cls(None, 0, False, None)
        per_token = tensor.shape[1] == tokens
        if per_token or tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        return cls(tensor, tensor.stride(0), per_token, grad)

    @property
    def per_sample(self) -> bool:
        return self.tensor is not None and not self.per_token

    @property
    def per_token_grad(self) -> Tensor | None:
        return self.grad if self.per_token else None

    @property
    def per_sample_grad(self) -> Tensor | None:
        return self.grad if self.per_sample else None


def fake(x, y, gate, shift, scale, weight, bias, eps):
    residual = x.new_empty(0 if y is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), residual, mean, rstd


def forward(x, y, gate, shift, scale, weight, bias, eps):
    """One pass: x and y are read once, out and the new x are written once.

    Bytes per element in half precision: 4 without y, 8 with it, and 2 for each modulation per
    token. Those per sample come from the caches.
    """
    x, y, weight, bias = (_contiguous(t) for t in (x, y, weight, bias))
    gate, shift, scale = (Modulation.of(t, x.shape[1]) for t in (gate, shift, scale))
    batch, tokens, channels = _folded(x.shape, gate, shift, scale)
    out, residual, mean, rstd = fake(x, y, None, None, None, None, None, eps)
    config = launch.FORWARD.config(
        x.device, dtype=x.dtype, channels=channels, rows=min(tokens, launch.MAX_ROWS)
    )
    triton_launch.launch(
        forward_kernel,
        (batch * -(-tokens // config.blocks["BLOCK_ROWS"]),),
        *(x, y, gate.tensor, shift.tensor, scale.tensor, weight, bias),
        *(out, None if y is None else residual, mean, rstd),
        *(tokens, gate.stride, shift.stride, scale.stride, eps),
        config=config,
        GATE_PER_TOKEN=gate.per_token,
        SHIFT_PER_TOKEN=shift.per_token,
        SCALE_PER_TOKEN=scale.per_token,
        C=channels,
    )
    return out, residual, mean, rstd


def backward(
    grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd, eps
):
    """One pass, and one launch to add up its programs' sums if any gradient is a sum over tokens.

    Bytes per element in half precision: 6 (grad_out and x; dx), 2 for grad_residual, 4 for y and
    dy, 4 for a gate or scale per token, 2 for a shift per token. Sums over rows wider than
    ``launch.ONE_LAUNCH`` may take a second launch, which reads grad_out and x again.
    """
    grad_out, grad_residual, residual, y, weight, bias, mean, rstd = (
        _contiguous(t) for t in (grad_out, grad_residual, residual, y, weight, bias, mean, rstd)
    )
    new = torch.zeros if residual.numel() == 0 else torch.empty  # sums over nothing are zero
    grads = dx, dy, dgate, dshift, dscale, dweight, dbias = tuple(
        residual.new_empty(0) if t is None else new(t.shape, dtype=t.dtype, device=t.device)
        for t in (residual, y, gate, shift, scale, weight, bias)
    )
    if residual.numel() == 0:
        return grads
    gate, shift, scale = (
        Modulation.of(t, residual.shape[1], grad)
        for t, grad in ((gate, dgate), (shift, dshift), (scale, dscale))
    )
    batch, tokens, channels = _folded(residual.shape, gate, shift, scale)
    inputs = (grad_out, grad_residual, residual, y, gate.tensor, scale.tensor, weight, bias)
    config = launch.BACKWARD.config(
        residual.device,
        dtype=residual.dtype,
        channels=channels,
        rows=min(tokens, launch.MAX_ROWS),
        streams=_streams(inputs, gate, scale),
    )
    chunk = _chunk(batch, tokens, channels, config)
    chunks = -(-tokens // chunk)
    sums = Sums.of(gate, shift, scale, weight, bias, (batch, chunks, channels), residual.device)
    by_token = (
        dx,
        dy if y is not None else None,
        *(m.per_token_grad for m in (gate, shift, scale)),
    )
    passes = [(config, (*by_token, *sums))]
    if channels > launch.ONE_LAUNCH and sums.need_two_launches(scale):
        second = launch.SUMS.config(residual.device, dtype=residual.dtype, channels=channels)
        passes = [
            (config, (*by_token, *Sums(dx_y=sums.dx_y))),
            (second, (*[None] * len(by_token), *sums._replace(dx_y=None))),
        ]
    for config, results in passes:
        triton_launch.launch(
            backward_kernel,
            (batch * chunks,),
            *(*inputs, mean, rstd, *results, tokens, chunk, gate.stride, scale.stride),
            config=config,
            GATE_PER_TOKEN=gate.per_token,
            SCALE_PER_TOKEN=scale.per_token,
            C=channels,
        )
    if any(rows is not None for rows in sums):
        _finish(sums, gate, shift, scale, weight, bias, dweight, dbias)
    return grads


class Sums(NamedTuple):
    """Sums over the tokens of each chunk, (B, chunks, C) float32, as far as gradients need them."""

    du: Tensor | None = None
    du_normed: Tensor | None = None
    dx_y: Tensor | None = None
    dout: Tensor | None = None

    @classmethod
    def of(cls, gate, shift, scale, weight, bias, shape, device) -> "Sums":
        wanted = (
            bias is not None or (shift.per_sample and not scale.per_token),
            weight is not None or scale.per_sample,
            gate.per_sample,
            shift.per_sample and scale.per_token,
        )
        rows = iter(torch.empty((sum(wanted), *shape), dtype=torch.float32, device=device))
        return cls(*(next(rows) if is_wanted else None for is_wanted in wanted))

    def need_two_launches(self, scale: Modulation) -> bool:
        """Whether they are too many for the registers beside the row of a wide one's gradients."""
        taken = sum(rows is not None for rows in self)
        return taken + (self.dx_y is not None or scale.per_token) > 2


def _streams(inputs, gate: Modulation, scale: Modulation) -> int:
    """How many rows the backward reads for each token: what its copies in flight are sized by."""
    dout, dresidual, residual, y, _, _, _, bias = inputs
    per_token = (gate.per_token_grad, scale.per_token_grad, bias if scale.per_token else None)
    return sum(t is not None for t in (dout, dresidual, residual, y, *per_token))


def _chunk(batch: int, tokens: int, channels: int, config: triton_launch.Config) -> int:
    """Tokens of one program of the backward."""
    chunks = split.chunks(config.blocks["PROGRAMS"], batch, tokens, launch.LEAST)
    at_once = config.blocks["BLOCK_ROWS"]
    chunk = -(-tokens // (chunks * at_once)) * at_once
    return min(chunk, 2**30 // channels)  # the kernel counts a chunk's elements in 32 bits


def _finish(sums, gate, shift, scale, weight, bias, dweight, dbias) -> None:
    """Write the gradients that are sums over tokens, from the rows that the programs left."""
    taken = next(rows for rows in sums if rows is not None)
    batch, chunks, channels = taken.shape
    config = launch.FINISH.config(taken.device, dtype=taken.dtype, channels=channels, chunks=chunks)
    parameters = [
        None if t is None else grad[None] if batch == 1 else taken.new_empty(batch, channels)
        for t, grad in ((weight, dweight), (bias, dbias))
    ]
    triton_launch.launch(
        finish_kernel,
        (batch * -(-channels // config.blocks["BLOCK_C"]),),
        *(*sums, scale.tensor if scale.per_sample else None, weight, bias),
        *(gate.per_sample_grad, shift.per_sample_grad, scale.per_sample_grad, *parameters),
        *(chunks, scale.stride),
        config=config,
        C=channels,
    )
    if batch > 1:  # parameters beside modulations per sample: their rows are by sample
        for rows, grad in zip(parameters, (dweight, dbias), strict=True):
            if rows is not None:
                grad.copy_(rows.sum(0))


def _folded(shape: torch.Size, *modulations: Modulation) -> tuple[int, int, int]:
    """(B, N, C) as the kernels see it: one sample, if no sample has anything of its own."""
    batch, tokens, channels = shape
    if any(modulation.per_sample for modulation in modulations):
        return batch, tokens, channels
    return min(batch, 1), batch * tokens, channels


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
