"""``diffit-kernels evaluate``: the evaluator's scores, and samples compared with other samples."""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from diffit_kernels.commands.arguments import default_device, positive
from diffit_kernels.sampling.compare import Comparison, compare
from diffit_kernels.sampling.evaluation import Inception, Scores, evaluate
from diffit_kernels.sampling.npz import ImageFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("samples", type=Path, help=".npz of images, as the command sample writes it")
    add(
        "reference",
        type=Path,
        nargs="?",
        help="another, or the guided-diffusion evaluator's reference batch: FID, sFID, Inception "
        "score, precision and recall against it",
    )
    add("--compare", type=Path, help=".npz of the same seeds: difference image by image")
    add("--weights", type=Path, help="of the Inception network; default downloaded once")
    add("--batch_size", type=positive, default=64, help="default %(default)s")
    add("--device", default=default_device(), help="of the network; default %(default)s here")
    add("--json", action="store_true", help="print JSON, an infinite number as 'inf'")


def run(arguments: argparse.Namespace) -> None:
    """Print the scores against the reference, the comparison, or both."""
    if arguments.reference is None and arguments.compare is None:
        raise ValueError("evaluate needs a reference, or --compare with other samples")
    samples, size = ImageFile(arguments.samples), arguments.batch_size
    scores = comparison = None
    if arguments.compare is not None:
        other = ImageFile(arguments.compare)
        with _progress(len(samples), "comparing") as on_batch:
            comparison = compare(samples, other, size, on_batch)
    if arguments.reference is not None:
        reference = ImageFile(arguments.reference)
        network = Inception(arguments.weights, arguments.device)
        with _progress(len(samples) + len(reference), "Inception") as on_batch:
            scores = evaluate(network, samples, reference, size, arguments.device, on_batch)
    if arguments.json:
        parts = {"scores": scores, "comparison": comparison}
        found = {name: _finite(asdict(part)) for name, part in parts.items() if part is not None}
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    if comparison is not None:
        print(_comparison_text(comparison, arguments.samples, arguments.compare))
    if scores is not None:
        print(_scores_text(scores, arguments.samples, arguments.reference))


def _comparison_text(found: Comparison, samples: Path, other: Path) -> str:
    low, middle, high = found.psnr_min, found.psnr_median, found.psnr_max
    most = "none" if found.differs_most is None else f"index {found.differs_most}"
    labels = {None: "not in both files", 0: "equal"}.get(
        found.differing_labels, f"{found.differing_labels} differ: these are not the same samples"
    )
    return "\n".join(
        (
            f"{samples} against {other}, {found.num_images} images",
            f"PSNR                min {low:.2f}, median {middle:.2f}, max {high:.2f} dB",
            f"largest difference  {found.largest_difference} of 255",
            f"equal bytes         {100 * found.equal_bytes:.4f} %",
            f"equal images        {found.equal_images} of {found.num_images}",
            f"differs most        {most}",
            f"labels              {labels}",
        )
    )


def _scores_text(found: Scores, samples: Path, reference: Path) -> str:
    rows = (
        ("FID", found.fid, "statistics or images"),
        ("sFID", found.sfid, "statistics or images"),
        ("Inception score", found.inception_score, ""),
        ("precision", found.precision, "images"),
        ("recall", found.recall, "images"),
    )
    title = (
        f"{samples}, {found.num_samples} images, against {reference}, {found.num_reference} images"
    )
    lines = [
        f"{name:<20}{f'needs {need} in the reference' if value is None else f'{value:.4f}'}"
        for name, value, need in rows
    ]
    return "\n".join((title, *lines))


def _finite(values: dict) -> dict:
    """What JSON can hold."""
    infinite = (isinstance(value, float) and math.isinf(value) for value in values.values())
    return {
        name: "inf" if large else value
        for (name, value), large in zip(values.items(), infinite, strict=True)
    }


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar of images, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda images: None
        return
    with tqdm(total=total, unit="image", desc=what) as bar:
        yield bar.update
