"""The evaluator's scores: formulas against closed forms, files, the command, and the network."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from diffit_kernels.cli import main
from diffit_kernels.sampling.evaluation import (
    Gaussian,
    Inception,
    Moments,
    compute_features,
    evaluate,
    frechet_distance,
    inception_score,
    precision_and_recall,
)
from diffit_kernels.sampling.npz import ImageFile
from tests.conftest import DEVICES
from tests.image_files import images, written

pytestmark = pytest.mark.usefixtures("one_thread")


def network(batch):
    """A stand-in: channels' means, corners, and a softmax of the means."""
    batch = batch.float() / 255
    pooled = torch.cat((batch.mean((2, 3)), batch.amax((2, 3))), 1)
    return pooled, batch[:, :, 0, :2].flatten(1), (4 * batch.mean((2, 3))).softmax(1)


def test_frechet_distance_of_diagonal_gaussians():
    """|μ - μ'|² + Σ (s - s')² for covariances that commute."""
    a, b = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 1.0, 2.0]).double()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    mean = torch.tensor([1.0, 2.0, 3.0]).double()
    rotated = [Gaussian(m, rotation @ v.diag() @ rotation.T) for m, v in ((mean, a), (0 * mean, b))]
    expected = 14 + float((a.sqrt() - b.sqrt()).square().sum())
    root_of_rounding = 1e-7  # what a zero eigenvalue leaves
    assert frechet_distance(*rotated) == pytest.approx(expected, abs=root_of_rounding)
    assert frechet_distance(rotated[0], rotated[0]) == pytest.approx(0, abs=root_of_rounding)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^½ = (tr AB + 2 (det AB)^½)^½."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt((a @ b).det()))
    zero = torch.zeros(2).double()
    distance = frechet_distance(Gaussian(zero, a), Gaussian(zero, b))
    assert distance == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-12)


def test_frechet_distance_of_other_numbers_of_features():
    small, large = (Gaussian(torch.zeros(n), torch.eye(n)) for n in (2, 3))
    with pytest.raises(ValueError, match="must have as many features, got 2 and 3"):
        frechet_distance(small, large)


def test_moments_by_batches_are_those_of_the_whole():
    features = torch.randn(50, 6) * torch.arange(1, 7) + 20
    moments = Moments()
    for part in features.split(7):
        moments.add(part)
    found = moments.gaussian()
    torch.testing.assert_close(found.mean, features.double().mean(0))
    torch.testing.assert_close(found.covariance, features.double().T.cov())
    one = Moments()
    one.add(features[:1])
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        one.gaussian()


def test_inception_score_of_certain_and_of_undecided_classes():
    certain = torch.eye(5).repeat(4, 1)
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(torch.full((8, 5), 0.2)) == pytest.approx(1)
    halves = torch.cat((torch.eye(2).repeat(2, 1), torch.tensor([[1.0, 0.0]]).repeat(4, 1)))
    assert inception_score(halves, split=4) == pytest.approx((2 + 1) / 2)


def test_precision_and_recall_of_points_on_a_line():
    """The third neighbours of 0, 1, 2, 3 are 3, 2, 2 and 3 away: -3 to 6 is near them."""
    reference = torch.arange(4.0)[:, None]
    assert precision_and_recall(reference, reference) == (1, 1)
    samples = torch.tensor([-2.5, 5.5, 6.5, 7.5, 100.0, 101.0, 102.0, 103.0])[:, None]
    precision, recall = precision_and_recall(reference, samples)
    assert precision == 2 / 8, "-2.5 and 5.5"
    assert recall == 1, "-2.5 and its third neighbour, 7.5, are 10 apart"
    apart = torch.arange(100.0, 104)[:, None]
    assert precision_and_recall(reference, apart) == (0, 0)


def test_precision_and_recall_agree_with_loops():
    """More points than a block of the distances has rows."""
    reference, samples = torch.randn(700, 3), torch.randn(600, 3) * 1.5 + 0.5

    def near(points, centres):
        distances = (centres[:, None].double() - centres).norm(dim=2).sort(1).values[:, 3]
        inside = (points[:, None].double() - centres).norm(dim=2) <= distances
        return float(inside.any(1).double().mean())

    expected = near(samples, reference), near(reference, samples)
    assert precision_and_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_need_neighbours():
    with pytest.raises(ValueError, match="samples must have more than 3 images, got 3"):
        precision_and_recall(torch.randn(4, 2), torch.randn(3, 2))


def test_scores_by_images_and_by_their_statistics_are_the_same(tmp_path):
    samples = ImageFile(written(tmp_path / "samples.npz", images(30)))
    others = images(20, seed=1) // 2
    features = compute_features(network, [others])
    pooled, spatial = features.moments.gaussian(), features.spatial_moments.gaussian()
    statistics = {
        "mu": pooled.mean.numpy(),
        "sigma": pooled.covariance.numpy(),
        "mu_s": spatial.mean.numpy(),
        "sigma_s": spatial.covariance.numpy(),
    }
    by_images = evaluate(network, samples, ImageFile(written(tmp_path / "a.npz", others)), 7)
    both = ImageFile(written(tmp_path / "b.npz", others, **statistics))
    alone = ImageFile(written(tmp_path / "c.npz", **statistics))
    seen = []
    by_both = evaluate(network, samples, both, 7, DEVICES[-1], seen.append)
    by_statistics = evaluate(network, samples, alone, 7)
    assert sum(seen) == 50 and (by_images.num_samples, by_images.num_reference) == (30, 20)
    assert by_both.fid == pytest.approx(by_images.fid) and by_images.fid > 0.1
    assert by_both.sfid == pytest.approx(by_images.sfid) != by_images.fid
    assert (by_both.precision, by_both.recall) == (by_images.precision, by_images.recall)
    assert by_statistics.fid == pytest.approx(by_both.fid)
    assert by_statistics.inception_score == pytest.approx(by_both.inception_score)
    assert by_statistics.precision is None and by_statistics.recall is None
    pooled_alone = {name: statistics[name] for name in ("mu", "sigma")}
    half = ImageFile(written(tmp_path / "d.npz", **pooled_alone))
    assert evaluate(network, samples, half).sfid is None


def test_scores_of_the_reference_itself(tmp_path):
    file = ImageFile(written(tmp_path / "a.npz", images(20)))
    scores = evaluate(network, file, file, 6)
    assert scores.fid == pytest.approx(0, abs=1e-7) and scores.precision == scores.recall == 1


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"other": np.zeros(2)}, "must have images .* or statistics .*, got \\['other'\\]"),
        ({"mu": np.zeros(6)}, "has mu without sigma"),
        ({"mu": np.zeros(6), "sigma": np.zeros((5, 5))}, "got \\(6,\\) and \\(5, 5\\)"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "as many features, got 6 and 5"),
    ],
)
def test_references_that_are_none(arrays, message, tmp_path):
    samples = ImageFile(written(tmp_path / "samples.npz", images(5)))
    with pytest.raises(ValueError, match=message):
        evaluate(network, samples, ImageFile(written(tmp_path / "reference.npz", **arrays)))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("diffit_kernels.commands.evaluate.Inception", lambda *_: network)


def test_command_prints_scores(stand_in, tmp_path, capsys):
    samples = written(tmp_path / "samples.npz", images(9))
    command = ["evaluate", str(samples), str(written(tmp_path / "reference.npz", images(8, 1)))]
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["num_samples"] == 9 and scores["fid"] > 0 and 0 <= scores["recall"] <= 1
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"FID                 {scores['fid']:.4f}" in text and "9 images" in text
    bare = written(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    assert main(["evaluate", str(samples), str(bare)]) == 0
    assert "recall              needs images in the reference" in capsys.readouterr().out


def test_command_errors(tmp_path, capsys, monkeypatch):
    samples = str(written(tmp_path / "samples.npz", images(5)))
    assert main(["evaluate", samples]) == 2
    assert "evaluate needs a reference, or --compare" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(["evaluate", samples, samples]) == 2
    assert "pip install 'diffit-kernels[evaluate]'" in capsys.readouterr().err


class Library:
    """As much of torch-fidelity as is used, in small."""

    URL_INCEPTION_V3 = "https://nowhere.invalid/weights-inception-2015-12-05-6726825d.pth"

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path=None):
            super().__init__()
            self.Mixed_6d = torch.nn.Module()
            self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1)
            assert features == ["2048", "logits_unbiased"]
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, images):
            maps = self.Mixed_6d.branch1x1(images.float())
            return maps.mean((2, 3)), maps.amax((2, 3))


@pytest.fixture
def library(monkeypatch, tmp_path):
    module = type(sys)("torch_fidelity")
    module.feature_extractor_inceptionv3 = Library
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    return module


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(suffix, library, tmp_path):
    from safetensors.torch import save_file

    convolution = torch.nn.Conv2d(3, 9, 1)
    state = {f"Mixed_6d.branch1x1.{name}": v for name, v in convolution.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(state, path)
    batch = torch.from_numpy(images(2, side=5)).permute(0, 3, 1, 2)
    with torch.no_grad():
        pooled, spatial, probabilities = Inception(path)(batch)
        maps = convolution(batch.float())
    assert pooled.shape == (2, 9) and torch.allclose(probabilities.sum(1), torch.ones(2))
    rows = maps.permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert torch.equal(spatial, rows), "channels last, 7 of them, as in the reference's statistics"


def test_weights_that_are_others_or_not_there(library, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.pth"
    torch.save({"weight": torch.zeros(2)}, wrong)
    with pytest.raises(ValueError, match="does not fit the Inception network of 2015"):
        Inception(wrong)
    wrong.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"wrong\.pth is"):
        Inception(wrong)

    def offline(url, path, hash_prefix, progress):
        assert hash_prefix == "6726825d"
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(OSError, match=r"(?s)no weights .* Download https://nowhere.*--weights"):
        Inception()
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({"Mixed_6d.branch1x1.weight": torch.zeros(9, 3, 1, 1)}, cached)
    with pytest.raises(ValueError, match="does not fit"):
        Inception()


def test_the_library_itself(tmp_path, monkeypatch):
    """Random weights: the real network's sizes, and its own metrics of the same features."""
    library = pytest.importorskip("torch_fidelity", reason="the evaluate extra is not installed")
    from torch_fidelity import metric_fid, metric_isc, metric_prc

    kind = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched:
        patched.setattr(kind, "load_state_dict", lambda *_: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        weights = kind("random", ["2048"], feature_extractor_weights_path=empty).state_dict()
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    for name in counters:  # which the published file lacks
        del weights[name]
    torch.save(weights, tmp_path / "weights.pth")
    inception = Inception(tmp_path / "weights.pth")
    features = compute_features(inception, [images(2, side=32), images(2, 1, side=32)])
    assert features.pooled.shape == (4, 2048) and features.probabilities.shape == (4, 1008)
    assert features.spatial_moments.gaussian().mean.shape == (17 * 17 * 7,)

    ours, theirs = torch.randn(90, 5), torch.randn(80, 5) * 1.2 + 0.3
    moments = [Moments(), Moments()]
    for one, values in zip(moments, (ours, theirs), strict=True):
        one.add(values)
    statistics = [metric_fid.fid_features_to_statistics(values) for values in (ours, theirs)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, False)
    assert frechet_distance(*(one.gaussian() for one in moments)) == pytest.approx(
        fid["frechet_inception_distance"], rel=1e-6
    )
    score = metric_isc.isc_features_to_metric(ours, splits=1, shuffle=False)
    assert inception_score(ours.softmax(1)) == pytest.approx(score["inception_score_mean"])
    both = metric_prc.prc_features_to_metric(ours, theirs, prc_neighborhood=3, verbose=False)
    assert precision_and_recall(theirs, ours) == pytest.approx((both["precision"], both["recall"]))
