"""The packaged digits model: small, guided, and recognised by a judge that has seen real digits."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffit_kernels import from_pretrained
from diffit_kernels.checkpoint_files import PACKAGED
from diffit_kernels.cli import main
from diffit_kernels.demo import sample_digits
from diffit_kernels.sampling.decode import image_decoder, shuffle_decoder

pytest.importorskip("diffusers", reason="the sample extra is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


DECODERS = {"digits": shuffle_decoder(), "image_digits": image_decoder()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_samples_are_the_digits_that_were_asked_for(name, fused, judge):
    model = from_pretrained(name, use_fused_tmsa=fused)
    samples, labels = sample_digits(model, per_class=20, seed=1)
    images = DECODERS[name](samples)[..., 0].reshape(len(labels), 64) / 255 * 16
    recognised = judge.predict(images) == labels.numpy()
    assert recognised.mean() >= 0.95
    per_digit = [recognised[labels.numpy() == digit].mean() for digit in range(10)]
    assert min(per_digit) >= 0.8, per_digit


@pytest.mark.parametrize("name", DECODERS)
def test_samples_are_not_all_alike(name):
    samples, _ = sample_digits(from_pretrained(name), per_class=4, seed=2)
    threes = samples[3::10]
    assert (threes[:, None] - threes[None]).abs().amax((2, 3, 4)).fill_diagonal_(9).min() > 0.3


def test_the_checkpoints_are_small_and_say_how_to_decode():
    assert all(path.stat().st_size < 3e6 for path in PACKAGED.values())
    with safe_open(PACKAGED["digits"], "pt") as file:
        assert file.metadata()["decoder"] == "pixel_shuffle"


@pytest.mark.parametrize("name", DECODERS)
def test_demo_draws_and_reports(name, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    assert main(["demo", "--out", str(picture), "--device", "cpu", "--model", name]) == 0
    from PIL import Image

    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (684, 684, 3) and pixels.std() > 30
    report = capsys.readouterr().out
    differences = [float(x) for x in re.findall(r"largest difference (\S+) of", report)]
    assert len(differences) == 2 and max(differences) < 2e-5
    assert len(re.findall(r"literal [\d.]+ ms, fused [\d.]+ ms", report)) == 2


@pytest.mark.parametrize("name", ["train_digits", "train_image_digits"])
def test_steps_of_the_training_scripts_run(name, tmp_path):
    """The examples, from their command lines, for two steps: weights that load."""
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    out = tmp_path / "weights.safetensors"
    command = [sys.executable, script, "--steps", "2", "--batch-size", "8", "--out", out]
    plot = tmp_path / "loss.png"
    latent = name == "train_digits"
    command += ["--plot", plot] if latent else []
    subprocess.run(command, check=True, capture_output=True)
    model, y = from_pretrained(out), torch.tensor([3])
    if latent:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert model(torch.zeros(1, 4, 4, 4), torch.tensor([5]), y).shape == (1, 8, 4, 4)
    else:
        assert model.denoise(torch.zeros(1, 1, 8, 8), torch.ones(1), y).shape == (1, 1, 8, 8)
