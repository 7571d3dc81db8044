"""The published sampler against its recordings, and runs on disk that survive interruption."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffit_kernels import DiffiT, from_pretrained, patch
from diffit_kernels.cli import main
from diffit_kernels.sampling import (
    Denoiser,
    denoise,
    initial_noise,
    respaced_timesteps,
    sample_generator,
)
from diffit_kernels.sampling.decode import shuffle_decoder, to_uint8
from diffit_kernels.sampling.run import SamplingRun, Settings
from tests import lookalike
from tests.golden_files import recording
from tests.parity import assert_close

pytest.importorskip("diffusers", reason="the sample extra is not installed")


def test_timesteps_are_the_published_ones():
    assert respaced_timesteps(250).tolist() == recording("respacing_250")["timesteps"].tolist()
    assert respaced_timesteps(1000).tolist() == list(range(1000))
    assert respaced_timesteps(1).tolist() == [0]
    with pytest.raises(ValueError, match=r"sampling steps must be in 1\.\.1000, got 1001"):
        respaced_timesteps(1001)


@pytest.mark.parametrize("path", ["literal", "fused", "patched"])
@pytest.mark.parametrize("name", ["sampling_ancestral_10", "sampling_ddim_10"])
def test_trajectory_agrees_with_the_recording(name, path, monkeypatch):
    golden, small = recording(name), recording("latent_small")
    model = DiffiT(**small.config, use_fused_tmsa=path == "fused").eval()
    if path == "patched":  # blocks of the released structure that are not ours
        for i in range(small.config["depth"]):
            model.blocks[i] = lookalike.Layer(small.config["hidden_size"], 2, side=8)
        patch(model.eval())
    model.load_state_dict(small.under("state."))
    noise = iter(golden["noise"])
    monkeypatch.setattr("diffit_kernels.sampling.noise.step_noise", lambda *_: next(noise)[:2])
    # The recording's second half is the unconditional batch; guidance uses the first's latents.
    sample = denoise(
        model,
        golden["z"][:2],
        golden["y"][:2],
        num_steps=10,
        cfg_scale=4.4,
        use_ddim="ddim" in name,
    )
    assert_close(sample, golden["sample"][:2], 1e-3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiffiT(
        input_size=4, patch_size=1, hidden_size=16, depth=1, num_heads=2, num_classes=10
    ).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"decoder": "pixel_shuffle"})
    return path


@pytest.fixture
def settings():
    return Settings("", 4, 2.0, 4.0, False, 3, "float32", ())


def test_unguided_sampling_needs_no_null_class(model):
    generators = [sample_generator(0, i) for i in range(3)]
    labels = torch.tensor([0, 1, 2])
    out = denoise(model, initial_noise(model, generators), labels, num_steps=3, use_ddim=True)
    assert out.shape == (3, 4, 4, 4) and out.isfinite().all()


def test_ancestral_sampling_needs_learned_variances():
    model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, learn_sigma=False).eval()
    with pytest.raises(ValueError, match="needs a model with learn_sigma=True"):
        denoise(model, torch.zeros(1, 4, 4, 4), torch.tensor([0]), num_steps=2)
    denoise(model, torch.zeros(1, 4, 4, 4), torch.tensor([0]), num_steps=2, use_ddim=True)


def test_a_sample_does_not_depend_on_its_batch(model, settings, tmp_path):
    def latents(folder, batch_size):
        run = SamplingRun(tmp_path / folder, settings)
        run.sample(model, 7, batch_size, None)
        with np.load(run.assemble(7, "latents")) as file:
            return file["arr_0"], file["arr_1"]

    for (a, b), _ in zip(zip(latents("a", 7), latents("b", 3), strict=True), range(2), strict=True):
        assert_close(torch.from_numpy(a), torch.from_numpy(b), 1e-5)


def test_samples_differ_and_seeds_matter(model, settings):
    first, again, other, seed = (
        torch.randn(8, generator=sample_generator(*key)) for key in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, seed)


def test_resuming_computes_what_is_missing_and_nothing_else(model, settings, tmp_path):
    whole = SamplingRun(tmp_path / "whole", settings)
    whole.sample(model, 9, 3, shuffle_decoder())
    expected = whole.assemble(9, "images").read_bytes()

    class Interrupt(Exception):
        pass

    steps = []

    def interrupt_in_the_second_batch(size):
        steps.append(size)
        if len(steps) == 6:
            raise Interrupt

    run = SamplingRun(tmp_path / "run", settings)
    with pytest.raises(Interrupt):
        run.sample(model, 9, 3, shuffle_decoder(), interrupt_in_the_second_batch)
    assert run.missing(9) == [3, 4, 5, 6, 7, 8]
    assert not list(run.shards.glob(".*")), "nothing half written"

    steps.clear()
    run = SamplingRun(tmp_path / "run", settings)
    run.sample(model, 9, 3, shuffle_decoder(), steps.append)
    assert steps == [3] * 8
    assert run.assemble(9, "images").read_bytes() == expected


def test_damaged_and_lost_shards_are_computed_again(model, settings, tmp_path):
    run = SamplingRun(tmp_path, settings)
    run.sample(model, 6, 2, shuffle_decoder())
    expected = run.assemble(6, "images").read_bytes()
    first, second, third = sorted(run.shards.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    assert run.missing(6) == [0, 1, 2, 3]
    content = bytearray(third.read_bytes())
    content[200:300] = bytes(100)
    third.write_bytes(content)
    run.sample(model, 6, 2, shuffle_decoder())
    with pytest.raises(ValueError, match=r"was damaged .* computes it again"):
        run.assemble(6, "images")
    run.sample(model, 6, 2, shuffle_decoder())
    assert run.assemble(6, "images").read_bytes() == expected


def test_any_split_over_processes_gives_the_same_file(checkpoint, tmp_path, capsys):
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    for part in ("2/3", "0/3", "1/3"):
        assert main([*arguments, str(tmp_path / "three"), "--split", part]) == 0
    assert "4 samples are left to the other splits" in capsys.readouterr().out
    one, three = (tmp_path / n / "samples_5x8x8x3.npz" for n in ("one", "three"))
    assert one.read_bytes() == three.read_bytes()


def test_two_runs_that_start_in_one_folder_do_not_mix(model, settings, tmp_path):
    other = SamplingRun(tmp_path, Settings("", 5, 2.0, 4.0, False, 3, "float32", ()))
    SamplingRun(tmp_path, settings).sample(model, 2, 2, None)
    with pytest.raises(ValueError, match="samples of another run"):
        other.sample(model, 4, 2, None)


def test_strange_files_in_the_folder(model, settings, tmp_path):
    run = SamplingRun(tmp_path, settings)
    run.sample(model, 2, 2, None)
    stranger = run.shards / "abcdefgh-ijklmnop.npz"
    stranger.touch()
    assert run.missing(2) == [] and stranger.exists()
    run.record.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json does not say what made the samples"):
        SamplingRun(tmp_path, settings)


def test_another_runs_folder_is_refused(model, settings, tmp_path):
    SamplingRun(tmp_path, settings).sample(model, 1, 1, None)
    other = Settings("", 5, 2.0, 4.0, False, 3, "float32", ())
    with pytest.raises(ValueError, match=r"another run: num_sampling_steps was 4, is now 5"):
        SamplingRun(tmp_path, other)


def test_latents_are_decoded_later(model, settings, tmp_path):
    run = SamplingRun(tmp_path, settings)
    run.sample(model, 5, 2, None)
    run.decode_stored(shuffle_decoder())
    with np.load(run.assemble(5, "images")) as file:
        assert file["arr_0"].shape == (5, 8, 8, 3)
    assert run.grid(5).read_bytes().startswith(b"\x89PNG")


def test_uint8_truncates_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


SAMPLE = ["sample", "--num_samples", "5", "--num_sampling_steps", "3", "--batch_size", "2"]


def test_command_line_writes_what_the_evaluator_reads(checkpoint, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(folder)]
    published = ["--model", "Diffit", "--cfg_cond", "True", "--cfg_scale", "2", "--scale_pow", "4"]
    assert main([*arguments, *published, "--image_size", "8", "--classes", "3,1"]) == 0
    with np.load(folder / "samples_5x8x8x3.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 1, 3, 1, 3]
    assert (folder / "grid.png").exists()
    assert "sample" in capsys.readouterr().err, "progress"
    assert main([*arguments, *published, "--classes", "3,1"]) == 0
    assert "5 of 5 samples are in" in capsys.readouterr().out


def test_command_line_settings_reach_the_run(checkpoint, tmp_path):
    folder = tmp_path / "out"
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(folder)]
    assert main([*arguments, "--use_ddim", "--cfg_cond", "False", "--dtype", "bfloat16"]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["use_ddim"] and record["cfg_scale"] is None and record["dtype"] == "bfloat16"


def test_command_line_says_which_steps_need_no_guidance(checkpoint, tmp_path, capsys):
    command = ["sample", "--model_path", str(checkpoint), "--num_samples", "1"]
    for more, expected in (
        (["--num_sampling_steps", "11"], "1 of 11 steps need no unconditional half"),
        (["--num_sampling_steps", "10", "--guidance_eps", "0.01"], "4 of 10 steps need no"),
        (["--num_sampling_steps", "3", "--cfg_scale", "1"], "3 of 3 steps need no"),
    ):
        assert main([*command, *more, "--log_dir", str(tmp_path / more[1])]) == 0
        assert expected in capsys.readouterr().out
    assert main([*command, "--cfg_cond", "False", "--log_dir", str(tmp_path / "plain")]) == 0
    assert "unconditional half" not in capsys.readouterr().out


def test_command_line_without_a_vae_writes_latents_and_says_so(model, tmp_path, capsys):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    folder = tmp_path / "out"
    arguments = [*SAMPLE, "--model_path", str(tmp_path), "--log_dir", str(folder)]
    assert main([*arguments, "--vae", "none"]) == 0
    assert (folder / "latents_5x4x4x4.npz").exists()
    assert "these are latents" in capsys.readouterr().out


def tiny_vae(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)


def test_command_line_decodes_with_a_vae(model, tmp_path):
    """A tiny random VAE of the published architecture, from a folder as users have it."""
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tiny_vae(tmp_path / "vae")
    folder = tmp_path / "out"
    path = tmp_path / "model.safetensors"
    arguments = [*SAMPLE, "--model_path", str(path), "--log_dir", str(folder)]
    assert main([*arguments, "--vae", "none"]) == 0
    assert main([*arguments, "--vae", str(tmp_path / "vae"), "--image_size", "32"]) == 0
    with np.load(folder / "samples_5x32x32x3.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].std() > 0


def test_command_line_interrupted_keeps_and_says(checkpoint, tmp_path, capsys, monkeypatch):
    real, calls = Denoiser.__call__, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Denoiser, "__call__", interrupted)
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert "2 of 5 samples are kept in" in capsys.readouterr().err
    assert main(arguments) == 0


def test_command_line_says_what_graphs_keep(checkpoint, tmp_path, capsys, monkeypatch):
    """On CUDA, of which a capture that keeps 3 MiB stands in here."""

    def capture_for(predictor, *_):
        return (lambda runs: (runs, 3 * 2**20)) if predictor.savings.step_graph else None

    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", capture_for)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 40 * 2**20)
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "graphs kept 3 MiB, of a device's 40 MiB at most" in capsys.readouterr().out
    assert main([*arguments[:-1], str(tmp_path / "other"), "--cuda_graph", "False"]) == 0
    assert "graph" not in capsys.readouterr().out


BAD = {
    "does not fit the checkpoint, whose 4 x 4 latents make images of 8": ["--image_size", "256"],
    "--classes must be in 0..9, got \\[10\\]": ["--classes", "1,10"],
    "backend 'triton' cannot run this on cpu": ["--backend", "triton", "--device", "cpu"],
    "sampling steps must be in 1..1000, got 2000": ["--num_sampling_steps", "2000"],
    "seed must be >= 0, got -1": ["--seed", "-1"],
    "device 'nonsense' cannot be used": ["--device", "nonsense"],
}


@pytest.mark.parametrize("message", BAD)
def test_command_line_errors(message, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffit_kernels.ops.triton_launch.INTERPRETED", False)
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(tmp_path / "out")]
    assert main([*arguments, *BAD[message]]) == 2
    error = capsys.readouterr().err
    assert re.search(f"diffit-kernels: error: .*{message}", error), error
    good = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(tmp_path / "out")]
    assert main([*good, "--seed", "5"]) == 0, "a request that failed must not claim the folder"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_samples", "0"], "must be a whole number, at least 1, got '0'"),
        (["--num_samples", "3.5"], "must be a whole number, at least 1, got '3.5'"),
        (["--cfg_scale", "nan"], "must be a finite number, got 'nan'"),
        (["--split", "4/4"], "must be k/n with k < n, as '0/4', got '4/4'"),
        (["--cfg_cond", "maybe"], "must be True or False, got 'maybe'"),
        (["--classes", "cat"], "must be numbers with commas between, got 'cat'"),
        (["--backend", "cuda"], "invalid choice: 'cuda'"),
    ],
)
def test_command_line_rejects(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "--model_path", "x", *arguments])
    assert message in capsys.readouterr().err


def test_missing_model_is_an_error_and_not_a_trace(capsys):
    assert main(["sample", "--model_path", "nowhere.safetensors"]) == 2
    assert "no such file or folder: nowhere.safetensors" in capsys.readouterr().err


def test_packaged_checkpoint_by_name_also_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """As the README's command leaves one, which must be able to resume."""
    monkeypatch.chdir(tmp_path)
    arguments = [*SAMPLE, "--model_path", "digits", "--log_dir", "digits"]
    assert main(arguments) == main(arguments) == 0
    model = from_pretrained("digits")
    assert (model.input_size, model.num_classes) == (4, 10)


def test_log_dir_that_is_a_file(checkpoint, tmp_path, capsys):
    arguments = [*SAMPLE, "--model_path", str(checkpoint), "--log_dir", str(checkpoint)]
    assert main(arguments) == 2
    assert "diffit-kernels: error: " in capsys.readouterr().err


def test_a_killed_process_loses_at_most_its_batch(tmp_path):
    """kill -9 in the middle, then the same command again: the images of an undisturbed run."""
    command = [sys.executable, "-m", "diffit_kernels", "sample", "--model_path", "digits"]
    command += ["--num_samples", "24", "--batch_size", "4", "--num_sampling_steps", "40"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--log_dir", whole], check=True, capture_output=True)

    process = subprocess.Popen([*command, "--log_dir", killed], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("shards/*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("shards/*.npz")}
    assert 2 <= len(kept) < 6 and not list(killed.glob("*.npz"))

    resumed = subprocess.run([*command, "--log_dir", killed], check=True, capture_output=True)
    assert b"of 24 samples are in" in resumed.stdout
    assert all((killed / "shards" / n).stat().st_mtime_ns == t for n, t in kept.items())
    results = [folder / "samples_24x8x8x3.npz" for folder in (whole, killed)]
    assert results[0].read_bytes() == results[1].read_bytes()
