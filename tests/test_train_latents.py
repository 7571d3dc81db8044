"""examples/train_latents.py: runs that are killed, data and checkpoints that are bad, processes."""

import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tqdm", reason="the train extra is not installed")


import run_folder
from diffit_kernels import from_pretrained
from diffit_kernels.cli import main as diffit_kernels
from tests import killable
from tests.killable import ROOT
from tests.parity import assert_close
from train_latents import main

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = ROOT / "examples" / "train_latents.py"
SAVE_CALLS = 6  # sync the losses; sync, rename the weights; sync, rename the checkpoint; the folder
CLEAN_CALLS = 3  # sync, rename the losses, and sync the folder, before the first step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 latents of 3 classes in one file."""
    path = tmp_path_factory.mktemp("data") / "latents.npz"
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((40, 4, 4, 4), np.float32)
    np.savez(path, arr_0=latents, arr_1=np.arange(40) % 3)
    return path


def arguments(data, out, **changes):
    """A run of 12 steps of a tiny model that saves at every second step."""
    flags = {
        "data": data,
        "out": out,
        "model": "digits",
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
        "steps": 12,
        "batch_size": 6,
        "lr": 3e-3,
        "warm_up": 3,
        "save_every": 2,
        "log_every": 1,
        "device": "cpu",
        **changes,
    }
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items())
    return [part for pair in pairs for part in pair]


def losses(out):
    """(steps, 2) as they were written."""
    lines = (out / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,noise,variance"
    rows = [line.split(",") for line in lines[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return torch.tensor([[float(x) for x in row[1:]] for row in rows], dtype=torch.float64)


def assert_same_run(out, whole):
    """To the bit: every loss, the weights, and all tensors of the checkpoint."""
    assert (out / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    assert (out / "weights.safetensors").read_bytes() == (
        whole / "weights.safetensors"
    ).read_bytes()
    ours, expected = (torch.load(folder / "checkpoint.pt") for folder in (out, whole))
    assert ours["step"] == expected["step"] and ours["scaler"] == expected["scaler"]
    for name in ("model", "ema"):
        for key, value in expected[name].items():
            assert torch.equal(ours[name][key], value), (name, key)
    for index, entries in expected["optimizer"]["state"].items():
        for key, value in entries.items():
            assert torch.equal(ours["optimizer"]["state"][index][key], value), (index, key)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "losses.csv",
        "weights.safetensors",
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    killable.finish(killable.start(arguments(data, out)))
    return out


def test_losses_fall_and_weights_stay_finite(data, tmp_path):
    assert main(arguments(data, tmp_path, steps=60, save_every=60, batch_size=32)) == 0
    noise = losses(tmp_path)[:, 0]
    assert noise[-10:].mean() < 0.97 * noise[:10].mean()
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "weights.safetensors").values()
    )


def test_a_run_in_parts_is_the_run(data, whole, tmp_path, capsys):
    for steps in (0, 3, 8, 12, 12):
        assert steps == 0 or main(arguments(data, tmp_path, steps=steps)) == 0
    assert_same_run(tmp_path, whole)
    assert "weights of step 12" in capsys.readouterr().out


def kill_at_random(argv, out, seed, kills):
    """Start and kill ``kills`` processes at any step, and anywhere in it; then let one finish."""
    chance, log, killed = random.Random(seed), out / "losses.csv", 0
    for _ in range(kills):
        process, step = killable.start(argv), chance.randrange(10)
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") > step):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -9
    assert killed >= kills / 2
    killable.finish(killable.start(argv))


def test_a_run_killed_at_any_moment_goes_on_to_the_bit(data, whole, tmp_path):
    kill_at_random(arguments(data, tmp_path), tmp_path, seed=0, kills=8)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_run_killed_at_many_moments_goes_on_to_the_bit(seed, data, whole, tmp_path):
    kill_at_random(arguments(data, tmp_path), tmp_path, seed, kills=10)
    assert_same_run(tmp_path, whole)


def test_a_run_killed_while_it_writes_goes_on_to_the_bit(data, whole, tmp_path):
    """Killed as soon as a checkpoint is seen that is not whole, which stays behind."""
    hits, out = 0, tmp_path / "run"
    for _ in range(20):
        process = killable.start(arguments(data, out))
        half = out / f".checkpoint.pt.{process.pid}"
        while process.is_alive() and not half.exists():
            pass
        process.kill()
        process.join()
        hits += half.exists()
        if hits == 2:
            break
        if process.exitcode == 0:  # it ended before it was seen
            shutil.rmtree(out)
    assert hits == 2
    killable.finish(killable.start(arguments(data, out)))
    assert_same_run(out, whole)


def test_a_run_killed_between_the_calls_of_a_save_goes_on_to_the_bit(data, whole, tmp_path):
    """In place of each sync and rename of the second save, and of the start, of each run."""
    step = 0
    for call in range(1, CLEAN_CALLS + 2 * SAVE_CALLS + 1):
        if CLEAN_CALLS < call <= CLEAN_CALLS + SAVE_CALLS:
            continue
        process = killable.start(arguments(data, tmp_path, steps=40), killed_before=call)
        process.join(120)
        assert process.exitcode == -9
        if (tmp_path / "checkpoint.pt").exists():
            before, step = step, torch.load(tmp_path / "checkpoint.pt")["step"]
            assert step >= before and step % 2 == 0
    assert step == 2 * (SAVE_CALLS + 1)  # the last run's second checkpoint was in place
    killable.finish(killable.start(arguments(data, tmp_path, steps=step)))
    other = tmp_path / "other"
    killable.finish(killable.start(arguments(data, other, steps=step)))
    (folder := tmp_path / "killed").mkdir()
    for name in ("checkpoint.pt", "losses.csv", "weights.safetensors"):
        (tmp_path / name).rename(folder / name)
    assert_same_run(folder, other)


def test_a_damaged_checkpoint_is_refused_and_stays(data, whole, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    good = (whole / "checkpoint.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for content, message in (
        (good[: len(good) // 2], "is damaged: File is not a zip file"),
        (b"", "is damaged: File is not a zip file"),
        (bytes(flipped), "is damaged: .*checksum"),
    ):
        path.write_bytes(content)
        assert_refused(arguments(data, tmp_path), message, capsys)
        assert path.read_bytes() == content
    torch.save({"weights": 1}, path)
    assert_refused(arguments(data, tmp_path), "is no checkpoint of this example", capsys)
    torch.save(Unsafe(), path)
    assert_refused(arguments(data, tmp_path), "is damaged: Weights only load failed", capsys)


class Unsafe:
    def __reduce__(self):
        return print, ("this must not run",)


def assert_refused(argv, message, capsys):
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err and "must not run" not in captured.out


def test_other_settings_are_refused_by_name(data, whole, tmp_path, capsys):
    before = (whole / "checkpoint.pt").read_bytes()
    for changes, message in (
        (
            {"lr": 0.1, "batch_size": 8},
            "step 12 of another run: --batch-size was 6, is now 8; --lr was",
        ),
        ({"hidden_size": 48}, "--hidden-size was 24, is now 48"),
        ({"dtype": "bfloat16"}, "--dtype was float32, is now bfloat16"),
        ({"schedule": "cosine"}, "--schedule was constant, is now cosine; --steps was None"),
    ):
        assert_refused(arguments(data, whole, **changes), message, capsys)
    other = tmp_path / "other.npz"
    np.savez(other, latents=np.zeros((40, 4, 4, 4), np.float32), labels=np.zeros(40, int))
    assert_refused(arguments(other, whole), "--data was 40x4x4x4, labels .*, is now 40x4", capsys)
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_what_decides_nothing_may_change(data, whole, tmp_path):
    """The literal equations and recomputed blocks go on from the fused run's checkpoint."""
    for flag, steps in (("--no-use-fused-tmsa", 5), ("--gradient-checkpointing", 12)):
        assert main([*arguments(data, tmp_path, steps=steps, log_every=2), flag]) == 0
    text = (tmp_path / "losses.csv").read_text().splitlines()
    assert_close(
        torch.tensor([float(x) for x in text[-1].split(",")[1:]]), losses(whole)[-1].float(), 1e-4
    )


def test_bad_data(tmp_path, capsys):
    """test_latent_data.py has every kind."""
    path = tmp_path / "latents.npz"
    assert_refused(arguments(path, tmp_path), "npz: no such file or folder", capsys)
    np.savez(path, latents=np.zeros((4, 4, 5, 5), np.float32), labels=np.arange(4))
    assert_refused(arguments(path, tmp_path), "labels must be in 0..2, got 0..3", capsys)
    odd = arguments(path, tmp_path, num_classes=4, patch_size=2)
    assert_refused(odd, "input_size must be a multiple of patch_size", capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"lr": "nan"}, "--lr must be positive, got nan"),
        ({"label_dropout": 1}, r"--label-dropout must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(changes, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(data, tmp_path, **changes))
    assert re.search(message, capsys.readouterr().err)


def test_bad_sizes_and_places(data, tmp_path, capsys):
    for changes, message in (
        ({"depth": 0}, "DiffiT: depth must be at least 1, got 0"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads"),
    ):
        assert_refused(arguments(data, tmp_path / "run", **changes), message, capsys)
    (tmp_path / "file").touch()
    assert_refused(arguments(data, tmp_path / "file"), "File exists", capsys)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    argv = arguments(data, tmp_path, steps=4)
    assert main(argv) == 0
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    argv = arguments(data, tmp_path, steps=8)
    argv[argv.index("--data") + 1] = str(spoiled := tmp_path / "nan.npz")
    np.savez(spoiled, latents=np.full((40, 4, 4, 4), np.nan, np.float32), labels=np.arange(40) % 3)
    assert_refused(argv, "the loss of step 5 is not finite: noise nan", capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes(dtype, data, tmp_path):
    """With weights in float32, and the gradient's scale kept over a stop."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for out, steps in ((parts, 5), (parts, 12), (whole, 12)):
        assert main(arguments(data, out, steps=steps, dtype=dtype)) == 0
    assert_same_run(parts, whole)
    assert losses(parts).isfinite().all()
    state = torch.load(parts / "checkpoint.pt")
    assert all(value.dtype in (torch.float32, torch.int64) for value in state["model"].values())
    assert bool(state["scaler"]) == (dtype == "float16")


def test_a_cosine_run_resumes(data, tmp_path, capsys):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    argv = arguments(data, parts, schedule="cosine")
    process = killable.start(argv, killed_before=CLEAN_CALLS + 2 * SAVE_CALLS)
    process.join(120)
    killable.finish(killable.start(argv))
    killable.finish(killable.start(arguments(data, whole, schedule="cosine")))
    assert_same_run(parts, whole)
    assert_refused(
        arguments(data, parts, schedule="cosine", steps=24), "--steps was 12, is now 24", capsys
    )


def test_weights_load_and_sample_and_samples_train(data, whole, tmp_path, capsys):
    """A circle: train, sample latents, train on them."""
    weights = whole / "weights.safetensors"
    model = from_pretrained(weights)
    assert (model.num_classes, model.num_heads, len(model.blocks)) == (3, 2, 2)
    ema = torch.load(whole / "checkpoint.pt")["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in model.named_parameters())
    pytest.importorskip("diffusers", reason="the sample extra is not installed")
    command = ["sample", "--model_path", weights, "--num_samples", 6, "--num_sampling_steps", 4]
    command += ["--log_dir", tmp_path / "samples", "--vae", "none", "--device", "cpu"]
    assert diffit_kernels([str(word) for word in command]) == 0
    samples = tmp_path / "samples" / "latents_6x4x4x4.npz"
    assert main(arguments(samples, tmp_path / "again", steps=2)) == 0


def test_two_processes_make_the_steps_of_one(data, whole, tmp_path):
    """From the command line, under torchrun; half-way on by one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, SCRIPT, *arguments(data, tmp_path, steps=6)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("weights of step 6") == 1
    assert main(arguments(data, tmp_path)) == 0
    assert_close(losses(tmp_path), losses(whole), 1e-5)
    x, t, y = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999]), torch.tensor([0, 1, 3])
    ours, expected = (from_pretrained(out / "weights.safetensors") for out in (tmp_path, whole))
    assert_close(ours(x, t, y), expected(x, t, y), 1e-4)


@pytest.mark.slow
def test_the_command_line_runs_compiled(data, whole, tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments(data, tmp_path), "--compile"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert_close(losses(tmp_path), losses(whole), 1e-4)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    run_folder.write_whole(path, lambda file: file.write(b"whole"))

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_folder.write_whole(path, fail)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
