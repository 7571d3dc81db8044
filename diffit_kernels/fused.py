"""A DiffiT block through the fused ops: the forward of our model's blocks and of patched ones.

The functions take the module, whoever wrote it, by its parts: a block has ``norm1``, ``attn``,
``norm2`` and ``mlp``; an attention ``qkv``, ``qkv_temb``, ``proj`` and the bias table. A part is
read past its ``forward`` only while nothing else hangs on it: with a hook, a parametrization, a
forward set on the instance, or another class in its place (an adapter, a quantized layer), the part
itself is called.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from diffit_kernels.ops import adaln, linear, mlp, time_projections, window_attention


def blocks(modules: Iterable[nn.Module], kind: type, x: Tensor, temb: Tensor) -> Tensor:
    """Blocks in a row, each of which leaves its last sum to the first norm of the next.

    Passes over (B, N, C) activations of one such block, beside what its four products read and
    write: residual and LN read x and m, write x and h; the attention reads q, k, v and writes a;
    residual and LN read x and a, write x̂ and h: 7 reads and 5 writes. GELU adds 4 and 4 in
    training, where its input is kept, and wherever the product before it cannot apply it as it
    writes (see the mlp op's backends). The eager backend takes more: it reads x again for LN, and
    its attention keeps scores. Only bare modules of class ``kind`` with ``use_fused_tmsa`` are
    joined; others are called.
    """
    branch = None
    for module in modules:
        if _is_bare(module, kind) and module.use_fused_tmsa:
            x, branch = _halves(module, x, branch, temb, module.backend)
        else:
            x = x if branch is None else x + branch
            x, branch = module(x, temb), None
    return x if branch is None else x + branch


def block(module: nn.Module, x: Tensor, temb: Tensor, *, backend: str | None) -> Tensor:
    """x̂ = x + attn(LN(x), temb);  x̂ + mlp(LN(x̂))  (DiffiT, eqs. 7 and 8).

    One more read and as many writes as in :func:`blocks`: alone, a block reads x once less at its
    start, and reads x̂ and m and writes x at its end.
    x: (B, N, C); temb: (B, C). Returns (B, N, C).
    """
    x, branch = _halves(module, x, None, temb, backend)
    return x + branch


def _halves(module, x, branch, temb, backend):
    """(x̂, mlp(LN(x̂))) for x + branch: a block without its last sum."""
    x, h = _residual_norm(module.norm1, x, branch, backend)
    x, h = _residual_norm(module.norm2, x, module.attn(h, temb), backend)
    return x, feed_forward(module.mlp, h, backend=backend)


def _residual_norm(module, x, branch, backend):
    """(x + branch, LN of it), in one pass where the norm is a plain LayerNorm."""
    if branch is not None and _is_bare(module, nn.LayerNorm):
        return adaln(x, y=branch, **_affine(module), backend=backend)
    x = x if branch is None else x + branch
    return x, norm(module, x, backend=backend)


def attention(module: nn.Module, x: Tensor, temb: Tensor | None, *, backend: str | None) -> Tensor:
    """proj(softmax(q kᵀ d^-½ + B) v), where q, k, v = qkv(x) + qkv_temb(temb)  (eqs. 3 to 6).

    x: (B, N, C) with N the window's tokens; temb: (B, C), or None for no time token.
    """
    batch, tokens, channels = x.shape
    window = module.window_size
    height, width = (window, window) if isinstance(window, int) else window
    if tokens != height * width:
        raise ValueError(
            f"attention: x must have {height * width} tokens, a {height} x {width} window, "
            f"got {tokens}"
        )
    qkv = _project(module.qkv, x, backend).reshape(batch, height, width, 3 * channels)
    time_parts = None if temb is None else _time_parts(module.qkv_temb, temb, backend)
    out = window_attention(
        qkv,
        module.relative_position_bias_table,
        time_parts,
        num_heads=module.num_heads,
        window_size=(height, width),
        scale=getattr(module, "scale", None),
        backend=backend,
    )
    return _project(module.proj, out.view(batch, tokens, channels), backend)


def norm(module: nn.Module, x: Tensor, *, backend: str | None) -> Tensor:
    """LN(x) through the adaln op."""
    if not _is_bare(module, nn.LayerNorm):
        return module(x)
    return adaln(x, **_affine(module), backend=backend)


def feed_forward(module: nn.Module, x: Tensor, *, backend: str | None) -> Tensor:
    """fc2(GELU(fc1(x))) through the mlp op; any other structure runs itself."""
    approximate = gelu_form(module)
    if not approximate or any(is_touched(part) for part in module.modules()):
        return module(x)
    fc1, fc2 = module.fc1, module.fc2
    return mlp(
        x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate=approximate, backend=backend
    )


def gelu_form(module: nn.Module) -> str | None:
    """The form of GELU, "tanh" or "none", if ``module`` computes fc2(GELU(fc1(x))), else None."""
    parts = dict(module.named_children())
    fc1, act, fc2 = (parts.pop(name, None) for name in ("fc1", "act", "fc2"))
    if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear or type(act) is not nn.GELU:
        return None
    idle = all(
        type(part) is nn.Identity
        or (type(part) is nn.Dropout and (part.p == 0 or not part.training))
        for part in parts.values()
    )
    return act.approximate if idle else None


def _project(module: nn.Module, x: Tensor, backend: str | None) -> Tensor:
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


def _affine(layer_norm: nn.LayerNorm) -> dict:
    return {"weight": layer_norm.weight, "bias": layer_norm.bias, "eps": layer_norm.eps}


def _is_bare(module: nn.Module, kind: type) -> bool:
    """Exactly a ``kind``, with no hook on it: reading its parameters equals calling it."""
    return type(module) is kind and not is_touched(module)


def is_touched(module: nn.Module) -> bool:
    """Whether calling the module is more than its class says: hooks, a forward set or compiled."""
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
    )
