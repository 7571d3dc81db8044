"""An .npz of images as ``diffit-kernels sample`` writes it, read in order, never whole."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

IMAGES, LABELS = "arr_0", "arr_1"
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ImageFile:
    """``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) labels, and other arrays.

    Each array may be missing. Images are read a batch at a time, compressed or not, so that what
    lies in memory is one batch.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no .npz, or its images have another shape or type.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{self.path} is no .npz file")
        with zipfile.ZipFile(self.path) as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}
        self.shape = self._image_shape() if IMAGES in self.names else None

    def __len__(self) -> int:
        return 0 if self.shape is None else self.shape[0]

    @property
    def labels(self) -> np.ndarray | None:
        """(N,), or None if there are none."""
        return self.array(LABELS) if LABELS in self.names else None

    def array(self, name: str) -> np.ndarray:
        """One array, whole."""
        with self._reading(), np.load(self.path, allow_pickle=False) as file:
            return file[name]

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """The images in order, (B, H, W, 3) uint8 each, the last ones fewer."""
        if self.shape is None:
            raise ValueError(f"{self.path} has no images ({IMAGES}); it has {sorted(self.names)}")
        size = int(np.prod(self.shape[1:]))
        with self._reading(), self._open_images() as entry:
            _header(entry)
            for begin in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - begin)
                content = entry.read(count * size)
                if len(content) < count * size:
                    raise EOFError(f"{IMAGES} ends after {begin} of {len(self)} images")
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def _image_shape(self) -> tuple[int, ...]:
        with self._reading(), self._open_images() as entry:
            shape, by_columns, dtype = _header(entry)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or by_columns:
            raise ValueError(
                f"{self.path}: {IMAGES} must be uint8 images, (N, H, W, 3) by rows, got "
                f"{dtype} {shape}"
            )
        return shape

    @contextlib.contextmanager
    def _open_images(self) -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as entry:
            yield entry

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever the readers raise becomes a ValueError with the file's name."""
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error


def _header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether by columns, dtype)."""
    version = np.lib.format.read_magic(entry)
    if version not in HEADERS:
        raise ValueError(f"an array's format must be one of {list(HEADERS)}, got {version}")
    return HEADERS[version](entry)
