"""The files that hold checkpoints: where they are, and what is in them, whole or not at all.

safetensors files are memory-mapped; ``.pt`` files are read with ``weights_only=True``, so no pickle
is ever executed.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

WRAPPERS = ("ema", "model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN_KEYS = 8
PACKAGED = {
    name: Path(__file__).parent / "checkpoints" / f"{name}.safetensors"
    for name in ("digits", "image_digits")
}


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
    if path_or_hub_id in PACKAGED:
        return PACKAGED[path_or_hub_id]
    path = Path(path_or_hub_id)
    if path.is_dir():
        names = [p.name for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
        return path / _choose(names, filename, f"folder {path}")
    if path.is_file():
        if filename is not None:
            raise ValueError(f"from_pretrained: {path} is a file: filename={filename!r} has no use")
        return path
    if is_hub_id(path_or_hub_id):
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


def is_hub_id(path_or_hub_id: str | os.PathLike) -> bool:
    """Whether it is no local file or folder, and looks like 'owner/name'."""
    path = Path(path_or_hub_id)
    return (
        bool(HUB_ID.fullmatch(str(path_or_hub_id)))
        and path.suffix not in SUFFIXES
        and not path.exists()
    )


@contextlib.contextmanager
def from_hub(hub_id: str, what: str) -> Iterator[ModuleType]:
    """huggingface_hub, to fetch something with; its errors as OSError that says ``what`` is missed.

    Raises:
        ImportError: the ``hub`` extra is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: no local file {hub_id!r}, and reading it from the hub needs "
            "huggingface_hub: pip install 'diffit-kernels[hub]'"
        ) from error
    try:
        yield huggingface_hub
    except ValueError:
        raise
    except Exception as error:  # which classes depends on the hub client's version and transport
        raise OSError(
            f"from_pretrained: {hub_id!r} is no local path, and the hub did not give {what}: "
            f"{first_line(error)}"
        ) from error


def _download(hub_id: str, filename: str | None) -> Path:
    with from_hub(hub_id, filename or "its list of files") as hub:
        files = hub.list_repo_files(hub_id) if filename is None else [filename]
        names = [name for name in files if name.endswith(SUFFIXES)]
        filename = _choose(names, filename, f"hub repository {hub_id}")
    with from_hub(hub_id, filename) as hub:
        return Path(hub.hf_hub_download(hub_id, filename))


class Tensors:
    """A checkpoint's tensors under their bare names: shapes at once, data on demand."""

    def __init__(self, names: Mapping[str, str], shape_of, load):
        self._names, self._load = dict(names), load
        self.shapes = {bare: tuple(shape_of(stored)) for bare, stored in self._names.items()}

    def load(self, name: str) -> Tensor:
        return self._load(self._names[name])

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names, without those for which ``rename`` gives None."""
        names = {new: stored for bare, stored in self._names.items() if (new := rename(bare))}
        shapes = {stored: self.shapes[bare] for bare, stored in self._names.items()}
        return Tensors(names, shapes.__getitem__, self._load)


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
        raise ValueError(f"{path} is no intact torch.save file: {first_line(error)}") from error
    state = _unwrap(content)
    if not state:
        mapping = isinstance(content, Mapping)
        found = listing(sorted(map(str, content))) if mapping else f"a {type(content).__name__}"
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


def first_line(error: Exception) -> str:
    """What an error says, in short."""
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
            f"the checkpoint has keys twice, with and without {PREFIXES}: {listing(doubled)}"
        )
    return names


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def listing(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


@contextlib.contextmanager
def written_aside(path: Path):
    """A binary file that appears at ``path`` complete and synced, or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
