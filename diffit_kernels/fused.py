"""A DiffiT block through the fused ops: the forward of our model's blocks and of patched ones.

The functions take the module, whoever wrote it, by its parts: a block has ``norm1``, ``attn``,
``norm2`` and ``mlp``; an attention ``qkv``, ``qkv_temb``, ``proj`` and the bias table. A part is
read past its ``forward`` only while nothing else hangs on it: with a hook, a parametrization, a
forward set on the instance, or another class in its place (an adapter, a quantized layer), the part
itself is called.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from diffit_kernels.ops import adaln, mlp, time_projections, window_attention


def block(module: nn.Module, x: Tensor, temb: Tensor, *, backend: str | None) -> Tensor:
    """x̂ = x + attn(LN(x), temb);  x̂ + mlp(LN(x̂))  (DiffiT, eqs. 7 and 8).

    Passes over (B, N, C) activations outside the products and the attention: LN reads x and writes
    h; residual and LN read x and a, write x̂ and h; the last residual reads x̂ and m and writes x:
    5 reads and 4 writes, where adaln is one pass (the eager backend reads x̂ once more).
    x: (B, N, C); temb: (B, C). Returns (B, N, C).
    """
    attended = module.attn(norm(module.norm1, x, backend=backend), temb)
    if _is_bare(module.norm2, nn.LayerNorm):
        x, h = adaln(x, y=attended, **_affine(module.norm2), backend=backend)
    else:
        x = x + attended
        h = norm(module.norm2, x, backend=backend)
    return x + feed_forward(module.mlp, h, backend=backend)


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
    qkv = module.qkv(x).reshape(batch, height, width, 3 * channels)
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
    return module.proj(out.view(batch, tokens, channels))


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
    """Whether calling the module does more than its class says: a hook, or a forward of its own."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
