"""``sample`` on image-space checkpoints: Heun's sampler, runs that resume, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffit_kernels import from_pretrained, save_pretrained
from diffit_kernels.cli import main
from diffit_kernels.sampling import heun_sample, initial_noise, sample_generator
from diffit_kernels.sampling.decode import image_decoder
from tests.golden_files import recording
from tests.test_image_model import small

pytest.importorskip("diffusers", reason="the sample extra is not installed")


def sample(model_path, folder, *more):
    command = ["sample", "--model_path", str(model_path), "--log_dir", str(folder)]
    return main([*command, "--device", "cpu", *more])


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_pretrained(small(num_classes=3), path)
    return path


def test_images_are_those_of_heun_s_sampler(checkpoint, tmp_path):
    """The .npz, label and noise of each sample by its index; no split into batches matters."""
    folder = tmp_path / "out"
    arguments = ["--num_samples", "5", "--num_sampling_steps", "3", "--cfg_scale", "2"]
    assert sample(checkpoint, folder, *arguments, "--batch_size", "2", "--classes", "2,0") == 0
    with np.load(folder / "samples_5x8x8x3.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [2, 0, 2, 0, 2]
    model = from_pretrained(checkpoint)
    generators = [sample_generator(0, index) for index in range(5)]
    for generator in generators:
        torch.randint(3, (1,), generator=generator)  # a sample's label is drawn before its noise
    expected = heun_sample(
        model, initial_noise(model, generators), torch.tensor(labels), num_steps=3, cfg_scale=2.0
    )
    difference = images.astype(int) - image_decoder()(expected).astype(int)
    assert abs(difference).max() <= 1  # at a whole number, rounding of another batch decides
    assert json.loads((folder / "run.json").read_text())["num_sampling_steps"] == 3
    assert (folder / "grid.png").stat().st_size > 0


def test_a_run_goes_on(checkpoint, tmp_path, capsys):
    assert sample(checkpoint, tmp_path / "out", "--num_samples", "2") == 0
    assert sample(checkpoint, tmp_path / "out", "--num_samples", "4") == 0
    assert "2 of 4 samples are in" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "samples_4x8x8x3.npz") as file:
        longer = file["arr_0"]
    with np.load(tmp_path / "out" / "samples_2x8x8x3.npz") as file:
        assert np.array_equal(file["arr_0"], longer[:2])


def test_a_model_without_classes(tmp_path):
    """Unconditional, as the paper's: 18 steps, no guidance, and zeros for labels."""
    save_pretrained(small(in_channels=1), tmp_path / "model.safetensors")
    assert sample(tmp_path / "model.safetensors", tmp_path / "out", "--num_samples", "2") == 0
    with np.load(tmp_path / "out" / "samples_2x8x8x3.npz") as file:
        assert file["arr_1"].tolist() == [0, 0]
        assert np.array_equal(file["arr_0"][..., 0], file["arr_0"][..., 2])  # grey
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (settings["num_sampling_steps"], settings["cfg_scale"]) == (18, None)


def test_an_independent_checkpoint_needs_its_image_size(tmp_path, capsys):
    path = tmp_path / "recorded.safetensors"
    save_file(recording("image_unet_small").under("state."), path)
    arguments = ["--num_samples", "1", "--num_sampling_steps", "2"]
    assert sample(path, tmp_path / "out", *arguments) == 2
    assert "shapes do not tell ['image_size']" in capsys.readouterr().err
    assert sample(path, tmp_path / "out", *arguments, "--image_size", "16") == 0
    assert (tmp_path / "out" / "samples_1x16x16x3.npz").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--image_size", "16"],
            "16 does not fit the checkpoint, whose images have 8",
        ),
        (["--use_ddim", "True"], "--use_ddim is for latent models"),
        (["--scale_pow", "2"], "--scale_pow is for latent models"),
        (["--classes", "3"], "--classes must be in 0..2, got [3]"),
    ],
)
def test_refusals(arguments, message, checkpoint, tmp_path, capsys):
    assert sample(checkpoint, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_classes_of_a_model_without_any(tmp_path, capsys):
    save_pretrained(small(), tmp_path / "model.safetensors")
    for arguments, message in (
        (["--classes", "1"], "--classes: the checkpoint has none, got [1]"),
        (["--cfg_scale", "2"], "cfg_scale needs labels, and a network with a null class"),
    ):
        assert sample(tmp_path / "model.safetensors", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
