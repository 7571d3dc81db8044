"""The fused ops inside models we did not write.

Modules are recognised by structure, not by class name or import (:mod:`structures`): an attention
by its parts and the shapes of its parameters, a block by being that attention between two norms
and an MLP. Then each is tried (:mod:`trial`): a copy's own forward and the fused one must agree in
float64. A module that passes is given a subclass of its own class, with another ``forward`` and
nothing else (:mod:`patched`): parameters, buffers, hooks, state dict and optimiser state stay the
very same objects, and ``unpatch`` gives the class back.
"""

from torch import nn

from diffit_kernels.dispatch import check_backend
from diffit_kernels.patch import structures
from diffit_kernels.patch.patched import Findings, Patched, PatchedAttention, give_back, swap_class
from diffit_kernels.patch.trial import Trials

__all__ = ["patch", "unpatch"]


def patch(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Run a model's attentions, and the blocks around them, through the fused ops; in place.

    Served, each with or without any of what is in brackets:

    - attention: ``proj(softmax(q kᵀ · scale [+ B]) v)``, q, k, v = ``qkv(x)`` [+ ``qkv_temb(c)``],
      as in DiffiT, DiT, Swin and MDT. Tokens are (windows, L, C); a call with Swin's mask of
      shifted windows is served, any other mask takes the module's own forward;
    - block: ``norm1``, ``attn``, ``norm2``, ``mlp`` [and ``adaLN_modulation``], which compute
      x̂ = x + attn(norm1(x)), x̂ + mlp(norm2(x̂)) [with adaLN-Zero's shifts, scales and gates];
    - final layer: ``norm_final``, ``linear`` and ``adaLN_modulation``.

    With attention dropout, training keeps the module's own forward. Patching twice changes only
    the backend.

    Args:
        model: any module that contains such attentions, or is one.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no attention that can be patched; the message says what was looked for,
            and which candidates failed for what reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    trials, refused, found = Trials(), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Patched):
            continue
        structure = structures.attention_of(module)
        if isinstance(structure, structures.Attention):
            result = trials.of(module, structure)
        else:
            result = structure
        if isinstance(result, Findings):
            found[module] = structure, result
        elif result is not None:
            refused.setdefault(result, []).append(name or "the model itself")
    patched = [module for module in model.modules() if isinstance(module, Patched)]
    if not found and not any(isinstance(module, PatchedAttention) for module in patched):
        raise ValueError(
            f"patch: found no attention to patch. Looked for {structures.LOOKED_FOR}; near misses: "
            f"{_in_words(refused)}."
        )
    for module in patched:
        module._diffit_backend = backend
    for module, (structure, findings) in found.items():
        swap_class(module, structure, findings, backend)
    attentions = {
        module: module._diffit.structure
        for module in model.modules()
        if isinstance(module, PatchedAttention)
    }
    for module in model.modules():
        if isinstance(module, Patched):
            continue
        structure = structures.block_of(module, attentions) or structures.final_layer_of(module)
        if structure is None:
            continue
        result = trials.of(module, structure)
        if isinstance(result, Findings):
            swap_class(module, structure, result, backend)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module in ``model`` its own class back, in place; returns ``model``.

    Raises:
        ValueError: a module was parametrized after it was patched; nothing is changed then.
    """
    patched = [module for module in model.modules() if isinstance(module, Patched)]
    for module in patched:
        if "_diffit" not in vars(type(module)):
            raise ValueError(
                f"unpatch: {type(module).__name__} was parametrized after patching; "
                "remove its parametrizations first"
            )
    for module in patched:
        give_back(module)
    return model


def _in_words(refused: dict[str, list[str]]) -> str:
    """Each reason once, after the first module that it is of."""
    return (
        "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in refused.items()
        )
        or "none"
    )
