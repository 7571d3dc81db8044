"""A transformer block through the fused ops: the forward of our models' blocks and of patched ones.

The functions take a block and its attention by their parts, whoever wrote them. A part is read past
its ``forward`` only while nothing else hangs on it: with a hook, a parametrization, a forward set
on the instance, another class in its place (an adapter, a quantized layer), or a parameter that is
no plain tensor (quantized weights), the part itself is called.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from diffit_kernels.ops import adaln, linear, mlp, time_projections, window_attention

PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_PACKAGES = ("torch._subclasses.", "torch.distributed.")  # torch.compile's own, and shards


class AttentionParts(NamedTuple):
    """What an attention is made of.

    Attributes:
        qkv, proj: the tokens' projections, C -> 3C and C -> C.
        qkv_temb: the time token's projection, T -> 3C, or None.
        table: ((2h-1)(2w-1), num_heads), the relative position bias, or None.
        num_heads: attention heads.
        window_size: (h, w), or None where all tokens are one window, of whatever shape.
        scale: of the scores; None is head_dim ** -0.5.
    """

    qkv: nn.Module
    qkv_temb: nn.Module | None
    proj: nn.Module
    table: Tensor | None
    num_heads: int
    window_size: tuple[int, int] | None
    scale: float | None


class BlockParts(NamedTuple):
    """What a block is made of.

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        attend: the attention, as a function of tokens alone.
        mlp: the MLP.
        modulation: (B, T) -> (B, 6C), the shift, scale and gate of both branches, or None.
    """

    norm1: nn.Module
    attend: Callable[[Tensor], Tensor]
    norm2: nn.Module
    mlp: nn.Module
    modulation: nn.Module | None


def blocks(
    modules: Iterable[nn.Module],
    kind: type,
    x: Tensor,
    temb: Tensor | None,
    time_parts: Tensor | None = None,
) -> Tensor:
    """Blocks in a row, each of which leaves its last sum to the first norm of the next.

    Passes over (B, N, C) activations of one such block, beside what its four products read and
    write: residual and LN read x and m, write x and h; the attention reads q, k, v and writes a;
    residual and LN read x and a, write x̂ and h: 7 reads and 5 writes. GELU adds 4 and 4 in
    training, where its input is kept, and wherever the product before it cannot apply it as it
    writes (see the mlp op's backends). The eager backend takes more: it reads x again for LN, and
    its attention keeps scores. Only bare modules of class ``kind`` with ``use_fused_tmsa`` are
    joined; others are called.

    x: (B, N, C). ``time_parts``, (depth, k · B, 2C), are the blocks' own in place of ``temb``, and
    the result is (k · B, N, C): every sample with k time tokens, in k runs of B. Norm and qkv
    product of the first block, which are the same for all k, are computed once.

    Raises:
        ValueError: ``time_parts`` for a block that has to be called.
    """
    branch = gate = None
    for index, module in enumerate(modules):
        if _is_bare(module, kind) and module.use_fused_tmsa:
            given, copies = None, 1
            if time_parts is not None:
                given, copies = time_parts[index], time_parts.shape[1] // x.shape[0]
            parts = module.parts(temb, time_parts=given)
            x, branch, gate = _halves(parts, x, branch, gate, temb, module.backend, copies)
        elif time_parts is not None:
            raise ValueError(
                f"blocks: with time_parts every block must be a bare {kind.__name__} with "
                f"use_fused_tmsa, got {type(module).__name__} at {index}"
            )
        else:
            x = x if branch is None else _add(x, branch, gate)
            x, branch, gate = module(x, temb), None, None
    return x if branch is None else _add(x, branch, gate)


def block(parts: BlockParts, x: Tensor, temb: Tensor, *, backend: str | None) -> Tensor:
    """x̂ = x + attn(LN(x), c);  x̂ + mlp(LN(x̂))  (DiffiT, eqs. 7 and 8), modulated if ``parts`` are.

    One more read and as many writes as in :func:`blocks`: alone, a block reads x once less at its
    start, and reads x̂ and m and writes x at its end.
    x: (B, N, C); temb: (B, T). Returns (B, N, C).
    """
    x, branch, gate = _halves(parts, x, None, None, temb, backend)
    return _add(x, branch, gate)


def _halves(parts, x, branch, gate, temb, backend, copies=1):
    """(x̂, mlp(LN(x̂)), its gate) for x + gate · branch: a block without its last sum.

    ``copies``: how many time tokens the attention has for every sample of x.
    """
    shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
    if parts.modulation is not None:
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.modulation(temb).chunk(6, -1)
    x, h = residual_norm(parts.norm1, x, branch, gate, shift1, scale1, backend=backend)
    branch = parts.attend(h)
    x = x if copies == 1 else x.repeat(copies, 1, 1)
    x, h = residual_norm(parts.norm2, x, branch, gate1, shift2, scale2, backend=backend)
    return x, feed_forward(parts.mlp, h, backend=backend), gate2


def residual_norm(
    module: nn.Module,
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """x <- x + gate · branch, and LN(x) (1 + scale) + shift; in one pass for a plain LayerNorm.

    x, branch: (B, N, C); gate, shift, scale: (B, C), or None, shift and scale together. Returns
    (x, out).
    """
    if _is_bare(module, nn.LayerNorm):
        affine = {"weight": module.weight, "bias": module.bias, "eps": module.eps}
        if branch is None:
            return x, adaln(x, shift, scale, **affine, backend=backend)
        return adaln(x, shift, scale, y=branch, gate=gate, **affine, backend=backend)
    x = x if branch is None else _add(x, branch, gate)
    out = module(x)
    return x, out if shift is None else out * (1 + scale[:, None]) + shift[:, None]


def _add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + (branch if gate is None else gate[:, None] * branch)


def attention(
    parts: AttentionParts,
    x: Tensor,
    temb: Tensor | None,
    grid: tuple[int, int] | None = None,
    *,
    time_parts: Tensor | None = None,
    backend: str | None,
) -> Tensor:
    """proj(softmax(q kᵀ d^-½ + B) v) by windows, where q, k, v = qkv(x) + qkv_temb(temb).

    x: (B, N, C), the tokens of ``grid`` row by row, by default those of one window; temb: (B, T),
    or None for no time token. Returns (B, N, C). DiffiT, eqs. 3 to 6.

    ``time_parts``, (k · B, 2C): what :func:`~diffit_kernels.ops.time_projections` makes of k time
    tokens for every sample, in k runs of B, in place of ``temb``. Returns (k · B, N, C) then; qkv
    is computed once and read k times.
    """
    batch, tokens, channels = x.shape
    if grid is None:
        grid = parts.window_size or nearly_square(tokens)
    height, width = grid
    if tokens != height * width:
        raise ValueError(
            f"attention: x must have {height * width} tokens, a {height} x {width} grid, "
            f"got {tokens}"
        )
    qkv = project(parts.qkv, x, backend=backend).reshape(batch, height, width, 3 * channels)

    def attend(time_parts: Tensor | None) -> Tensor:
        out = window_attention(
            qkv,
            parts.table,
            time_parts,
            num_heads=parts.num_heads,
            window_size=parts.window_size or grid,
            scale=parts.scale,
            backend=backend,
        )
        return out.view(batch, tokens, channels)

    if time_parts is not None:
        runs = [attend(run) for run in time_parts.split(batch)]
        out = runs[0] if len(runs) == 1 else torch.cat(runs)
    elif temb is not None and parts.qkv_temb is not None:
        out = attend(_time_parts(parts.qkv_temb, temb, backend))
    else:
        out = attend(None)
    return project(parts.proj, out, backend=backend)


def nearly_square(tokens: int) -> tuple[int, int]:
    """h · w = tokens with h <= w as near as can be: without a bias any shape gives the same."""
    height = next(h for h in range(max(1, int(tokens**0.5)), 0, -1) if tokens % h == 0)
    return height, tokens // height


def feed_forward(module: nn.Module, x: Tensor, *, backend: str | None) -> Tensor:
    """fc2(GELU(fc1(x))) through the mlp op; any other structure runs itself."""
    layers = _mlp_layers(module)
    if layers is None or any(is_touched(part) for part in module.modules()):
        return module(x)
    fc1, act, fc2 = layers
    form = act.approximate
    return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate=form, backend=backend)


def patch_tokens(projection: nn.Module, x: Tensor) -> Tensor:
    """(B, c, S, S) -> (B, N, C), contiguous: a map of every p × p patch, as one product.

    A convolution leaves channels before tokens, which the next to read them has to copy, and its
    kernels are made for other shapes: on two CPU cores 1.5 to 4 ms for one image's 256 tokens of
    1152 channels, the product 0.1 (benchmarks/NOTES.md). Any but a bare one without overlap is
    called.
    """
    if not (_is_bare(projection, nn.Conv2d) and _takes_patches(projection, x)):
        return projection(x).flatten(2).transpose(1, 2)
    batch, channels, height, width = x.shape
    p, q = projection.kernel_size
    rows, columns = height // p, width // q
    x = x.reshape(batch, channels, rows, p, columns, q).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, rows * columns, channels * p * q)
    return F.linear(x, projection.weight.flatten(1), projection.bias)


def _takes_patches(projection: nn.Conv2d, x: Tensor) -> bool:
    sizes = zip(x.shape[2:], projection.kernel_size, strict=True)
    return (
        projection.stride == projection.kernel_size
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
        and projection.groups == 1
        and all(size % side == 0 for size, side in sizes)
    )


def _mlp_layers(module: nn.Module) -> tuple[nn.Linear, nn.GELU, nn.Linear] | None:
    """(fc1, GELU, fc2) if ``module`` computes fc2(GELU(fc1(x))), by these names or in a row."""
    working = {name: part for name, part in module.named_children() if not _is_idle(part)}
    names = tuple(working) if type(module) is nn.Sequential else ("fc1", "act", "fc2")
    kinds = tuple(type(working.get(name)) for name in names)
    if len(working) != 3 or kinds != (nn.Linear, nn.GELU, nn.Linear):
        return None
    return tuple(working[name] for name in names)


def _is_idle(part: nn.Module) -> bool:
    """Whether a part gives back what it is given."""
    if type(part) is nn.Dropout:
        return part.p == 0 or not part.training
    return type(part) is nn.Identity


def project(module: nn.Module, x: Tensor, *, backend: str | None) -> Tensor:
    """module(x); a bare nn.Linear on a CPU by the linear op, for the sake of its native backend."""
    if x.device.type != "cpu" or not _is_bare(module, nn.Linear):
        return module(x)
    return linear(x, module.weight, module.bias, backend=backend)


def _time_parts(projection: nn.Module, temb: Tensor, backend: str | None) -> Tensor:
    """The time token's q and v parts, (B, 2C), by the op or by the layer that replaced it."""
    if _is_bare(projection, nn.Linear):
        biases = () if projection.bias is None else (projection.bias,)
        return time_projections(temb, (projection.weight,), biases, backend=backend)[0]
    q, _, v = projection(temb).chunk(3, -1)
    return torch.cat((q, v), -1)


def _is_bare(module: nn.Module, kind: type) -> bool:
    """Exactly a ``kind`` with nothing on it: reading its parameters equals calling it."""
    return type(module) is kind and not is_touched(module)


def is_touched(module: nn.Module) -> bool:
    """Whether calling the module is more than its class says.

    Hooks, a forward set or compiled, a parameter whose class may compute in a way of its own.
    """
    return bool(
        "forward" in vars(module)
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or not all(_is_plain(parameter) for parameter in module._parameters.values())
    )


def _is_plain(parameter: Tensor | None) -> bool:
    """Whether a parameter's memory holds its numbers: no subclass of Tensor but torch's own."""
    kind = type(parameter)
    return parameter is None or kind in PLAIN_TENSORS or kind.__module__.startswith(PLAIN_PACKAGES)
