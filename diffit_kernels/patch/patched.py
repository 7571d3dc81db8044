"""The classes of patched modules: each its own class, with another forward and nothing else."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffit_kernels import fused, shifted_windows
from diffit_kernels.patch import structures
from diffit_kernels.patch.structures import Structure

LARGEST_SIDE = 32  # of a window, for the kernels that are not for CPUs


@dataclass(frozen=True)
class Findings:
    """What the trial of a module showed beside that it may be patched.

    Attributes:
        random_training: its training drops something that the fused forward does not.
        masks: its second argument is a mask, and that of shifted windows is served.
    """

    random_training: bool = False
    masks: bool = False


@dataclass(frozen=True)
class Patch:
    """What a patched class knows: its ``original``, and how the fused forward takes it apart.

    ``names`` and ``defaults`` are of the original forward's arguments; the fused one takes the
    first ``taken`` of them.
    """

    original: type
    structure: Structure
    findings: Findings
    names: tuple[str, ...]
    defaults: tuple[object, ...]
    taken: int


class Patched:
    """Marks a patched class. Its modules have one more attribute, ``_diffit_backend``."""

    _diffit: ClassVar[Patch]

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the original and how to make it.
        patch = self._diffit
        return _rebuild, (patch.original, patch.structure, patch.findings), self.__getstate__()

    def __getstate__(self):
        getstate = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        return getstate() if getstate else self.__dict__


class PatchedAttention(Patched):
    """proj_drop(proj(attention(qkv(x) + qkv_temb(temb)))), a window a row; or with Swin's mask."""

    def forward(self, *args, **kwargs):
        x, second, others = _arguments(self, args, kwargs)
        parts = self._diffit.structure.parts(self)
        temb, mask = (second, None) if self._diffit.structure.takes_time else (None, second)
        reason = (
            _own_forward_reason(self, x, others)
            or _dropout_reason(self)
            or _shape_reason(x, temb, parts.window_size)
            or _size_reason(self, x, parts)
        )
        rectangles = None
        if mask is not None and reason is None:
            rectangles = shifted_windows.find(mask, parts.window_size)
            if rectangles is None or len(x) % rectangles.windows or mask.device != x.device:
                reason = "its mask is not that of the shifted windows of whole images"
        if reason:
            _warn_once(self, reason)
            return super().forward(*args, **kwargs)
        if rectangles is None:
            out = fused.attention(parts, x, temb, backend=self._diffit_backend)
        else:
            out = shifted_windows.attention(parts, x, rectangles, backend=self._diffit_backend)
        dropout = getattr(self, "proj_drop", None)
        return out if dropout is None else dropout(out)


class PatchedBlock(Patched):
    """x̂ = x + attn(norm1(x), c);  x̂ + mlp(norm2(x̂)), modulated by c if there is a modulation."""

    def forward(self, *args, **kwargs):
        x, temb, others = _arguments(self, args, kwargs)
        structure = self._diffit.structure
        reason = _own_forward_reason(self, x, others) or _shape_reason(x, None, structure.window)
        modulation = None
        if structure.modulation is not None:  # else the attention judges the time token
            modulation = getattr(self, structure.modulation)
            reason = reason or _modulation_reason(x, temb)
        if reason:
            _warn_once(self, reason)
            return super().forward(*args, **kwargs)

        def attend(h: Tensor) -> Tensor:
            attention = getattr(self, structure.attention)
            return attention(h, temb) if structure.of_attention.takes_time else attention(h)

        parts = fused.BlockParts(self.norm1, attend, self.norm2, self.mlp, modulation)
        return fused.block(parts, x, temb, backend=self._diffit_backend)


class PatchedFinalLayer(Patched):
    """linear(norm_final(x) (1 + scale) + shift)."""

    def forward(self, *args, **kwargs):
        x, temb, others = _arguments(self, args, kwargs)
        reason = _own_forward_reason(self, x, others) or _modulation_reason(x, temb)
        if reason:
            _warn_once(self, reason)
            return super().forward(*args, **kwargs)
        shift, scale = self.adaLN_modulation(temb).chunk(2, -1)
        backend = self._diffit_backend
        _, h = fused.residual_norm(self.norm_final, x, None, None, shift, scale, backend=backend)
        return fused.project(self.linear, h, backend=backend)


KINDS = {
    structures.Attention: PatchedAttention,
    structures.Block: PatchedBlock,
    structures.FinalLayer: PatchedFinalLayer,
}


def swap_class(
    module: nn.Module, structure: Structure, findings: Findings, backend: str | None
) -> None:
    """Patch a module, in place."""
    module.__class__ = _patched_class(type(module), structure, findings)
    module._diffit_backend = backend


def give_back(module: nn.Module) -> None:
    """Undo :func:`swap_class`, in place."""
    module.__class__ = module._diffit.original
    del module._diffit_backend


@functools.cache
def _patched_class(original: type, structure: Structure, findings: Findings) -> type:
    kind, arguments = KINDS[type(structure)], structures.arguments(original)
    names = tuple(argument.name for argument in arguments)
    defaults = tuple(argument.default for argument in arguments)
    taken = 1 + (structure.takes_time or findings.masks)
    patch = Patch(original, structure, findings, names, defaults, taken)
    return type(f"Patched{original.__name__}", (kind, original), {"_diffit": patch})


def _rebuild(original: type, structure: Structure, findings: Findings) -> nn.Module:
    cls = _patched_class(original, structure, findings)
    return cls.__new__(cls)


def _arguments(
    module: Patched, args: tuple, kwargs: dict
) -> tuple[Tensor | None, Tensor | None, bool]:
    """(tokens, what comes second, whether more was given), by position or by name."""
    names, taken = module._diffit.names, module._diffit.taken
    given = dict(zip(names, args, strict=False)) | kwargs
    defaults = dict(zip(names, module._diffit.defaults, strict=True))
    others = len(args) > len(names)
    for name, value in given.items():
        if name not in names[:taken]:
            others = others or not (value is None or value is defaults.get(name))
    second = given.get(names[1]) if taken > 1 else None
    return given.get(names[0]), second, others


def _own_forward_reason(module: Patched, x: Tensor | None, others: bool) -> str | None:
    """Why a call must take the module's own forward, if it must."""
    if others:
        return "it was called with further arguments"
    if not isinstance(x, Tensor) or x.dim() != 3:
        return "its input is not of shape (rows, tokens, channels)"
    patch = module._diffit
    if module.training and patch.findings.random_training:
        return "its training drops something that the fused forward does not"
    called = patch.structure.called
    idle = (part for name, part in module.named_children() if name not in called)
    if any(fused.is_touched(part) for child in idle for part in child.modules()):
        return "there is a hook on a part that the fused forward does not call"
    return None


def _dropout_reason(module: nn.Module) -> str | None:
    dropout = getattr(module, "attn_drop", None)
    rate = getattr(dropout, "p", dropout) or 0.0
    if module.training and rate > 0:
        return f"attention dropout {rate} is on, and the fused attention has none"
    return None


def _modulation_reason(x: Tensor, temb: Tensor | None) -> str | None:
    return "it was called without a time token" if temb is None else _shape_reason(x, temb, None)


def _shape_reason(x: Tensor, temb: Tensor | None, window: tuple[int, int] | None) -> str | None:
    if window is not None and x.shape[1] != window[0] * window[1]:
        return f"its {x.shape[1]} tokens are not a window of {window[0]} x {window[1]}"
    if temb is not None and (temb.dim() != 2 or temb.shape[0] != x.shape[0]):
        return f"a time token of shape {tuple(temb.shape)} is not one per sample"
    return None


def _size_reason(module: Patched, x: Tensor, parts: fused.AttentionParts) -> str | None:
    """Without a bias, what is too large for the kernels is better off with the own forward."""
    if parts.window_size is not None or x.device.type == "cpu" or module._diffit_backend:
        return None
    sides = fused.nearly_square(x.shape[1])
    if max(sides) > LARGEST_SIDE:
        return (
            f"{sides[0]} x {sides[1]} tokens are more than a window of the kernels for its device"
        )
    return None


_warned: set[tuple[type, str]] = set()


def _warn_once(module: Patched, reason: str) -> None:
    original = module._diffit.original
    if torch.compiler.is_compiling() or (original, reason) in _warned:
        return
    _warned.add((original, reason))
    warnings.warn(
        f"{original.__name__} runs its own forward instead of the fused one: {reason}.",
        RuntimeWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context nothing is warned of, and what would have been still will be later."""
    said = set(_warned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    _warned.intersection_update(said)
