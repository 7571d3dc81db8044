"""The fused ops inside models we did not write.

Modules are recognised by structure, not by class name or import: an attention by its parts and the
shapes of its parameters, a block by being that attention between two norms and an MLP. Then it is
tried: a copy's own forward and the fused one must agree in float64. A module that passes is given a
subclass of its own class, with another ``forward`` and nothing else: parameters, buffers, hooks,
state dict and optimiser state stay the very same objects, and ``unpatch`` gives the class back.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.dispatch import check_backend
from diffit_kernels.model import TimeDependentAttention, relative_position_index

ATTENTION_PARTS = (
    "qkv",
    "qkv_temb",
    "proj",
    "relative_position_bias_table",
    "relative_position_index",
    "num_heads",
    "window_size",
)
BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
AGREEMENT = 1e-9  # of the largest output, in float64


def patch(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Run a model's time-dependent attentions, and their blocks, through the fused ops; in place.

    Served: attention modules with the parts of the released DiffiT (``qkv``, ``qkv_temb``,
    ``proj``, ``relative_position_bias_table``, ``relative_position_index``, ``num_heads``,
    ``window_size``) whose forward takes (tokens, time token); and blocks of ``norm1``, ``attn``,
    ``norm2``, ``mlp`` that compute x̂ = x + attn(norm1(x), c), x̂ + mlp(norm2(x̂)). With attention
    dropout, training keeps the module's own forward. Patching twice changes only the backend.

    Args:
        model: any module that contains such attentions, or is one.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in it can be patched; the message says what was looked for, and which
            candidates failed for what reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    tried: dict[tuple, str | None] = {}
    refused, attentions = {}, set()
    for name, module in model.named_modules():
        reason = _not_an_attention(module)
        if reason is None and not isinstance(module, _Patched):
            reason = _disagreement(module, fused.attention, tried)
        if reason is None:
            attentions.add(module)
        elif reason:
            refused[name or "the model itself"] = reason
    if not attentions:
        found = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            "patch: found no attention to patch. Looked for modules with "
            f"{', '.join(ATTENTION_PARTS)}; near misses: {found or 'none'}."
        )
    for module in attentions:
        _swap_class(module, _PatchedAttention, backend)
    for module in model.modules():
        if isinstance(module, _PatchedBlock) or (
            getattr(module, "attn", None) in attentions
            and _has_block_parts(module)
            and _disagreement(module, fused.block, tried) is None
        ):
            _swap_class(module, _PatchedBlock, backend)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module in ``model`` its own class back, in place; returns ``model``."""
    for module in model.modules():
        if isinstance(module, _Patched):
            module.__class__ = module.original
            module.__dict__.pop("_diffit_backend", None)
    return model


class _Patched:
    """Marks a patched class; ``original`` is the class that ``unpatch`` gives back."""

    original: type

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the original and how to make it.
        kind = next(base for base in (_PatchedAttention, _PatchedBlock) if isinstance(self, base))
        return _rebuild, (kind, self.original), self.__getstate__()

    def __getstate__(self):
        getstate = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        return getstate() if getstate else self.__dict__


class _PatchedAttention(_Patched):
    def forward(self, *args, **kwargs):
        tokens, temb, others = _arguments(self, args, kwargs)
        reason = "it was called with further arguments" if others else _dropout_reason(self)
        if reason:
            _warn_once(self.original, reason)
            return super().forward(*args, **kwargs)
        out = fused.attention(self, tokens, temb, backend=self._diffit_backend)
        dropout = getattr(self, "proj_drop", None)
        return out if dropout is None else dropout(out)


class _PatchedBlock(_Patched):
    def forward(self, *args, **kwargs):
        tokens, temb, others = _arguments(self, args, kwargs)
        if others:
            _warn_once(self.original, "it was called with further arguments")
            return super().forward(*args, **kwargs)
        return fused.block(self, tokens, temb, backend=self._diffit_backend)


@functools.cache
def _patched_class(kind: type, original: type) -> type:
    body = {"original": original, "argument_names": _argument_names(original)}
    return type(f"Patched{original.__name__}", (kind, original), body)


def _rebuild(kind: type, original: type) -> nn.Module:
    cls = _patched_class(kind, original)
    return cls.__new__(cls)


def _swap_class(module: nn.Module, kind: type, backend: str | None) -> None:
    if not isinstance(module, _Patched):
        module.__class__ = _patched_class(kind, type(module))
    module._diffit_backend = backend


def _argument_names(original: type) -> tuple[str, ...]:
    return tuple(inspect.signature(original.forward).parameters)[1:]


def _arguments(module: _Patched, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None, bool]:
    """(tokens, time token, whether more was given), by position or by the names of the forward."""
    names = module.argument_names
    given = dict(zip(names, args, strict=False)) | kwargs
    others = any(value is not None for name, value in given.items() if name not in names[:2])
    return given[names[0]], given.get(names[1]), others


def _dropout_reason(module: nn.Module) -> str | None:
    dropout = getattr(module, "attn_drop", None)
    rate = getattr(dropout, "p", dropout) or 0.0
    if module.training and rate > 0:
        return f"attention dropout {rate} is on, and the fused attention has none"
    return None


_warned: set[tuple[type, str]] = set()


def _warn_once(original: type, reason: str) -> None:
    if torch.compiler.is_compiling() or (original, reason) in _warned:
        return
    _warned.add((original, reason))
    warnings.warn(
        f"{original.__name__} runs its own forward instead of the fused one: {reason}.",
        RuntimeWarning,
        stacklevel=4,
    )


def _not_an_attention(module: nn.Module) -> str | None:
    """None for an attention we serve; "" for anything else; the reason for a near miss."""
    if isinstance(module, TimeDependentAttention):
        return "it is diffit_kernels' own: set model.use_fused_tmsa = True instead"
    lacking = [name for name in ATTENTION_PARTS if not hasattr(module, name)]
    if lacking:
        near = len(lacking) <= 2 and isinstance(getattr(module, "qkv", None), nn.Module)
        return f"lacks {', '.join(lacking)}" if near else ""
    window = module.window_size
    h, w = (window, window) if isinstance(window, int) else tuple(window)
    rows = (2 * h - 1) * (2 * w - 1)
    table = module.relative_position_bias_table
    if tuple(table.shape) != (rows, module.num_heads):
        return f"its bias table has shape {tuple(table.shape)}, not {(rows, module.num_heads)}"
    index = module.relative_position_index
    expected = relative_position_index((h, w), index.device)
    if index.device.type != "meta" and not torch.equal(index.reshape(h * w, -1).long(), expected):
        return "its relative_position_index is not the row-major one"
    names = _argument_names(_original_class(module))
    if len(names) < 2:
        return f"its forward takes ({', '.join(names)}), not tokens and a time token"
    return None


def _original_class(module: nn.Module) -> type:
    return module.original if isinstance(module, _Patched) else type(module)


def _has_block_parts(module: nn.Module) -> bool:
    """Four parts, nothing beside them that computes, and a forward of (tokens, time token)."""
    working = {name for name, part in module.named_children() if type(part) is not nn.Identity}
    return working == set(BLOCK_PARTS) and len(_argument_names(type(module))) == 2


def _disagreement(module: nn.Module, function: Callable, tried: dict) -> str | None:
    """Try a module's own forward against the fused ``function``; None if they agree in float64.

    A copy without hooks is run, so nobody notices. Modules of one class with the same plain
    attributes and parts behave alike, and are tried once.
    """
    kind = _kind(module)
    if kind not in tried:
        tried[kind] = _try(module, function)
    return tried[kind]


@torch.no_grad()
def _try(module: nn.Module, function: Callable) -> str | None:
    attention = getattr(module, "attn", module)
    device = attention.relative_position_bias_table.device
    if device.type == "meta":
        return "it is on the meta device, and cannot be tried before its weights are loaded"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    try:
        twin = copy.deepcopy(module).double().eval()
        for part in twin.modules():
            for hooks in HOOKS:
                getattr(part, hooks).clear()
        for parameter in twin.parameters():  # a fresh model's zeros would hide a difference
            parameter.copy_(0.1 * random(*parameter.shape))
        tokens = attention.relative_position_index.shape[0]
        channels = attention.proj.weight.shape[0]
        x, temb = random(2, tokens, channels), random(2, channels)
        own = type(twin).forward(twin, x, temb)
        ours = function(twin, x, temb, backend="eager")
        difference = (own - ours).abs().max() / own.abs().max()
    except Exception as error:  # a foreign module may raise anything
        return f"trying it raised {type(error).__name__}: {error}"
    if own.shape == ours.shape and difference <= AGREEMENT:
        return None
    return f"its forward computes something else (by {difference:.1e} of the largest output)"


def _kind(module: nn.Module) -> tuple:
    """What two modules must share to behave alike, parameters' values aside."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        (
            name,
            type(part),
            tuple((k, v) for k, v in sorted(vars(part).items()) if isinstance(v, plain)),
            tuple((k, v.shape) for k, v in part.named_parameters(recurse=False)),
        )
        for name, part in module.named_modules()
    )
