"""A sampling run by several processes and threads: the bytes of one, whatever becomes of them."""

import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffit_kernels import from_pretrained
from diffit_kernels.cli import main
from diffit_kernels.commands import sample as command
from diffit_kernels.sampling import processes as processes_module
from diffit_kernels.sampling.decode import shuffle_decoder
from diffit_kernels.sampling.processes import Processes, fresh_part, own_device
from diffit_kernels.sampling.run import SamplingRun, Settings

pytest.importorskip("diffusers", reason="the sample extra is not installed")

ROOT = Path(__file__).parents[1]
TIMEOUT = 120  # seconds; a run takes a few
SAMPLES, BATCH, STEPS = 22, 4, 3


def arguments(folder, model="digits"):
    sizes = {"num_samples": SAMPLES, "batch_size": BATCH, "num_sampling_steps": STEPS}
    given = {"model_path": model, "log_dir": folder, "device": "cpu", **sizes}
    return ["sample", *(str(part) for name in given for part in (f"--{name}", given[name]))]


def torchrun(count, *words):
    """What ``torchrun`` leaves of a module's run by ``count`` processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, "--nproc_per_node", str(count), "-m", *words],
        cwd=ROOT,
        env=environment,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def one_thread():
    """The products of a process that torchrun starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def result(folder):
    (path,) = folder.glob("samples_*.npz")
    return path.name, path.read_bytes()


@pytest.mark.parametrize("model", ["digits", "image_digits"])
def test_two_processes_write_the_bytes_of_one(model, tmp_path, one_thread):
    both = torchrun(2, "diffit_kernels", *arguments(tmp_path / "two", model))
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("wrote") == 2 and "100%" in both.stderr
    assert main(arguments(tmp_path / "one", model)) == 0
    assert result(tmp_path / "two") == result(tmp_path / "one")
    assert (tmp_path / "two" / "grid.png").exists()
    stored = [sorted(p.name for p in (tmp_path / n / "shards").iterdir()) for n in ("one", "two")]
    assert stored[0] == stored[1] and len(stored[0]) == 6


def test_after_a_kill_another_number_of_processes_goes_on(tmp_path, one_thread, capsys):
    folder = tmp_path / "killed"
    killed = torchrun(2, "tests.sampling_worker", "kill", *arguments(folder))
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/*.npz")}
    assert len(kept) == 2 and not list(folder.glob("*.npz"))
    assert main(arguments(folder)) == 0
    assert "8 of 22 samples are in" in capsys.readouterr().out
    assert all((folder / "shards" / n).stat().st_mtime_ns == t for n, t in kept.items())
    assert main(arguments(tmp_path / "one")) == 0
    assert result(folder) == result(tmp_path / "one")


def test_a_process_that_raises_ends_the_run_with_its_message(tmp_path):
    """The other is asleep for longer than torchrun is waited for here."""
    raised = torchrun(2, "tests.sampling_worker", "raise", *arguments(tmp_path))
    assert raised.returncode != 0
    assert "diffit-kernels: error: planted in process 1" in raised.stderr
    assert len(list(tmp_path.glob("shards/*.npz"))) == 2 and not list(tmp_path.glob("*.npz"))


def test_split_and_torchrun_are_refused_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert main([*arguments(tmp_path), "--split", "1/3"]) == 2
    expected = "--split is for processes started by hand, and torchrun deals batches to its own"
    assert f"{expected}: leave it out, got 1/3" in capsys.readouterr().err


def test_each_process_has_its_gpu(monkeypatch):
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_processes_take_each_thing_once_and_count_together():
    store = dist.HashStore()
    two = [Processes(rank, 2, store) for rank in range(2)]
    for process in two:
        process.begin()
    assert [process.take(name) for name in "ab" for process in two] == [True, False] * 2
    assert [process.advance(5) for process in two] == [5, 10]
    seen = []
    two[1].finish(seen.append)
    two[0].finish(seen.append)
    assert seen == [10, 10]


def test_processes_that_torchrun_starts_anew_count_from_nothing():
    """With what the start before left in the store, and the first process late."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            others = [threads.submit(fresh_part, store, rank, 3) for rank in (1, 2)]
            parts = [threads.submit(fresh_part, store, 0, 3), *others]
            assert [part.result(TIMEOUT).add("done", 1) for part in parts] == [1, 2, 3]


def test_a_process_that_stands_still_is_given_up(monkeypatch):
    monkeypatch.setattr(processes_module, "PATIENCE", 0.1)
    message = r"1 of 2 processes are not done, and made no step for 0\.1 seconds"
    with pytest.raises(TimeoutError, match=message):
        Processes(0, 2, dist.HashStore()).finish(lambda done: None)
    with pytest.raises(ConnectionError, match=r"process 1 cannot reach the other processes"):
        Processes(1, 2, dist.HashStore()).begin()


def test_shards_that_do_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "APPEARANCE", 0)
    sampling = SamplingRun(tmp_path, Settings("", STEPS, 2.0, 4.0, False, 3, "float32", ()))
    assert command._left(sampling, 5, Processes(0, 1, dist.HashStore())) == 5
    with pytest.raises(OSError, match=r"5 of 5 samples are not in .* one folder for all"):
        command._left(sampling, 5, Processes(0, 2, dist.HashStore()))


@pytest.fixture(scope="module")
def model():
    return from_pretrained("digits")


@pytest.fixture
def sampling(tmp_path):
    return SamplingRun(tmp_path, Settings("", STEPS, 2.0, 4.0, False, 3, "float32", ()))


def test_overlap_changes_no_byte(tmp_path):
    for folder, overlap in (("a", "True"), ("b", "False")):
        assert main([*arguments(tmp_path / folder), "--overlap", overlap]) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_one_batch_is_decoded_while_the_next_is_sampled(model, sampling):
    steps, threads = [], set()

    def slow(latents):
        threads.add(threading.current_thread())
        time.sleep(0.2)
        return shuffle_decoder()(latents)

    def on_step(samples):
        stored = len(list(sampling.shards.glob("*.npz")))
        steps.append(len(steps) // STEPS - stored)  # batches in memory, but for this one

    sampling.sample(model, SAMPLES, BATCH, slow, on_step)
    assert set(steps) <= {0, 1} and 1 in steps
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_a_decoder_s_error_ends_the_run_at_the_next_step(model, sampling):
    steps = []

    def broken(latents):
        if len(steps) > STEPS:
            raise OSError("planted")
        return shuffle_decoder()(latents)

    def on_step(samples):
        steps.append(samples)
        time.sleep(0.05)

    with pytest.raises(OSError, match="planted"):
        sampling.sample(model, SAMPLES, BATCH, broken, on_step)
    assert len(steps) < 4 * STEPS


def test_the_last_batch_s_error_is_raised(model, sampling):
    def broken(latents):
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        sampling.sample(model, BATCH, BATCH, broken)


def test_interrupted_keeps_the_batch_that_is_being_decoded(model, sampling):
    interrupted = threading.Event()

    def waiting(latents):
        assert interrupted.wait(TIMEOUT)
        return shuffle_decoder()(latents)

    steps = []

    def on_step(samples):
        steps.append(samples)
        if len(steps) == STEPS + 1:
            interrupted.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampling.sample(model, SAMPLES, BATCH, waiting, on_step)
    assert sampling.missing(SAMPLES) == list(range(BATCH, SAMPLES))


def test_batches_are_the_same_stretches_whatever_is_there(model, sampling):
    sampling.sample(model, 6, 6, None)
    taken = []
    sampling.sample(model, SAMPLES, BATCH, None, take=lambda name: bool(taken.append(name)))
    spans = ["06-00000008", "08-00000012", "12-00000016", "16-00000020", "20-00000022"]
    assert taken == [f"000000{span}.npz" for span in spans]
    assert len(sampling.missing(SAMPLES)) == SAMPLES - 6, "others' batches are left to them"


def test_a_slow_process_takes_fewer_batches(model, sampling):
    store = dist.HashStore()
    taken = ([], [])

    def part(rank):
        def take(name):
            mine = Processes(rank, 2, store).take(name)
            taken[rank].extend([name] * mine)
            return mine

        run = SamplingRun(sampling.folder, sampling.settings)
        run.sample(model, SAMPLES, BATCH, None, lambda samples: time.sleep(0.5 * rank), take=take)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(part, range(2)))
    assert len(taken[1]) < len(taken[0]) and len(taken[0] + taken[1]) == 6
    assert not sampling.missing(SAMPLES)


def test_stored_latents_are_decoded_by_those_who_take_them(model, sampling):
    sampling.sample(model, SAMPLES, BATCH, None)
    decoded = []

    def decoder(latents):
        decoded.append(len(latents))
        return shuffle_decoder()(latents)

    sampling.decode_stored(decoder, lambda name: name == "decoding 00000004-00000008.npz")
    assert decoded == [4]
    sampling.decode_stored(decoder)
    assert decoded == [4, 4, 4, 4, 4, 2]


def test_assembly_holds_one_shard(model, sampling):
    big = np.random.default_rng(0).integers(256, size=(BATCH, 512, 512, 3), dtype=np.uint8)
    sampling.sample(model, SAMPLES, BATCH, lambda latents: big[: len(latents)])
    tracemalloc.start()
    try:
        path = sampling.assemble(SAMPLES, "images")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert big.nbytes < peak < 1.5 * big.nbytes
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"][20:], big[:2]) and file["arr_1"].shape == (SAMPLES,)


def test_samplers_reach_the_run_and_older_records_resume(tmp_path, capsys):
    assert main([*arguments(tmp_path), "--use_ddim"]) == 0
    record = tmp_path / "run.json"
    written = json.loads(record.read_text())
    assert (written["sampler"], written["use_ddim"], written["guidance_eps"]) == ("ddim", True, 0)
    older = {key: value for key, value in written.items() if key not in ("sampler", "guidance_eps")}
    record.write_text(json.dumps(older))
    assert main([*arguments(tmp_path), "--sampler", "ddim"]) == 0
    assert "22 of 22 samples are in" in capsys.readouterr().out
    for more, message in (
        (["--sampler", "unipc"], "sampler was ddim, is now unipc"),
        (["--use_ddim", "--guidance_eps", "0.01"], "guidance_eps was 0.0, is now 0.01"),
        (["--use_ddim", "--sampler", "unipc"], "use_ddim=True is sampler='ddim'"),
        (["--guidance_eps", "-1"], "guidance_eps must be >= 0, got -1"),
    ):
        assert main([*arguments(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--sampler", "unipc"], ["--guidance_eps", "0.1"]])
def test_samplers_of_latent_models_are_refused_in_image_space(more, tmp_path, capsys):
    assert main([*arguments(tmp_path, "image_digits"), *more]) == 2
    assert f"{more[0]} is for latent models" in capsys.readouterr().err
