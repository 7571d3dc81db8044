"""Two files of samples of the same seeds, image by image: fused and plain, say."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffit_kernels.sampling.npz import ImageFile

PEAK = 255


@dataclass(frozen=True)
class Comparison:
    """How far two sets of images are apart. PSNR is in dB, and infinite where images are equal."""

    num_images: int
    psnr_min: float
    psnr_median: float
    psnr_max: float
    largest_difference: int  # of a byte
    equal_bytes: float  # their share
    equal_images: int
    differs_most: int | None  # the index of the image with the smallest PSNR, None if all are equal
    differing_labels: int | None  # their number, None if a file has no labels


def compare(
    first: ImageFile,
    second: ImageFile,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Comparison:
    """Image i of one file against image i of the other; a batch of each is in memory.

    ::

        PSNR = 10 log10(255² / mean((a - b)²))

    Args:
        first, second: files of as many images of one size.
        batch_size: images read at once.
        on_batch: called after every batch with its number of images.

    Raises:
        ValueError: a file has no images, or the files' shapes differ.
    """
    for file in (first, second):
        if not len(file):
            raise ValueError(f"{file.path} has no images")
    if first.shape != second.shape:
        raise ValueError(
            f"files to compare must have images of one shape, got {first.shape} in {first.path} "
            f"and {second.shape} in {second.path}"
        )
    squares, largest, equal = [], 0, 0
    pairs = zip(first.batches(batch_size), second.batches(batch_size), strict=True)
    for ours, theirs in pairs:
        difference = np.abs(ours.astype(np.int32) - theirs).reshape(len(ours), -1)
        squares.append(np.square(difference).sum(1, dtype=np.int64))
        largest = max(largest, int(difference.max()))
        equal += int((difference == 0).sum())
        on_batch(len(ours))
    squares = np.concatenate(squares)
    bytes_per_image = int(np.prod(first.shape[1:]))
    with np.errstate(divide="ignore"):
        psnr = 10 * np.log10(PEAK**2 * bytes_per_image / squares)
    return Comparison(
        num_images=len(first),
        psnr_min=float(psnr.min()),
        psnr_median=float(np.median(psnr)),
        psnr_max=float(psnr.max()),
        largest_difference=largest,
        equal_bytes=equal / (len(first) * bytes_per_image),
        equal_images=int((squares == 0).sum()),
        differs_most=int(squares.argmax()) if squares.any() else None,
        differing_labels=_differing(first, second),
    )


def _differing(first: ImageFile, second: ImageFile) -> int | None:
    ours, theirs = first.labels, second.labels
    if ours is None or theirs is None:
        return None
    for file, labels in ((first, ours), (second, theirs)):
        if labels.shape != (len(file),):
            raise ValueError(
                f"{file.path}: arr_1 must be labels, one for each of {len(file)} images, got "
                f"shape {labels.shape}"
            )
    return int((ours != theirs).sum())
