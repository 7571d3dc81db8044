"""Small .npz files of images, as samples and references are."""

from pathlib import Path

import numpy as np


def images(count, seed=0, side=4):
    """(count, side, side, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def written(path: Path, arr_0=None, arr_1=None, save=np.savez, **others) -> Path:
    """The path of a file with these arrays, of those that are not None."""
    arrays = {"arr_0": arr_0, "arr_1": arr_1, **others}
    save(path, **{name: value for name, value in arrays.items() if value is not None})
    return path
