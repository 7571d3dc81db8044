"""Argument checks shared by the ops: each error names the argument, the rule and the value."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    op: str, name: str, value: object, *shape: int | None, like: Tensor, narrower: bool = False
) -> None:
    """Check that ``value`` is a tensor of ``shape`` (None: any length) on the device of ``like``.

    Its dtype must be that of ``like``, or float32 beside a half-precision ``like``: parameters may
    be kept in more precision than activations. With ``narrower``, half precision beside float32
    too: what autocast's products give.

    Raises:
        TypeError: not a tensor, or not of an accepted dtype.
        ValueError: wrong shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    wanted = {like.dtype} | ({torch.float32} if like.dtype.itemsize == 2 else set())
    if narrower and like.dtype != torch.float64:
        wanted = set(FLOAT_DTYPES[1:])
    if value.dtype not in wanted:
        raise TypeError(f"{op}: {name} must be {_names(wanted)}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
    fits = value.dim() == len(shape) and all(
        rule is None or size == rule for size, rule in zip(value.shape, shape, strict=True)
    )
    if not fits:
        rule = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape ({rule}), got {tuple(value.shape)}")


def check_activation(op: str, name: str, value: object, layout: str) -> None:
    """Check that ``value`` is a floating-point tensor with the dimensions of ``layout``, "B N C".

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: wrong number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be {_names(FLOAT_DTYPES)}, got {value.dtype}")
    dims = layout.split()
    if value.dim() != len(dims):
        raise ValueError(
            f"{op}: {name} must have {len(dims)} dimensions ({', '.join(dims)}), "
            f"got shape {tuple(value.shape)}"
        )


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating-point tensors to the autocast dtype where autocast is on, as a matmul does."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT_DTYPES[1:] else t for t in tensors
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 where the data are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _names(dtypes) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
