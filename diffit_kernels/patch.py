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
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffit_kernels import fused
from diffit_kernels.block import TimeDependentAttention
from diffit_kernels.dispatch import check_backend
from diffit_kernels.positions import relative_position_index

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
MODULE_VARS = frozenset(vars(nn.Module())) - {"training"} | {"_diffit_backend"}


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
    tried: dict[tuple, _Trial] = {}
    refused, attentions = {}, {}
    for name, module in model.named_modules():
        reason, trial = _not_an_attention(module), _Trial()
        if reason is None and not isinstance(module, _Patched):
            trial = _try(module, _PatchedAttention, tried)
            reason = trial.refused
        if reason is None:
            attentions[module] = trial.random_training
        elif reason:
            refused[name or "the model itself"] = reason
    if not attentions:
        found = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            "patch: found no attention to patch. Looked for modules with "
            f"{', '.join(ATTENTION_PARTS)}; near misses: {found or 'none'}."
        )
    for module, random_training in attentions.items():
        _swap_class(module, _PatchedAttention, backend, random_training)
    for module in model.modules():
        if isinstance(module, _PatchedBlock):
            _swap_class(module, _PatchedBlock, backend)
        elif _has_block_parts(module) and module.attn in attentions:
            trial = _try(module, _PatchedBlock, tried)
            if trial.refused is None:
                _swap_class(module, _PatchedBlock, backend, trial.random_training)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module in ``model`` its own class back, in place; returns ``model``.

    Raises:
        ValueError: a module was parametrized after it was patched; nothing is changed then.
    """
    patched = [module for module in model.modules() if isinstance(module, _Patched)]
    for module in patched:
        if "original" not in vars(type(module)):
            raise ValueError(
                f"unpatch: {type(module).__name__} was parametrized after patching; "
                "remove its parametrizations first"
            )
    for module in patched:
        module.__class__ = module.original
        del module._diffit_backend
    return model


class _Patched:
    """Marks a patched class; ``original`` is the class that ``unpatch`` gives back."""

    original: type
    argument_names: tuple[str, ...]
    parts: tuple[str, ...]  # the children that the fused forward calls or reads
    random_training = False  # whether training drops something that the fused forward does not

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the original and how to make it.
        kind = next(base for base in (_PatchedAttention, _PatchedBlock) if isinstance(self, base))
        arguments = kind, self.original, self.random_training
        return _rebuild, arguments, self.__getstate__()

    def __getstate__(self):
        getstate = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        return getstate() if getstate else self.__dict__


class _PatchedAttention(_Patched):
    parts = ("qkv", "qkv_temb", "proj", "proj_drop")

    def forward(self, *args, **kwargs):
        tokens, temb, others = _arguments(self, args, kwargs)
        reason = _dropout_reason(self) or _own_forward_reason(self, others)
        if temb is not None and temb.shape != (tokens.shape[0], tokens.shape[-1]):
            reason = f"a time token of shape {tuple(temb.shape)} is not one per sample"
        if reason:
            _warn_once(self.original, reason)
            return super().forward(*args, **kwargs)
        window = self.window_size
        parts = fused.AttentionParts(
            self.qkv,
            self.qkv_temb,
            self.proj,
            self.relative_position_bias_table,
            self.num_heads,
            (window, window) if isinstance(window, int) else tuple(window),
            getattr(self, "scale", None),
        )
        out = fused.attention(parts, tokens, temb, backend=self._diffit_backend)
        dropout = getattr(self, "proj_drop", None)
        return out if dropout is None else dropout(out)


class _PatchedBlock(_Patched):
    parts = BLOCK_PARTS

    def forward(self, *args, **kwargs):
        tokens, temb, others = _arguments(self, args, kwargs)
        reason = _own_forward_reason(self, others)
        if reason:
            _warn_once(self.original, reason)
            return super().forward(*args, **kwargs)

        def attend(h: Tensor) -> Tensor:
            return self.attn(h, temb)

        parts = fused.BlockParts(self.norm1, attend, self.norm2, self.mlp, None)
        return fused.block(parts, tokens, temb, backend=self._diffit_backend)


@functools.cache
def _patched_class(kind: type, original: type, random_training: bool) -> type:
    body = {
        "original": original,
        "argument_names": _argument_names(original),
        "random_training": random_training,
    }
    return type(f"Patched{original.__name__}", (kind, original), body)


def _rebuild(kind: type, original: type, random_training: bool) -> nn.Module:
    cls = _patched_class(kind, original, random_training)
    return cls.__new__(cls)


def _swap_class(module: nn.Module, kind: type, backend: str | None, random: bool = False) -> None:
    if not isinstance(module, _Patched):
        module.__class__ = _patched_class(kind, type(module), random)
    module._diffit_backend = backend


def _argument_names(original: type) -> tuple[str, ...]:
    return tuple(inspect.signature(original.forward).parameters)[1:]


def _arguments(module: _Patched, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None, bool]:
    """(tokens, time token, whether more was given), by position or by the names of the forward."""
    names = module.argument_names
    given = dict(zip(names, args, strict=False)) | kwargs
    others = any(value is not None for name, value in given.items() if name not in names[:2])
    return given[names[0]], given.get(names[1]), others


def _own_forward_reason(module: _Patched, others: bool) -> str | None:
    """Why a call must take the module's own forward, if it must."""
    if others:
        return "it was called with further arguments"
    if module.training and module.random_training:
        return "its training drops something that the fused forward does not"
    idle = (part for name, part in module.named_children() if name not in module.parts)
    if any(fused.is_touched(part) for child in idle for part in child.modules()):
        return "there is a hook on a part that the fused forward does not call"
    return None


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
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "its own parameters are parametrized: remove that before patching"
    try:
        return _misfit(module)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its parts do not fit together: {error}"


def _misfit(module: nn.Module) -> str | None:
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
    if "forward" in vars(module) or parametrize.is_parametrized(module):
        return False
    working = {name for name, part in module.named_children() if type(part) is not nn.Identity}
    return working == set(BLOCK_PARTS) and len(_argument_names(type(module))) == 2


@dataclass(frozen=True)
class _Trial:
    """What trying a module showed: why it is refused, or whether its training is its own."""

    refused: str | None = None
    random_training: bool = False


def _try(module: nn.Module, kind: type, tried: dict[tuple, _Trial]) -> _Trial:
    """Try a module's own forward against the patched one, in eval and in training, in float64.

    Copies without hooks are run, so nobody notices. Modules of one class whose attributes, buffers
    and parts are the same behave alike, and are tried once.
    """
    attention = getattr(module, "attn", module)
    if attention.relative_position_bias_table.device.type == "meta":
        return _Trial("it is on the meta device, and cannot be tried before its weights are loaded")
    key = _kind(module)
    if key not in tried:
        try:
            difference, difference_in_training = _differences(module, attention, kind)
        except Exception as error:  # a foreign module may raise anything
            tried[key] = _Trial(f"trying it raised {type(error).__name__}: {error}")
        else:
            other = f"its forward computes something else (by {difference:.1e} of the largest)"
            tried[key] = _Trial(
                None if difference <= AGREEMENT else other, difference_in_training > AGREEMENT
            )
    return tried[key]


@torch.no_grad()
def _differences(module: nn.Module, attention: nn.Module, kind: type) -> list[float]:
    """Largest difference over largest output of the two forwards, in eval and in training."""
    device = attention.relative_position_bias_table.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    own = copy.deepcopy(module).double()
    for part in own.modules():
        for hooks in HOOKS:
            getattr(part, hooks).clear()
    for parameter in own.parameters():  # a fresh model's zeros would hide a difference
        parameter.copy_(0.1 * random(*parameter.shape))
    ours = copy.deepcopy(own)
    _swap_class(ours, kind, "eager")
    tokens = attention.relative_position_index.shape[0]
    channels = attention.proj.weight.shape[0]
    x, temb = random(2, tokens, channels), random(2, channels)
    differences, said = [], set(_warned)
    for training in (False, True):
        results = []
        for twin in (own, ours):
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                results.append(twin.train(training)(x, temb))
        largest = (results[0] - results[1]).abs().max() / results[0].abs().max()
        differences.append(float(largest))
    _warned.intersection_update(said)  # what a trial says does not count as said
    return differences


def _kind(module: nn.Module) -> tuple:
    """What two modules must share to behave alike, parameters' values aside."""
    return tuple(
        (
            name,
            type(part),
            tuple((k, _identity(v)) for k, v in sorted(vars(part).items()) if k not in MODULE_VARS),
            tuple((k, tuple(v.shape)) for k, v in part.named_parameters(recurse=False)),
            tuple((k, _identity(v)) for k, v in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _identity(value: object) -> object:
    """Equal for equal plain values and tensors; for anything else, the object's own."""
    if isinstance(value, bool | int | float | str | tuple | None):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return tuple(value.shape), hash(value.detach().cpu().contiguous().numpy().tobytes())
    return id(value)
