"""The pipeline: what ``denoise`` and Heun's sampler give, in the forms of diffusers' pipelines."""

import json
import subprocess
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import diffit_kernels
from diffit_kernels import DiffiT, DiffiTPipeline, ImageDiffiT, from_pretrained
from diffit_kernels.sampling import denoise, heun_sample, initial_noise, sample_generator
from diffit_kernels.sampling.decode import image_decoder, shuffle_decoder, vae_decoder
from tests.conftest import DEVICES
from tests.parity import assert_close

diffusers = pytest.importorskip("diffusers", reason="the sample extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"num_inference_steps": 4}


def generators(count, first=0):
    return [sample_generator(0, first + index) for index in range(count)]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def digits():
    return quiet(DiffiTPipeline.from_pretrained("digits"))


@pytest.fixture
def image_digits():
    return quiet(DiffiTPipeline.from_pretrained("image_digits"))


def small_model():
    torch.manual_seed(0)
    model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=10).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


def tiny_vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


@pytest.fixture
def latent():
    """A small latent model with a tiny random VAE of the published architecture."""
    return quiet(DiffiTPipeline(small_model(), tiny_vae()))


def test_digits_are_what_denoise_gives(digits):
    model, labels = from_pretrained("digits"), [3, 7, 1]
    noise = generators(3)
    settings = {"num_steps": 4, "cfg_scale": 4.4, "scale_pow": 4.0}
    start = initial_noise(model, noise)
    expected = denoise(model, start, torch.tensor(labels), generators=noise, **settings)
    latents = digits(labels, generator=generators(3), output_type="latent", **STEPS).images
    assert torch.equal(latents, expected)
    pictures = digits(labels, generator=generators(3), **STEPS).images
    assert np.array_equal(np.stack(pictures), shuffle_decoder()(expected))


def test_image_space_is_what_heun_gives(image_digits):
    model, labels = from_pretrained("image_digits"), torch.tensor([3, 7])
    noise = initial_noise(model, generators(2))
    expected = heun_sample(model, noise, labels, num_steps=4, cfg_scale=2.0)
    pictures = image_digits(labels, 2.0, generators(2), **STEPS).images
    assert np.array_equal(np.stack(pictures), image_decoder()(expected))


def test_one_generator_serves_the_whole_batch(digits):
    first, again, other = (
        digits([1, 2], generator=torch.Generator().manual_seed(seed), output_type="pt", **STEPS)
        for seed in (5, 5, 6)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(*first.images), "two samples"
    digits([1, 2], **STEPS)  # the global generator


def test_with_a_generator_each_an_image_does_not_depend_on_its_batch(digits):
    settings = {"output_type": "latent", **STEPS}
    whole = digits([4, 5, 6], generator=generators(3), **settings).images
    alone = digits([5], generator=generators(1, first=1), **settings).images
    assert_close(alone, whole[1:2], 1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
def test_other_samplers(digits, sampler):
    """None of them adds noise: the start decides."""
    start = torch.randn(2, 4, 4, 4)
    settings = {"latents": start, "sampler": sampler, "output_type": "latent", **STEPS}
    found = digits([1, 2], 3.0, scale_pow=2.0, **settings).images
    labels = torch.tensor([1, 2])
    arguments = {"num_steps": 4, "cfg_scale": 3.0, "scale_pow": 2.0, "sampler": sampler}
    assert torch.equal(found, denoise(digits.transformer, start, labels, **arguments))


def test_no_guidance_up_to_one(digits):
    start = torch.randn(1, 4, 4, 4)
    settings = {"latents": start, "sampler": "ddim", "output_type": "latent", **STEPS}
    expected = denoise(digits.transformer, start, torch.tensor([1]), num_steps=4, sampler="ddim")
    assert torch.equal(digits([1], 1.0, **settings).images, expected)
    assert not torch.equal(digits([1], **settings).images, expected), "guided by default"


@pytest.mark.parametrize(
    "model, expected",
    [
        ({"input_size": 32}, (250, 4.4, 4.0)),
        ({"input_size": 64}, (250, 1.49, 4.0)),
        ({"input_size": 32, "conditioning": "adaln_zero"}, (250, 1.5, 0.0)),
    ],
)
def test_defaults_are_the_published_ones(model, expected, monkeypatch):
    seen = {}

    def recorded(model, noise, labels, **settings):
        seen.update(settings)
        return noise

    monkeypatch.setattr("diffit_kernels.pipeline.denoise", recorded)
    model = DiffiT(hidden_size=16, depth=1, num_heads=2, patch_size=8, **model).eval()
    quiet(DiffiTPipeline(model))([207, 360], output_type="latent")
    assert tuple(seen[name] for name in ("num_steps", "cfg_scale", "scale_pow")) == expected
    assert seen["sampler"] == "ddpm" and seen["generators"] is None


def test_output_types(latent):
    forms = {
        form: latent([1, 2], generator=generators(2), output_type=form, **STEPS).images
        for form in ("pil", "np", "pt", "latent")
    }
    assert forms["pt"].shape == (2, 3, 32, 32) and forms["pt"].dtype == torch.float32
    assert 0 <= forms["pt"].min() < forms["pt"].max() <= 1
    assert forms["np"].dtype == np.float32
    assert np.array_equal(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    bytes_ = np.stack(forms["pil"])
    assert np.abs(bytes_ - 255 * forms["np"]).max() < 1.001, "truncated, not rounded"
    assert forms["latent"].shape == (2, 4, 4, 4)
    (forms["latent"].requires_grad_() * 2).sum().backward()
    pictures = latent([1, 2], generator=generators(2), return_dict=False, **STEPS)
    assert isinstance(pictures, tuple) and np.array_equal(np.stack(pictures[0]), bytes_)


def test_the_vae_decodes_as_the_command_does(latent, tmp_path):
    latent.vae.save_pretrained(tmp_path)
    decode = vae_decoder(str(tmp_path), torch.device("cpu"))
    start = {"generator": generators(9), **STEPS}
    pictures = np.stack(latent([1] * 9, **start).images)
    start["generator"] = generators(9)
    assert np.array_equal(pictures, decode(latent([1] * 9, output_type="latent", **start).images))


def test_another_device_draws_the_same_noise(digits):
    expected = digits([1, 2], generator=generators(2), output_type="latent", **STEPS).images
    digits.to(DEVICES[-1])
    found = digits([1, 2], generator=generators(2), output_type="latent", **STEPS).images
    assert found.device.type == digits.device.type == DEVICES[-1]
    assert_close(found.cpu(), expected, 1e-3)


def test_half_precision(latent):
    expected = latent([1], generator=generators(1), output_type="pt", **STEPS).images
    assert latent.to("cpu", torch.bfloat16) is latent
    assert latent.dtype == latent.vae.dtype == torch.bfloat16 and latent.device.type == "cpu"
    images = latent([1], generator=generators(1), output_type="pt", **STEPS).images
    assert images.dtype == torch.float32
    assert_close(images, expected, 0.1)


def test_saved_with_a_vae_and_read_back(latent, tmp_path):
    latent.save_pretrained(tmp_path / "pipeline")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "pipeline/model_index.json",
        "pipeline/transformer/diffit.safetensors",
        "pipeline/vae/config.json",
        "pipeline/vae/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "DiffiTPipeline" and index["vae"][1] == "AutoencoderKL"
    again = quiet(DiffiTPipeline.from_pretrained(tmp_path / "pipeline"))
    images = [
        p([1, 2], generator=generators(2), output_type="pt", **STEPS).images
        for p in (latent, again)
    ]
    assert_close(images[1], images[0], 1e-4)  # read, the model runs fused
    half = DiffiTPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16)
    assert half.dtype == half.vae.dtype == torch.bfloat16 and half.transformer.use_fused_tmsa
    bare = DiffiTPipeline.from_pretrained(tmp_path / "pipeline", vae=None)
    assert bare.vae is None and bare.components["transformer"] is bare.transformer


@pytest.mark.parametrize("name", ["digits", "image_digits"])
def test_saved_without_a_vae_and_read_back(name, tmp_path):
    pipeline = quiet(DiffiTPipeline.from_pretrained(name))
    pipeline.save_pretrained(tmp_path)
    again = quiet(DiffiTPipeline.from_pretrained(str(tmp_path)))
    assert type(again.transformer) is type(pipeline.transformer) and again.vae is None
    assert again.decoder == pipeline.decoder == ("pixel_shuffle" if name == "digits" else None)
    ours, theirs = (p([1], generator=generators(1), **STEPS).images[0] for p in (pipeline, again))
    assert np.array_equal(ours, theirs)
    alone = DiffiTPipeline.from_pretrained(tmp_path / "transformer" / "diffit.safetensors")
    assert alone.decoder == pipeline.decoder, "the weights' file says how to decode"


def test_a_pipeline_of_the_hub(latent, tmp_path, monkeypatch):
    """A repository with an index, of which all is fetched that was saved; one with a checkpoint."""
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    latent.save_pretrained(tmp_path / "whole")
    save_file(latent.transformer.state_dict(), tmp_path / "model.safetensors")
    files = {
        "us/whole": [
            p.relative_to(tmp_path / "whole").as_posix() for p in (tmp_path / "whole").rglob("*.*")
        ],
        "us/alone": ["README.md", "model.safetensors"],
    }
    asked = []

    def snapshot(repository, allow_patterns):
        asked.extend(
            name for name in files[repository] if any(fnmatch(name, p) for p in allow_patterns)
        )
        return str(tmp_path / "whole")

    monkeypatch.setattr(hub, "list_repo_files", files.__getitem__)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, name: tmp_path / name)
    whole = quiet(DiffiTPipeline.from_pretrained("us/whole", use_fused_tmsa=False))
    assert sorted(asked) == sorted(files["us/whole"]), "nothing that it wrote is left behind"
    alone = quiet(DiffiTPipeline.from_pretrained("us/alone", vae=latent.vae, use_fused_tmsa=False))
    images = [p([1], generator=generators(1), **STEPS).images[0] for p in (latent, whole, alone)]
    assert np.array_equal(*images[:2]) and np.array_equal(*images[1:])
    with pytest.raises(OSError, match=r"'us/none' is no local path, and the hub did not give its"):
        DiffiTPipeline.from_pretrained("us/none")


def test_a_checkpoint_alone_takes_a_vae(latent, tmp_path, monkeypatch):
    save_file(latent.transformer.state_dict(), tmp_path / "model.safetensors")
    latent.vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "model.safetensors"
    read = DiffiTPipeline.from_pretrained(path, vae=tmp_path / "vae", use_fused_tmsa=False)
    quiet(read)
    images = [p([1], generator=generators(1), **STEPS).images[0] for p in (latent, read)]
    assert np.array_equal(*images)
    assert DiffiTPipeline.from_pretrained(tmp_path, vae=latent.vae).vae is latent.vae
    with pytest.raises(OSError, match=r"no VAE weights from '.*nowhere': .*vae=None for latents"):
        DiffiTPipeline.from_pretrained(path, vae=tmp_path / "nowhere")
    asked = []
    monkeypatch.setattr("diffit_kernels.pipeline.read_vae", lambda name: asked.append(name))
    with pytest.raises(AttributeError):
        DiffiTPipeline.from_pretrained(path)
    assert asked == ["stabilityai/sd-vae-ft-ema"], "the published one by default"


def test_a_vae_of_pickled_weights_is_not_read(latent, tmp_path):
    latent.vae.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="no VAE weights from"):
        DiffiTPipeline.from_pretrained("image_digits", vae=tmp_path)


def test_a_model_without_classes():
    torch.manual_seed(0)
    model = ImageDiffiT(
        image_size=8, channels=(16, 16), num_cells=1, num_heads=2, num_groups=4, temb_size=16
    )
    pipeline = quiet(DiffiTPipeline(model.eval()))
    assert len(pipeline(**STEPS).images) == 1
    assert pipeline(batch_size=3, output_type="np", **STEPS).images.shape == (3, 8, 8, 3)
    with pytest.raises(ValueError, match=r"must be None for a model without classes, got \[1\]"):
        pipeline([1])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pipeline(batch_size=0)
    with pytest.raises(ValueError, match="this one is in image space, got sampler='ddim'"):
        pipeline(sampler="ddim")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"class_labels": [10]}, ValueError, r"class_labels must be in 0\.\.9, got \[10\]"),
        ({"class_labels": None}, TypeError, "must be a list of whole numbers, got None"),
        ({"class_labels": []}, TypeError, r"must be a list of whole numbers, got \[\]"),
        ({"class_labels": [1.5]}, TypeError, r"must be a list of whole numbers, got \[1\.5\]"),
        ({"class_labels": 3}, TypeError, "must be a list of whole numbers, got 3"),
        ({"batch_size": 2}, ValueError, "batch_size is for models without classes.* got 2"),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of .* got 'jpeg'"),
        ({"generator": generators(3)}, ValueError, "one for each of 2 images, got 3"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, ValueError, r"\(2, 4, 4, 4\), got \(1, 4, 4, 4\)"),
        ({"num_inference_steps": 1001}, ValueError, r"must be in 1\.\.1000, got 1001"),
        ({"sampler": "euler"}, ValueError, "sampler must be one of .* got 'euler'"),
    ],
)
def test_call_errors(digits, arguments, error, message):
    with pytest.raises(error, match=message):
        digits(**{"class_labels": [1, 2], **arguments})


def test_construction_errors(latent, tmp_path):
    with pytest.raises(TypeError, match="must be a DiffiT or an ImageDiffiT, got Linear"):
        DiffiTPipeline(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="decoder must be 'pixel_shuffle' or None, got 'jpeg'"):
        DiffiTPipeline(latent.transformer, decoder="jpeg")
    with pytest.raises(ValueError, match="one of them, got transformer=DiffiT, vae=AutoencoderKL"):
        DiffiTPipeline(latent.transformer, latent.vae, "pixel_shuffle")
    with pytest.raises(ValueError, match="must be in eval mode, got training mode"):
        DiffiTPipeline(small_model().train(), latent.vae)([1])
    with pytest.raises(ValueError, match="output_type must be 'latent', got 'pil'"):
        DiffiTPipeline(latent.transformer)([1])
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        latent.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="_class_name must be 'DiffiTPipeline', got 'DiTPipeline'"):
        DiffiTPipeline.from_pretrained(tmp_path)
    index.write_text("[1")
    with pytest.raises(ValueError, match=r"model_index\.json is no JSON object"):
        DiffiTPipeline.from_pretrained(tmp_path)


def test_the_extra_is_asked_for_when_it_is_used():
    code = """
import sys
import diffit_kernels
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = sys.modules["PIL"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("diffusers", "PIL") else real(name)
try:
    diffit_kernels.DiffiTPipeline.from_pretrained("digits")
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "sampling needs diffusers, PIL: pip install 'diffit-kernels[sample]'" in result.stdout
    assert diffit_kernels.DiffiTPipeline is DiffiTPipeline
