"""Precomputed latents on disk, memory-mapped, and the order in which training reads them.

The letters: N samples; C channels and S side of a latent.
"""

import functools
import hashlib
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

LATENTS, LABELS = ("latents", "arr_0"), ("labels", "arr_1")  # names, first found first taken
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; the lengths of its name and extra field


class Latents:
    """N latents and their labels, from one .npz file or a folder of safetensors shards.

    An .npz file has ``latents`` and ``labels``, or ``arr_0`` and ``arr_1`` as ``diffit-kernels
    sample`` writes them; each .safetensors file of a folder has ``latents`` and ``labels``, and the
    shards follow one another in the order of their names. Latents are (N, C, S, S) of any floating
    type, labels (N,) integers. Shards, and .npz files that are not compressed, are memory-mapped:
    what lies in memory is the labels, and the samples that are asked for. A compressed .npz file is
    read whole.

    Args:
        path: the file or folder.
        scale: factor that brings the latents to the model's scale.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: a file is damaged, or lacks a key, or has another shape or type than above, or
            another C or S than the shard before it; the message names the file.
    """

    def __init__(self, path: Path, scale: float = 1.0):
        if path.is_dir():
            paths = sorted(path.glob("*.safetensors"))
            if not paths:
                raise FileNotFoundError(f"{path}: the folder has no .safetensors files")
        elif path.is_file():
            paths = [path]
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
        self.path, self.scale = path, scale
        self._shards: list[Tensor | np.ndarray] = []
        labels = []
        for file in paths:
            shard, shard_labels = _read_shard(file)
            if self._shards and shard.shape[1:] != self._shards[0].shape[1:]:
                raise ValueError(
                    f"{file}: latents must be {tuple(self._shards[0].shape[1:])} like those of "
                    f"{paths[0].name}, got {tuple(shard.shape[1:])}"
                )
            self._shards.append(shard)
            labels.append(shard_labels)
        self.labels = torch.cat(labels)  # (N,) int64
        self._ends = torch.tensor([len(shard) for shard in self._shards]).cumsum(0)
        if not len(self):
            raise ValueError(f"{path}: there are no latents in it")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return tuple(self._shards[0].shape[1:])

    @property
    def fingerprint(self) -> str:
        """What tells these latents from others at little cost: N, C, S and the labels."""
        digest = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()[:12]
        return f"{'x'.join(map(str, (len(self), *self.shape)))}, labels {digest}"

    def check_labels(self, num_classes: int) -> None:
        """Raise ValueError unless all labels are in 0 .. num_classes - 1."""
        first, last = int(self.labels.min()), int(self.labels.max())
        if first < 0 or last >= num_classes:
            raise ValueError(
                f"{self.path}: labels must be in 0..{num_classes - 1}, got {first}..{last}"
            )

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (B,) int64 -> (B, C, S, S) float32 and (B,) int64."""
        latents = torch.empty(len(indices), *self.shape)
        owners = torch.bucketize(indices, self._ends, right=True)
        for owner in owners.unique().tolist():
            mine, shard = owners == owner, self._shards[owner]
            begin = int(self._ends[owner]) - len(shard)
            latents[mine] = _rows(shard, indices[mine] - begin).float()
        return latents * self.scale, self.labels[indices]


def order(num_samples: int, seed: int, begin: int, end: int) -> Tensor:
    """Samples at places ``begin`` to ``end`` of an endless order: shuffled epochs in a row.

    Place p is the sample at p mod N of epoch p div N, whose permutation depends on (seed, epoch).
    Returns (end - begin,) int64.
    """
    parts = []
    while begin < end:
        epoch, place = divmod(begin, num_samples)
        part = _permutation(num_samples, seed, epoch)[place : place + end - begin]
        parts.append(part)
        begin += len(part)
    return torch.cat(parts)


def batches(
    latents: Latents, seed: int, batch_size: int, steps: range, share: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """``share`` of each step's batch, by :meth:`Latents.read`; step s takes batch_size places of
    :func:`order` from s · batch_size on. The next batch is read while one is in use."""

    def load(step: int) -> tuple[Tensor, Tensor]:
        begin = step * batch_size
        places = order(len(latents), seed, begin, begin + batch_size)
        return latents.read(places[share].contiguous())

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(load, steps.start)
        for step in steps:
            batch, following = following, reader.submit(load, step + 1)
            yield batch.result()


def seed_of(*key: int) -> int:
    """A seed that depends on the non-negative integers of ``key`` alone, and on all of them."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of :func:`seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@functools.lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=generator(seed, 0, epoch))


def _read_shard(path: Path) -> tuple[Tensor | np.ndarray, Tensor]:
    """Latents, mapped where the format allows, and labels, of one checked file."""
    try:
        latents, labels = (_open_npz if path.suffix == ".npz" else _open_safetensors)(path)
        dtype = _rows(latents.reshape(-1), torch.arange(0)).dtype
    except (zipfile.BadZipFile, SafetensorError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if latents.ndim != 4 or latents.shape[2] != latents.shape[3]:
        raise ValueError(f"{path}: latents must be (N, C, S, S), got {tuple(latents.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"{path}: latents must be floating point, got {dtype}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{path}: labels must be integers, got {labels.dtype}")
    if labels.shape != latents.shape[:1]:
        raise ValueError(
            f"{path}: labels must be ({len(latents)},), one per latent, got {tuple(labels.shape)}"
        )
    return latents, labels.long()


def _rows(shard: Tensor | np.ndarray, rows: Tensor) -> Tensor:
    """shard[rows]; a mapped array is read by numpy, as its numbers need not be aligned."""
    return shard[rows] if isinstance(shard, Tensor) else torch.from_numpy(shard[rows.numpy()])


def _open_safetensors(path: Path) -> tuple[Tensor, Tensor]:
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        return tuple(file.get_tensor(_key(names, wanted)) for wanted in (LATENTS, LABELS))


def _open_npz(path: Path) -> tuple[np.ndarray, Tensor]:
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        latents, labels = (_array(path, archive, _key(names, w)) for w in (LATENTS, LABELS))
        return latents, torch.from_numpy(np.array(labels))


def _key(names: set[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"it needs {' or '.join(wanted)}, and has {sorted(names) or 'nothing'}")


def _array(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """An array of an .npz file: mapped copy-on-write if its bytes lie there plain, else read."""
    member = archive.getinfo(f"{key}.npy")
    with archive.open(member) as entry:
        version = np.lib.format.read_magic(entry)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0", None)
        plain = member.compress_type == zipfile.ZIP_STORED and read_header is not None
        if plain:
            shape, by_column, dtype = read_header(entry)
            header_size = entry.tell()
    if not plain or by_column or dtype.hasobject or 0 in shape:
        with np.load(path, allow_pickle=False) as file:
            return file[key]
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name_size, extra_size = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = member.header_offset + LOCAL_HEADER.size + name_size + extra_size + header_size
    return np.memmap(path, dtype, "c", offset, shape)
