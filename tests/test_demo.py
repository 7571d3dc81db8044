"""The packaged digits model: small, guided, and recognised by a judge that has seen real digits."""

import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffit_kernels import from_pretrained
from diffit_kernels.checkpoint_files import PACKAGED
from diffit_kernels.cli import main
from diffit_kernels.demo import sample_digits
from diffit_kernels.sampling.decode import shuffle_decoder

pytest.importorskip("diffusers", reason="the sample extra is not installed")
svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def judge():
    """A support vector classifier that is right on at least 97 % of real digits it has not seen."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    seen, unseen, classes, answers = train_test_split(
        digits.data, digits.target, test_size=0.3, random_state=0
    )
    classifier = svm.SVC(gamma=0.001).fit(seen, classes)
    assert classifier.score(unseen, answers) >= 0.97
    return classifier


@pytest.mark.parametrize("fused", [True, False])
def test_samples_are_the_digits_that_were_asked_for(fused, judge):
    model = from_pretrained("digits", use_fused_tmsa=fused)
    latents, labels = sample_digits(model, per_class=20, seed=1)
    images = shuffle_decoder()(latents)[..., 0].reshape(len(labels), 64) / 255 * 16
    recognised = judge.predict(images) == labels.numpy()
    assert recognised.mean() >= 0.95
    per_digit = [recognised[labels.numpy() == digit].mean() for digit in range(10)]
    assert min(per_digit) >= 0.8, per_digit


def test_samples_are_not_all_alike():
    latents, _ = sample_digits(from_pretrained("digits"), per_class=4, seed=2)
    threes = latents[3::10]
    assert (threes[:, None] - threes[None]).abs().amax((2, 3, 4)).fill_diagonal_(9).min() > 0.3


def test_the_checkpoint_is_small_and_says_how_to_decode():
    assert PACKAGED["digits"].stat().st_size < 3e6
    with safe_open(PACKAGED["digits"], "pt") as file:
        assert file.metadata()["decoder"] == "pixel_shuffle"


def test_demo_draws_and_reports(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    assert main(["demo", "--out", str(picture), "--device", "cpu"]) == 0
    from PIL import Image

    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (684, 684, 3) and pixels.std() > 30
    report = capsys.readouterr().out
    differences = [float(x) for x in re.findall(r"largest difference (\S+) of", report)]
    assert len(differences) == 2 and max(differences) < 2e-5
    assert len(re.findall(r"literal [\d.]+ ms, fused [\d.]+ ms", report)) == 2


def test_one_step_of_the_training_script_runs(tmp_path):
    """The example, from its command line, for two steps: weights that load, and a picture."""
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).parents[1] / "examples" / "train_digits.py"
    out, plot = tmp_path / "digits.safetensors", tmp_path / "loss.png"
    command = [sys.executable, script, "--steps", "2", "--batch-size", "8"]
    subprocess.run([*command, "--out", out, "--plot", plot], check=True, capture_output=True)
    assert plot.read_bytes().startswith(b"\x89PNG")
    x, t, y = torch.zeros(1, 4, 4, 4), torch.tensor([5]), torch.tensor([3])
    assert from_pretrained(out)(x, t, y).shape == (1, 8, 4, 4)
