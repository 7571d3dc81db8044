"""Where Triton kernels get their tile sizes, what they take of a GPU, and how tables are made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")

from benchmarks import cases, measure, resources, tune
from diffit_kernels.ops import triton_launch, window_attention
from diffit_kernels.ops.triton_launch import Config, Tunable, forcing, key_text, keys_used
from diffit_kernels.ops.window_attention import launch as tiles

ROOT = Path(__file__).parent.parent
KEY = {"dtype": "bfloat16", "tokens": 256, "head_dim": 72}


@pytest.fixture
def tunable():
    yield Tunable(
        "toy.kernel",
        lambda capability, dtype, size: Config({"BLOCK": capability}),
        lambda dtype, size: [Config({"BLOCK": 16}), Config({"BLOCK": 32})],
    )
    triton_launch.TUNABLES.pop("toy.kernel")


def test_the_tuned_table_comes_before_the_heuristic(tunable, tmp_path, monkeypatch):
    key = {"dtype": "float32", "size": 5}
    table = tune.TunedTable(tmp_path / "Some_GPU.json")
    table.add("toy.kernel", key, Config({"BLOCK": 7}, 2, 3), 0.25)
    monkeypatch.setattr(triton_launch, "TUNED", tmp_path)
    monkeypatch.setattr(triton_launch, "target_of", lambda device: (90, "Some_GPU"))
    triton_launch._tuned_table.cache_clear()
    device = torch.device("cpu")
    assert tunable.config(device, **key) == Config({"BLOCK": 7}, 2, 3)
    assert tunable.config(device, **{**key, "size": 6}) == Config({"BLOCK": 90})
    with forcing("toy.kernel", key, Config({"BLOCK": 1})):
        assert tunable.config(device, **key) == Config({"BLOCK": 1})
    monkeypatch.setattr(triton_launch, "target_of", lambda device: (80, "Other_GPU"))
    assert tunable.config(device, **key) == Config({"BLOCK": 80})
    triton_launch._tuned_table.cache_clear()


@pytest.mark.parametrize("content", ["", "[]", '{"kernels": {"a": {"b": {}}}}'])
def test_a_broken_table_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "Broken.json").write_text(content)
    monkeypatch.setattr(triton_launch, "TUNED", tmp_path)
    with pytest.raises(ValueError, match=r"Broken\.json is not a table of tile sizes .* delete it"):
        triton_launch._tuned_table("Broken")


def test_keys_are_written_in_one_order():
    assert (
        key_text(KEY) == key_text(dict(reversed(KEY.items()))) == "bfloat16 head_dim=72 tokens=256"
    )


def test_tuned_tables_in_the_repository_are_read():
    """Every committed entry names a known kernel, and has what a launch needs."""
    for path in triton_launch.TUNED.glob("*.json"):
        for name, entries in triton_launch._tuned_table(path.stem).items():
            assert name in triton_launch.TUNABLES, f"{path.name}: {name}"
            assert all(isinstance(config, Config) for config in entries.values())


@pytest.mark.parametrize(
    "head_dim, wide, narrow",
    [
        (8, (16, 0), (16, 0)),
        (40, (32, 16), (32, 16)),
        (72, (64, 16), (64, 16)),
        (96, (64, 32), (64, 32)),
        (104, (128, 0), (64, 64)),
        (128, (128, 0), (64, 64)),
    ],
)
def test_parts_cover_the_head(head_dim, wide, narrow):
    assert tiles.parts(head_dim) == wide and tiles.parts(head_dim, 64) == narrow


def test_splits_cover_all_items_once():
    for items in (0, 1, 7, 1024, 4096):
        for programs in (1, 8, 3000):
            splits, each = tiles.split(items, programs)
            assert splits * each >= items and (splits - 1) * each < max(items, 1)


def test_tuning_keeps_the_fastest_that_computes_the_same(tmp_path, monkeypatch):
    """On a small case, with a clock of our own by which the last candidate is the fastest."""
    case = "window_attention small"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ticks = iter(range(10_000, 0, -1))

    def clock(run):
        run()
        return float(next(ticks))

    monkeypatch.setattr(tune, "TUNED", tmp_path)
    monkeypatch.setattr(tune, "DTYPES", {"float16": torch.float16})
    path = tune.tune(case, 600, clock, device)
    key = {"dtype": "float16", "tokens": 16, "head_dim": 8}
    entry = json.loads(path.read_text())["kernels"]["window_attention.small"][key_text(key)]
    last = tiles.SMALL_BACKWARD.candidates(**key)[-1]
    assert entry["num_warps"] == last.num_warps and entry["num_stages"] == last.num_stages
    before = path.read_text()
    tune.tune(case, 600, lambda run: pytest.fail("tuned again"), device)
    assert path.read_text() == before


def test_a_candidate_that_computes_something_else_is_dropped():
    right = [torch.ones(3), torch.zeros(2), torch.ones(0)]
    assert tune._agree([torch.ones(3) + 1e-7, *right[1:]], right, 1e-5)
    assert not tune._agree([torch.ones(3) + 1e-3, *right[1:]], right, 1e-5)
    assert not tune._agree([torch.full((3,), float("nan")), *right[1:]], right, 1e-5)


def test_tuning_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tuning would run")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        tune.tune("", 1)


def test_recording_runs_nothing_and_asks_for_the_target():
    with triton_launch.recording(80) as ampere, keys_used() as used:
        cases.CASES["window_attention 256px"](torch.bfloat16)
    with triton_launch.recording(90) as hopper:
        cases.CASES["window_attention 256px"](torch.bfloat16)
    names = ["forward_kernel", "query_kernel", "key_kernel", "table_kernel", "reduce_kernel"]
    assert [call.kernel.__name__ for call in ampere] == names
    assert ("window_attention.query", key_text(KEY)) in used
    assert ampere[0].config != hopper[0].config


def test_triton_refuses_by_name():
    qkv = torch.randn(1, 40, 4, 3 * 16)
    cpu = {"num_heads": 2, "window_size": (40, 4), "backend": "triton"}
    with pytest.raises(NotImplementedError, match=r"sides must be at most 32, got \(40, 4\)"):
        window_attention(qkv, **cpu)
    with pytest.raises(NotImplementedError, match=r"multiple of 8 .* got 4\. Backends that can"):
        window_attention(qkv[:, :4], **{**cpu, "num_heads": 4, "window_size": 4})


def test_without_interpreter_a_cpu_tensor_is_refused(monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    reason = triton_launch.refusal(torch.zeros(1))
    assert reason == "Triton kernels run on NVIDIA GPUs, got tensors on cpu"


CORE = "256px|512px|8x8 d32|4x4 d32|7x7 d32|adaln zero|group_norm 32|28 blocks"


def test_every_kernel_compiles_everywhere_without_spills(tmp_path):
    """All kernels at the real model's sizes, ahead of time: see benchmarks/resources.py."""
    rows = compiled(tmp_path, "--only", CORE, "--dtype", "bfloat16", "--dtype", "float32")
    assert {row["kernel"] for row in rows} == resources.kernels()


@pytest.mark.slow
def test_every_case_and_dtype_compiles_everywhere_without_spills(tmp_path):
    rows = compiled(tmp_path)
    assert {row["kernel"] for row in rows} == resources.kernels()
    assert {row["case"] for row in rows} == set(cases.CASES)
    assert {row["dtype"] for row in rows} == set(cases.DTYPES)


def compiled(folder, *arguments):
    out = folder / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "resources", "--json", str(out), *arguments]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(resources.TARGETS)
    assert all(row["registers"] > 0 for row in rows)
    return rows


@pytest.mark.parametrize("dtype, precision", [("tf32", "tf32"), ("float32", "ieee")])
def test_float32_products_are_tf32_where_pytorch_allows_it(dtype, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    with measure.with_dtype(dtype):
        assert triton_launch.dtype_name(torch.float32) == dtype
        assert triton_launch.dot_precision(torch.float32) == precision
        assert triton_launch.dot_precision(torch.bfloat16) == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before
