"""In which numbers a model computes: dtypes, TF32 products, 8-bit weights."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from diffit_kernels import fp8_linear, fused
from diffit_kernels.block import DiffiTBlock, check_choice
from diffit_kernels.fp8_linear import Fp8Linear

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.bfloat16,
}
PRECISIONS = tuple(DTYPES)
CAPABILITIES = {"tf32": (8, 0), "fp8": (8, 9)}  # the first of NVIDIA's with such products
LARGE_LAYERS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of parameters and activations: float32 for tf32, and bfloat16 for fp8.

    Raises:
        ValueError: an unknown ``precision``.
    """
    check_choice("precision", precision, PRECISIONS)
    return DTYPES[precision]


def refusal(precision: str, device: torch.device | str) -> str | None:
    """Why a device has no such products, or None.

    tf32 needs an NVIDIA GPU of compute capability 8.0, fp8 of 8.9; the others run anywhere.

    Raises:
        ValueError: an unknown ``precision``.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision not in CAPABILITIES:
        return None
    device, found, needed = torch.device(device), str(device), CAPABILITIES[precision]
    if device.type == "cuda" and torch.version.hip is not None:
        found += " of ROCm"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= needed:
            return None
        found += " of {}.{}".format(*capability)
    return (
        f"{precision} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or more, "
        f"got {found}"
    )


def apply_precision(model: nn.Module, precision: str) -> nn.Module:
    """Make ``model`` compute in ``precision``, in place, and return it.

    fp8 replaces four layers of every :class:`~diffit_kernels.block.DiffiTBlock`, qkv, proj, fc1 and
    fc2, by :class:`~diffit_kernels.fp8_linear.Fp8Linear`; all else is bfloat16. A layer whose sizes
    are no multiples of 16 stays, and so does one with a hook or of another class. For tf32 the
    model must also run within :func:`products`.

    Raises:
        ValueError: an unknown ``precision``; the model's device has no such products; the model has
            8-bit layers already; or, for fp8, it is in training mode or has no layer to replace.
    """
    dtype = dtype_of(precision)
    if reason := refusal(precision, next(model.parameters()).device):
        raise ValueError(reason)
    if any(isinstance(part, Fp8Linear) for part in model.modules()):
        raise ValueError(f"{precision}: layers of the model are fp8 already; load it anew")
    if precision == "fp8" and model.training:
        raise ValueError("fp8 is for inference, got a model in training mode; call eval()")
    if precision == "fp8":
        _replace_large_layers(model)
    return model.to(dtype)


def _replace_large_layers(model: nn.Module) -> None:
    blocks = [part for part in model.modules() if isinstance(part, DiffiTBlock)]
    layers = ((getattr(block, part), name) for block in blocks for part, name in LARGE_LAYERS)
    served = [(owner, name) for owner, name in layers if _is_served(getattr(owner, name, None))]
    if not served:
        raise ValueError(
            "fp8 needs blocks whose linear layers have sizes that are multiples of "
            f"{fp8_linear.MULTIPLE}, got none in {len(blocks)} blocks of {type(model).__name__}"
        )
    for owner, name in served:
        setattr(owner, name, Fp8Linear(getattr(owner, name)))


def _is_served(layer: nn.Module | None) -> bool:
    plain = type(layer) is nn.Linear and not fused.is_touched(layer)
    return plain and fp8_linear.refusal(layer) is None


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the context float32 products are so for "float32", and CUDA's are TF32 for "tf32".

    They are those of matrices, of convolutions, and of our own kernels. Other precisions leave the
    process's settings alone. Afterwards these are what they were.

    Raises:
        ValueError: an unknown ``precision``.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision not in ("float32", "tf32"):
        yield
        return
    before, older = [setting.fp32_precision for setting in _settings()], _older_settings()
    if precision == "tf32":
        within = ["tf32", "tf32", "tf32", before[-1]]
        older_within = older and ("high" if older[0] == "highest" else older[0], True)
    else:
        within, older_within = ["ieee"] * len(before), older and ("highest", False)
    try:
        _set(older_within, within)
        yield
    finally:
        _set(older, before)


# torch keeps the choice under older names too, and raises, in torch.compile say, where both are set
# and disagree. So both are set; where they disagree from the start, the newer names alone.
def _settings() -> tuple:
    """Who has an ``fp32_precision``: CUDA's products, and last CPUs', which the older names set."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return cuda.matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul


def _older_settings() -> tuple[str, bool] | None:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set(older: tuple[str, bool] | None, precisions: Sequence[str]) -> None:
    if older is not None:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
    for setting, precision in zip(_settings(), precisions, strict=True):
        setting.fp32_precision = precision
