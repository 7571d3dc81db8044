"""Reading the checkpoints users have, whole or not at all.

safetensors files are memory-mapped; ``.pt`` files are read with ``weights_only=True``, so no pickle
is ever executed. The configuration is inferred from the shapes of the tensors.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffit_kernels.model import DiffiT
from diffit_kernels.ops.checks import FLOAT_DTYPES
from diffit_kernels.positions import relative_position_index

WRAPPERS = ("ema", "model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN_KEYS = 8
DIGITS = Path(__file__).parent / "checkpoints" / "digits.safetensors"

# What decides the configuration; a file without one of these is no latent DiffiT.
LANDMARKS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
TABLE = "blocks.0.attn.relative_position_bias_table"
TIME_TOKEN = "blocks.0.attn.qkv_temb.weight"
MODULATION = "blocks.0.adaLN_modulation.1.weight"
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width; without a table no shape tells


def from_pretrained(
    path_or_hub_id: str | os.PathLike,
    filename: str | None = None,
    *,
    use_fused_tmsa: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    num_heads: int | None = None,
) -> DiffiT:
    """Load a latent DiffiT from a file, a folder or a hub repository, ready to sample (``eval``).

    Its conditioning, and whether it has a position bias, are seen from the names of its tensors; so
    DiT's checkpoints are read too.

    Args:
        path_or_hub_id: a ``.safetensors`` file or one that ``torch.save`` wrote; a folder with
            such a file; a hub id such as ``"nvidia/DiffiT"`` (needs the ``hub`` extra); or
            ``"digits"``, the small model that comes with the package, also where a folder has that
            name (``"./digits"`` is the folder). The tensors of a file may lie bare or
            under "ema", "model" or "state_dict" (looked for in this order), with the prefixes
            "module." and "_orig_mod.".
        filename: which file of the folder or repository; needed where there are several.
        use_fused_tmsa, backend: as for :class:`~diffit_kernels.model.DiffiT`.
        device: where to put the model; default the CPU.
        dtype: floating-point type of the model; default the file's own (float32 for mixed ones).
        num_heads: attention heads, where no position bias tells them; default those of the
            published DiT of the same width.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, is no DiffiT, needs pickled code, or has missing,
            unexpected or misshapen keys; the message names them. No model is returned then.
        ImportError: a hub id without huggingface_hub installed.
    """
    if dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(f"from_pretrained: dtype must be one of {FLOAT_DTYPES}, got {dtype!r}")
    _check_device(device)
    path = resolve(path_or_hub_id, filename)
    with open_checkpoint(path) as tensors:
        config = infer_config(tensors, path, num_heads)
        with torch.device("meta"):
            try:
                model = DiffiT(**config, use_fused_tmsa=use_fused_tmsa)
            except ValueError as error:
                raise ValueError(f"{path} is no latent DiffiT: {error}") from error
            model.backend = backend
        _check_keys(model, tensors, path)
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
    model.load_state_dict(state, strict=False, assign=True)  # the index was checked, and is derived
    model.pos_embed.requires_grad_(False)
    return model.eval()


def _check_device(device: torch.device | str | None) -> None:
    """Raise ValueError unless tensors can be put on ``device``."""
    try:
        meta = device is not None and torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    if meta:
        raise ValueError("device 'meta' holds no weights")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def resolve(path_or_hub_id: str | os.PathLike, filename: str | None = None) -> Path:
    """The checkpoint file that the arguments of :func:`from_pretrained` name."""
    if path_or_hub_id == "digits":
        return DIGITS
    path = Path(path_or_hub_id)
    if path.is_dir():
        names = [p.name for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
        return path / _choose(names, filename, f"folder {path}")
    if path.is_file():
        if filename is not None:
            raise ValueError(f"from_pretrained: {path} is a file: filename={filename!r} has no use")
        return path
    if HUB_ID.fullmatch(str(path_or_hub_id)) and path.suffix not in SUFFIXES:
        return _download(path_or_hub_id, filename)
    raise FileNotFoundError(
        f"from_pretrained: no such file or folder: {path}; a hub id looks like 'owner/name'"
    )


def _choose(names: list[str], filename: str | None, place: str) -> str:
    if filename is None and len(names) == 1:
        return names[0]
    if filename in names:
        return filename
    wish = "say which with filename=" if filename is None else f"has no {filename!r}"
    raise ValueError(f"from_pretrained: {place}: {wish}; checkpoints in it: {names or 'none'}")


def _download(hub_id: str, filename: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: no local file {hub_id!r}, and reading it from the hub needs "
            "huggingface_hub: pip install 'diffit-kernels[hub]'"
        ) from error
    try:
        files = huggingface_hub.list_repo_files(hub_id) if filename is None else [filename]
        names = [name for name in files if name.endswith(SUFFIXES)]
        filename = _choose(names, filename, f"hub repository {hub_id}")
        return Path(huggingface_hub.hf_hub_download(hub_id, filename))
    except ValueError:
        raise
    except Exception as error:  # which classes depends on the hub client's version and transport
        raise OSError(
            f"from_pretrained: {hub_id!r} is no local path, and the hub did not give "
            f"{filename or 'its list of files'}: {_first_line(error)}"
        ) from error


class Tensors:
    """A checkpoint's tensors under their bare names: shapes at once, data on demand."""

    def __init__(self, names: Mapping[str, str], shape_of, load):
        self._names, self._load = dict(names), load
        self.shapes = {bare: tuple(shape_of(stored)) for bare, stored in self._names.items()}

    def load(self, name: str) -> Tensor:
        return self._load(self._names[name])


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Tensors]:
    """The tensors of a file, read as far as needed.

    Raises:
        ValueError: the file is empty, truncated, or of neither format, or holds no tensors.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        with _open_safetensors(path) as tensors:
            yield tensors
    else:
        state = _read_pickle(path)
        yield Tensors(_bare_names(state), lambda name: state[name].shape, state.__getitem__)


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error
    with file:
        names = _bare_names(file.keys())
        yield Tensors(names, lambda name: file.get_slice(name).get_shape(), file.get_tensor)


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a file that torch.save wrote, taken out of its wrapper."""
    import pickle
    import zipfile

    try:
        mmap = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is corrupt, or holds more than tensors and could only be read by executing "
            "its pickled code, which is never done. Save the state dict alone, best with "
            "safetensors.torch.save_file."
        ) from error
    except Exception as error:  # damage surfaces as almost any exception of the reader
        raise ValueError(f"{path} is no intact torch.save file: {_first_line(error)}") from error
    state = _unwrap(content)
    if not state:
        mapping = isinstance(content, Mapping)
        found = _list(sorted(map(str, content))) if mapping else f"a {type(content).__name__}"
        raise ValueError(
            f"{path} holds no state dict, neither bare nor under {WRAPPERS}; "
            f"it holds {found or 'nothing'}"
        )
    return state


def _unwrap(content: object, depth: int = 4) -> dict[str, Tensor]:
    """The tensors under the first wrapper that has some, else the bare ones."""
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    for wrapper in WRAPPERS:
        inner = _unwrap(content.get(wrapper), depth - 1)
        if inner:
            return inner
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and not value.is_meta
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _bare_names(stored) -> dict[str, str]:
    """Bare name -> stored name; wrappers and prefixes come off in any order and number.

    Where a file holds several wrapped state dicts, the first of :data:`WRAPPERS` wins.
    """
    stored = list(stored)
    for wrapper in WRAPPERS:
        wrapped = [name for name in stored if name.startswith(f"{wrapper}.")]
        if wrapped:
            pairs = [(_strip(name.removeprefix(f"{wrapper}.")), name) for name in wrapped]
            break
    else:
        pairs = [(_strip(name), name) for name in stored]
    names = dict(pairs)
    doubled = sorted({bare for bare, name in pairs if names[bare] != name})
    if doubled:
        raise ValueError(
            f"the checkpoint has keys twice, with and without {PREFIXES}: {_list(doubled)}"
        )
    return names


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def infer_config(
    tensors: Tensors, path: Path | str = "checkpoint", num_heads: int | None = None
) -> dict:
    """The constructor arguments of :class:`DiffiT` that give the checkpoint's shapes.

    ``num_classes`` takes the last row of the label table for the null class. ``num_heads`` is for
    checkpoints without a position bias, see :func:`from_pretrained`.

    Raises:
        ValueError: a tensor that decides the configuration is missing or of the wrong rank, or
            ``num_heads`` is needed, or is not that of the bias table.
    """
    shapes = tensors.shapes
    wrong = [
        name
        for name, rank in LANDMARKS.items()
        if len(shapes.get(name, ())) != rank or 0 in shapes[name]
    ]
    wrong += [TABLE] if TABLE in shapes and len(shapes[TABLE]) != 2 else []
    wrong += [] if TIME_TOKEN in shapes or MODULATION in shapes else [TIME_TOKEN]
    if wrong:
        raise ValueError(
            f"{path} is no latent DiffiT: it lacks {_list(wrong)} (or has them in another rank); "
            f"it has {_list(sorted(shapes))}"
        )
    _, tokens, hidden_size = shapes["pos_embed"]
    _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{path}: pos_embed must have a square number of tokens, got {tokens}")
    out_channels = shapes["final_layer.linear.weight"][0] // patch_size**2
    mlp_hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    mlp_ratio = mlp_hidden / hidden_size
    if int(hidden_size * mlp_ratio) != mlp_hidden:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    blocks = {name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)}
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "num_heads": _num_heads(shapes, hidden_size, num_heads, path),
        "mlp_ratio": mlp_ratio,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": out_channels != in_channels,
        "conditioning": _conditioning(shapes),
        "position_bias": TABLE in shapes,
    }


def _conditioning(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if MODULATION not in shapes:
        return "tmsa"
    return "tmsa+adaln" if TIME_TOKEN in shapes else "adaln_zero"


def _num_heads(
    shapes: Mapping[str, tuple[int, ...]], hidden_size: int, given: int | None, path: Path | str
) -> int:
    """From the bias table, else as given, else DiT's of this width."""
    if TABLE in shapes:
        heads = shapes[TABLE][1]
        if given not in (None, heads):
            raise ValueError(f"{path}: num_heads={given}, but its bias table is for {heads} heads")
        return heads
    heads = DIT_HEADS.get(hidden_size) if given is None else given
    if heads is None:
        raise ValueError(
            f"{path} has no position bias that would tell its heads, and is no DiT of a published "
            f"width ({', '.join(map(str, DIT_HEADS))}), but of {hidden_size}: give num_heads="
        )
    return heads


def _check_keys(model: DiffiT, tensors: Tensors, path: Path) -> None:
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
        index = relative_position_index(model.blocks[0].attn.window_size, torch.device("cpu"))
        problems["with values of another window layout"] = [
            name
            for name in expected
            if name.endswith("relative_position_index")
            and not torch.equal(tensors.load(name).long(), index)
        ]
    if any(problems.values()):
        listing = "; ".join(f"{kind}: {_list(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit a latent DiffiT, nothing was loaded. {listing}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more
