"""FID, sFID, Inception score, precision and recall, as the guided-diffusion evaluator defines them.

The network is torch-fidelity's Inception of 2015 (the ``evaluate`` extra), the rest linear algebra
on its features, in float64.

The letters: N images; D features; K classes.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffit_kernels.checkpoint_files import first_line, open_checkpoint
from diffit_kernels.sampling.npz import ImageFile

SPLIT = 5000  # images of one Inception score, of which the mean is taken
NEIGHBOURS = 3
BLOCK = 512  # rows of a matrix of distances that are in memory at once
SPATIAL_CHANNELS = 7

Network = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""(B, 3, H, W) uint8 -> pooled features (B, D), spatial ones (B, E), probabilities (B, K)."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """The Gaussian of features that come batch by batch."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features: Tensor) -> None:
        """(B, D)."""
        features = features.double()
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.products = self.products + features.T @ features

    def gaussian(self) -> Gaussian:
        """The mean, and the covariance with N - 1 below, on the CPU."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.sum / self.count
        scatter = self.products - self.count * torch.outer(mean, mean)
        return Gaussian(mean.cpu(), (scatter / (self.count - 1)).cpu())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½).

    The root's trace is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is
    symmetric; those that are negative by rounding count as zero.

    Raises:
        ValueError: the Gaussians have other numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            "frechet_distance: both sides must have as many features, got "
            f"{len(a.mean)} and {len(b.mean)}"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * shared
    return max(0.0, float(distance))  # rounding may leave less than nothing


def inception_score(probabilities: Tensor, split: int = SPLIT) -> float:
    """exp(mean KL(p(y|x) || p(y))) of (N, K) probabilities; the mean over splits in their order."""
    scores = []
    for part in probabilities.double().split(split):
        entropies = torch.special.entr(part).sum(1)
        scores.append((torch.special.entr(part.mean(0)).sum() - entropies.mean()).exp())
    return float(torch.stack(scores).mean())


def precision_and_recall(
    reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of samples near the reference, and of the reference near samples.

    A point is near a set if it lies within the distance of any of its members to that member's
    third neighbour in the set (arXiv 1904.06991).

    Args:
        reference, samples: (N, D) and (M, D) features, N and M above ``neighbours``.

    Raises:
        ValueError: a set has too few points.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise ValueError(
                f"precision_and_recall: {name} must have more than {neighbours} images, got "
                f"{len(features)}"
            )
    reference, samples = reference.double(), samples.double()
    return (
        _share_near(samples, reference, _radii(reference, neighbours)),
        _share_near(reference, samples, _radii(samples, neighbours)),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """(N,): each point's distance to a neighbour; the nearest of all is the point itself."""
    nearest = [
        torch.cdist(part, features).topk(neighbours + 1, largest=False).values.amax(1)
        for part in features.split(BLOCK)
    ]
    return torch.cat(nearest)


def _share_near(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    near = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(BLOCK)]
    return float(torch.cat(near).double().mean())


@dataclass(frozen=True)
class Features:
    """What the network says of N images."""

    pooled: Tensor  # (N, D) float32
    probabilities: Tensor  # (N, K) float32
    moments: Moments  # of the pooled features
    spatial_moments: Moments


@torch.inference_mode()
def compute_features(
    network: Network,
    batches: Iterable,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda images: None,
) -> Features:
    """The features of batches of images, (B, H, W, 3) uint8 arrays each."""
    pooled, probabilities, moments, spatial_moments = [], [], Moments(), Moments()
    for batch in batches:
        images = torch.tensor(batch, device=device).permute(0, 3, 1, 2)
        features, spatial, probability = network(images)
        moments.add(features)
        spatial_moments.add(spatial)
        pooled.append(features.float())
        probabilities.append(probability.float())
        on_batch(len(batch))
    if not pooled:
        raise ValueError("there are no images")
    return Features(torch.cat(pooled), torch.cat(probabilities), moments, spatial_moments)


@dataclass(frozen=True)
class Scores:
    """The evaluator's numbers; None for what the reference does not allow."""

    num_samples: int
    num_reference: int  # images; statistics may be of more
    fid: float | None
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None


def evaluate(
    network: Network,
    samples: ImageFile,
    reference: ImageFile,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda images: None,
) -> Scores:
    """The scores of samples against a reference.

    FID and sFID are computed with the reference's statistics (``mu``, ``sigma``, ``mu_s``,
    ``sigma_s``) where it has them, else with those of its images. Precision and recall need its
    images.

    Raises:
        ValueError: the samples have no images, the reference has neither images nor statistics, or
            statistics are of another network.
    """
    if not len(reference) and not {"mu", "mu_s"} & reference.names:
        raise ValueError(
            f"{reference.path} must have images (arr_0) or statistics (mu, sigma, mu_s, sigma_s), "
            f"got {sorted(reference.names)}"
        )
    stored = _stored(reference, "mu", "sigma")
    stored_spatial = _stored(reference, "mu_s", "sigma_s")
    ours = compute_features(network, samples.batches(batch_size), device, on_batch)
    theirs, precision, recall = None, None, None
    if len(reference):
        theirs = compute_features(network, reference.batches(batch_size), device, on_batch)
        precision, recall = precision_and_recall(theirs.pooled, ours.pooled)
    return Scores(
        num_samples=len(samples),
        num_reference=len(reference),
        fid=_distance(ours.moments, stored, theirs and theirs.moments),
        sfid=_distance(ours.spatial_moments, stored_spatial, theirs and theirs.spatial_moments),
        inception_score=inception_score(ours.probabilities),
        precision=precision,
        recall=recall,
    )


def _distance(ours: Moments, stored: Gaussian | None, theirs: Moments | None) -> float | None:
    """The Frechet distance to the statistics stored, else to those of images, else None."""
    if stored is None and theirs is None:
        return None
    return frechet_distance(ours.gaussian(), theirs.gaussian() if stored is None else stored)


def _stored(file: ImageFile, mean: str, covariance: str) -> Gaussian | None:
    """The Gaussian in the file, None if there is none."""
    if mean not in file.names:
        return None
    if covariance not in file.names:
        raise ValueError(f"{file.path} has {mean} without {covariance}")
    mu, sigma = (torch.from_numpy(file.array(name)).double() for name in (mean, covariance))
    if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{file.path}: {mean} and {covariance} must have shapes (D,) and (D, D), got "
            f"{tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    return Gaussian(mu, sigma)


class Inception:
    """torch-fidelity's Inception network of 2015, with TensorFlow's resizing: a :data:`Network`.

    Pooled features are the last layer's, 2048. Spatial ones are the first 7 channels of the 1 x 1
    branch of the fourth block of 17 x 17, by rows. Probabilities are the softmax of logits without
    their bias, of 1008. All in float32, not tf32.

    Args:
        weights: a .pt, .pth or .safetensors file of the network's state dict; None downloads the
            library's own once, into torch's cache. Nothing in it is ever executed.
        device: where the network runs.

    Raises:
        ImportError: the ``evaluate`` extra is not installed.
        OSError: the weights are not here, and could not be downloaded.
        ValueError: the file has other weights.
    """

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as library
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise ImportError(
                "evaluating needs torch-fidelity, and the torchvision that fits this torch, "
                f"{torch.__version__}: pip install 'diffit-kernels[evaluate]' "
                f"({first_line(error)})"
            ) from error
        path = _downloaded(library.URL_INCEPTION_V3) if weights is None else Path(weights)
        copy = io.BytesIO()  # the library would read the file by executing its pickled code
        with open_checkpoint(path) as tensors:
            torch.save({name: tensors.load(name) for name in tensors.shapes}, copy)
        copy.seek(0)
        try:
            self.network = library.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            )
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the Inception network of 2015: {first_line(error)}"
            ) from error
        self.network.to(device).Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            pooled, logits = self.network(images)
        return pooled, self._spatial, logits.softmax(1)

    def _keep(self, module, inputs, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _downloaded(url: str) -> Path:
    """The file of a URL whose name ends in its hash, in torch's cache."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"no weights of the Inception network at {path}, and they could not be "
                f"downloaded: {first_line(error)}. Download {url} and put it there, or say where "
                "it is with --weights"
            ) from error
    return path
