"""Checkpoints: reading what users have, whole or not at all, and writing what that reads.

The configuration of a latent model is inferred from the shapes of its tensors. An image-space
model's file says it in its metadata, or the user does, as far as shapes do not.
"""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffit_kernels import checkpoint_image, checkpoint_latent
from diffit_kernels.block import TimeDependentAttention
from diffit_kernels.checkpoint_files import (
    Tensors,
    first_line,
    listing,
    open_checkpoint,
    read_metadata,
    resolve,
    written_aside,
)
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.ops.checks import FLOAT_DTYPES
from diffit_kernels.positions import relative_position_index


def from_pretrained(
    path_or_hub_id: str | os.PathLike,
    filename: str | None = None,
    *,
    config: Mapping | None = None,
    use_fused_tmsa: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> DiffiT | ImageDiffiT:
    """Load a DiffiT from a file, a folder or a hub repository, ready to sample (``eval``).

    Which one it is, its conditioning, and whether it has a position bias are seen from the names of
    its tensors; so DiT's checkpoints are read too, and image-space ones of an independent
    implementation, whose names are translated.

    Args:
        path_or_hub_id: a ``.safetensors`` file or one that ``torch.save`` wrote; a folder with
            such a file; a hub id such as ``"nvidia/DiffiT"`` (needs the ``hub`` extra); or
            ``"digits"`` or ``"image_digits"``, the small models that come with the package, also
            where a folder has that name (``"./digits"`` is the folder). The tensors of a file may
            lie bare or under "ema", "model" or "state_dict" (looked for in this order), with the
            prefixes "module." and "_orig_mod.".
        filename: which file of the folder or repository; needed where there are several.
        config: constructor arguments of the model, which overrule what the file tells. Needed are
            "num_heads" for a latent model without position bias of another width than DiT's; and
            what shapes do not tell of an image-space model, unless :func:`save_pretrained` wrote
            the file: "image_size", and for one with our names also "num_groups", "norm_eps" and
            "gelu".
        use_fused_tmsa, backend: as for :class:`~diffit_kernels.model.DiffiT`.
        device: where to put the model; default the CPU.
        dtype: floating-point type of the model; default the file's own (float32 for mixed ones).

    Raises:
        FileNotFoundError: no such file.
        TypeError: ``dtype`` is no floating-point type, or ``config`` has what the model does not
            take.
        ValueError: the file is corrupt, is no DiffiT, needs pickled code, lacks configuration, or
            has missing, unexpected or misshapen keys; the message names them. No model is returned
            then.
        ImportError: a hub id without huggingface_hub installed.
    """
    if dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(f"from_pretrained: dtype must be one of {FLOAT_DTYPES}, got {dtype!r}")
    _check_device(device)
    path = resolve(path_or_hub_id, filename)
    with open_checkpoint(path) as tensors:
        if checkpoint_image.is_image_diffit(tensors.shapes):
            tensors, known = checkpoint_image.translated(tensors, saved_config(path), path)
            kind, infer = ImageDiffiT, checkpoint_image.infer_config
        else:
            kind, known, infer = DiffiT, {}, checkpoint_latent.infer_config
        _check_config(kind, config or {})
        arguments = infer(tensors.shapes, path, known | dict(config or {}))
        with torch.device("meta"):
            try:
                model = kind(**arguments, use_fused_tmsa=use_fused_tmsa)
            except ValueError as error:
                raise ValueError(f"{path} makes no {kind.__name__}: {error}") from error
        model.backend = backend
        _check_keys(model, tensors, path)
        state = _read(model, tensors, path, device, dtype)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)  # indices were checked, and are derived
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    return model.eval()


def save_pretrained(
    model: DiffiT | ImageDiffiT,
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of the model's state dict, complete at ``path`` or not at all.

    The file of an image-space model holds its configuration as metadata, beside ``metadata``; a
    latent one's is the published format, whose shapes tell it.

    Raises:
        TypeError: ``model`` is neither, but a wrapper of one, say.
    """
    from safetensors.torch import save

    if not isinstance(model, DiffiT | ImageDiffiT):
        raise TypeError(
            f"save_pretrained: model must be a DiffiT or an ImageDiffiT, got {type(model).__name__}"
        )
    metadata = dict(metadata or {})
    if isinstance(model, ImageDiffiT):
        metadata["config"] = json.dumps(model.config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with written_aside(Path(path)) as file:
        file.write(save(state, metadata or None))


def saved_config(path: Path) -> dict:
    """The configuration in the metadata of a file; empty if there is none."""
    text = read_metadata(path).get("config", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: config in its metadata is no JSON object: {text!r}") from error


def _check_config(kind: type, config: Mapping) -> None:
    """Raise TypeError if ``config`` has what the model does not take."""
    known = set(inspect.signature(kind).parameters) - {"use_fused_tmsa", "backend"}
    if unknown := [name for name in config if name not in known]:
        raise TypeError(f"from_pretrained: config has {unknown}, which {kind.__name__} has not")


def _check_device(device: torch.device | str | None) -> None:
    """Raise ValueError unless tensors can be put on ``device``."""
    try:
        meta = device is not None and torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from error
    if meta:
        raise ValueError("device 'meta' holds no weights")


def _read(
    model: nn.Module,
    tensors: Tensors,
    path: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The parameters' values, of one dtype."""
    state, dtypes = {}, set()
    for name, _ in model.named_parameters():
        value = tensors.load(name)
        if not value.is_floating_point():
            raise ValueError(f"{path}: weights must be floating point, {name} is {value.dtype}")
        dtypes.add(value.dtype)
        state[name] = value.to(device=device, dtype=dtype, copy=True)
    if dtype is None and not dtypes <= set(FLOAT_DTYPES):
        raise ValueError(f"{path}: weights are {dtypes}; give dtype=, one of {FLOAT_DTYPES}")
    if dtype is None and len(dtypes) > 1:
        state = {name: value.float() for name, value in state.items()}
    return state


def _check_keys(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Names and shapes against the model's, and the values of every index; one error for all."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = tensors.shapes
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "misshapen": [
            f"{name} {shapes[name]} instead of {expected[name]}"
            for name in expected
            if name in shapes and shapes[name] != expected[name]
        ],
    }
    if not any(problems.values()):
        problems["with values of another window layout"] = [
            name
            for name, window_size in _indices(model).items()
            if not torch.equal(
                tensors.load(name).long(),
                relative_position_index(window_size, torch.device("cpu")),
            )
        ]
    if any(problems.values()):
        found = "; ".join(f"{kind}: {listing(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{path} does not fit a {type(model).__name__}, nothing was loaded. {found}"
        )


def _indices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The window of every index of a bias table in the state dict."""
    return {
        f"{name}.relative_position_index": part.window_size
        for name, part in model.named_modules()
        if isinstance(part, TimeDependentAttention)
        and part.relative_position_bias_table is not None
    }
