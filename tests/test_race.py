"""The benchmarks' harness: what errs is not timed, what is slow loses, a row says all."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import measure, race, rows

ROOT = Path(__file__).parents[1]
# What a reader needs of a row of something that was timed; all but the last line's have a value.
FIELDS = """benchmark case provider role parameters dtype sizes status median_s p20_s p80_s rounds
tflop_per_s gb_per_s floor_s floor_by of_floor peak_mib max_error allowed_error device threads
python torch triton commit dirty sources time cpu instructions
backend cuda driver reason"""


class Replay:
    """As much of pytest-benchmark's fixture as a race needs."""

    enabled = True

    def pedantic(self, function, rounds):
        start = race.replayed()
        for _ in range(rounds):
            function()
        self.seconds = race.replayed() - start


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(race, "_races", {})
    return race.Case("sum x", "sum", {"shape": "x"}, "float32", {"batch": 2}, 1e6, 1e4, budget=0.02)


def column_sum(x):
    return x.sum(0)


def providers(**functions):
    """Column sums of the same numbers; by the role in front of their names, all ours otherwise."""
    x = torch.randn(256, 64)
    expected = race.literally(column_sum, [x])
    return {
        name: race.provider(function, [x], None, expected, name.partition("_")[0])
        for name, function in functions.items()
    }


def enter(case, name, entries):
    found = []
    try:
        result = race.enter(Replay(), case, name, lambda: entries, list(entries), found.extend)
    except BaseException as failure:  # pytest's skip is one
        return failure, found
    return result, found


def wrong_by(error):
    """A column sum with an error of this share of the largest value."""

    def function(x):
        out = x.sum(0)
        out[0] += error * out.abs().max()
        return out

    return function


def slow(x):
    time.sleep(0.003)
    return x.sum(0)


def test_a_planted_wrong_kernel_is_refused_and_not_timed(case):
    entries = providers(peer_literal=column_sum, ours_wrong=wrong_by(1e-3))
    failure, found = enter(case, "ours_wrong", entries)
    assert isinstance(failure, race.WrongError)
    assert re.match(r"result 0: error 1\.\de-03, allowed \d\.\de-0[67]: not timed", str(failure))
    good, bad = found
    assert good["status"] == "timed" and good["median_s"] > 0
    assert bad["status"] == "refused" and bad["reason"] == str(failure)
    assert bad["median_s"] is bad["tflop_per_s"] is bad["of_floor"] is None and bad["rounds"] == 0


def test_nan_is_refused(case):
    failure, (row,) = enter(case, "ours", providers(ours=lambda x: x.sum(0) * torch.nan))
    assert isinstance(failure, race.WrongError) and row["status"] == "refused"


def test_wrong_gradients_are_refused(case):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum(0)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad.expand(256, 64)

    x, grad = torch.randn(256, 64, requires_grad=True), torch.randn(64)
    expected = race.literally(column_sum, [x], grad)
    entries = {
        name: race.provider(function, [x], grad, expected, "ours")
        for name, function in (("right", column_sum), ("wrong", Doubled.apply))
    }
    failure, (right, wrong) = enter(case, "wrong", entries)
    assert str(failure).startswith("result 1: ") and wrong["status"] == "refused"
    assert right["status"] == "timed"


def test_peers_may_err_four_times_as_much_and_no_more(case):
    eps = torch.finfo(torch.float32).eps
    entries = providers(
        ours=wrong_by(10 * eps), peer_near=wrong_by(10 * eps), peer_far=wrong_by(40 * eps)
    )
    _, (ours, near, far) = enter(case, "ours", entries)
    assert [row["status"] for row in (ours, near, far)] == ["refused", "timed", "refused"]
    assert near["max_error"] < near["allowed_error"]


def test_a_case_of_a_whole_model_has_a_tolerance_and_no_more(case):
    entries = providers(ours=wrong_by(1e-5), ours_far=wrong_by(3e-5))
    _, (near, far) = enter(replace(case, tolerance=race.RECORDINGS), "ours", entries)
    assert (near["status"], near["allowed_error"]) == ("timed", race.RECORDINGS)
    assert far["status"] == "refused"


def test_a_wrong_peer_is_reported_by_a_skip(case):
    failure, _ = enter(case, "peer", providers(peer=wrong_by(1.0), ours=column_sum))
    assert isinstance(failure, pytest.skip.Exception)
    assert str(failure).startswith("refused: result 0: error 1.0e+00")


def test_a_planted_slow_kernel_loses(case):
    result, (peer, ours) = enter(case, "ours", providers(peer=column_sum, ours=slow))
    assert ours["median_s"] > 0.003 > 2 * peer["median_s"]
    assert ours["of_floor"] < peer["of_floor"]
    assert ours["p20_s"] <= ours["median_s"] <= ours["p80_s"]
    assert len(result.durations) == ours["rounds"] >= race.LEAST


def test_providers_run_in_turns(case):
    order = []

    def noting(name):
        def function(x):
            order.append(name)
            return x.sum(0)

        return function

    enter(case, "ours_a", providers(ours_a=noting("a"), ours_b=noting("b")))
    rounds = order[4:-2]  # each is verified and warmed up before them, the last is for memory
    assert len(rounds) >= 2 * race.LEAST
    assert all({*pair} == {"a", "b"} for pair in zip(rounds[::2], rounds[1::2], strict=True))
    assert len({*zip(rounds[::2], rounds[1::2], strict=True)}) == 2  # in no fixed order


def test_no_step_moves_the_parameters_before_all_are_verified(case):
    weight = torch.ones(64)

    def scaled(x):
        return weight * x.sum(0)

    entries = providers(ours=scaled, ours_too=scaled)
    for entry in entries.values():
        entry.step = lambda: weight.mul_(2.0)
    _, found = enter(case, "ours", entries)
    assert [row["status"] for row in found] == ["timed", "timed"] and weight[0] > 2


def test_what_breaks_when_it_is_timed_has_failed(case):
    entries = providers(ours=column_sum, peer=column_sum)

    def breaks():
        raise MemoryError("no more")

    entries["peer"].step = breaks
    _, (ours, peer) = enter(case, "ours", entries)
    assert ours["status"] == "timed" and ours["rounds"] >= race.LEAST
    assert (peer["status"], peer["reason"]) == ("failed", "MemoryError: no more")


def test_what_cannot_run_is_missing_or_failed_and_others_go_on(case):
    def refuses(x):
        raise NotImplementedError("no kernels for this\nin many lines")

    def breaks(x):
        raise RuntimeError("No available kernel. Aborting execution.")

    entries = providers(ours=column_sum, ours_absent=refuses, peer_broken=breaks)
    entries["peer_gone"] = "Liger is not installed"
    _, found = enter(case, "ours", entries)
    assert {row["provider"]: (row["status"], row["reason"]) for row in found} == {
        "ours": ("timed", None),
        "ours_absent": ("missing", "cannot run this: no kernels for this"),
        "peer_broken": ("failed", "RuntimeError: No available kernel. Aborting execution."),
        "peer_gone": ("missing", "Liger is not installed"),
    }
    for name in ("ours_absent", "peer_broken", "peer_gone"):
        failure, again = enter(case, name, entries)
        assert isinstance(failure, pytest.skip.Exception) and again == []  # rows come once


def test_ours_that_breaks_fails_its_entry(case):
    def breaks(x):
        raise RuntimeError("illegal memory access")

    failure, (row,) = enter(case, "ours", providers(ours=breaks))
    assert isinstance(failure, RuntimeError) and row["status"] == "failed"


def test_a_lost_device_ends_the_run_with_the_row_of_who_lost_it(case, monkeypatch):
    def breaks(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "lost", lambda: True)
    failure, (row,) = enter(case, "ours", providers(ours=column_sum, ours_bad=breaks))
    assert isinstance(failure, pytest.exit.Exception) and "ours_bad" in str(failure)
    assert (row["provider"], row["status"]) == ("ours_bad", "failed")


def test_a_row_has_every_field(case):
    _, (row,) = enter(case, "ours", providers(ours=column_sum))
    assert {*row} == {*FIELDS.split()}
    assert json.loads(json.dumps(row)) == row
    required = " ".join(FIELDS.splitlines()[:-1]).split()
    unset = [name for name in required if row[name] is None]
    assert not unset or unset == ["commit", "dirty"]  # a tree without git
    assert row["tflop_per_s"] == pytest.approx(1e6 / row["median_s"] / 1e12)
    assert row["gb_per_s"] == pytest.approx(1e4 / row["median_s"] / 1e9)
    assert row["of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])


def test_the_floor_is_the_larger_of_both_ceilings_or_a_provider(case):
    arithmetic, bandwidth = measure.arithmetic("float32"), measure.bandwidth()
    entries = providers(ours=column_sum, floor=column_sum)
    for flops, moved, by, floor in (
        (1e9, 1e3, "arithmetic", 1e9 / arithmetic),
        (1e3, 1e9, "bandwidth", 1e9 / bandwidth),
        (1e3, None, "arithmetic", 1e3 / arithmetic),
        (None, None, None, None),
    ):
        about = replace(case, name=f"{flops} {moved}", flops=flops, moved=moved)
        _, (row, _) = enter(about, "ours", entries)
        assert (row["floor_by"], row["floor_s"]) == (by, pytest.approx(floor))
    _, (row, floor) = enter(replace(case, floor="floor"), "ours", entries)
    assert row["floor_by"] == "floor" and row["floor_s"] == floor["median_s"]


def test_the_clock_replays_what_was_measured(case):
    benchmark = Replay()
    entries = providers(ours=column_sum)
    result = race.enter(benchmark, case, "ours", lambda: entries, ["ours"])
    assert benchmark.seconds == pytest.approx(sum(result.durations))


@pytest.mark.skipif(measure.peak_memory(lambda: None) is None, reason="nobody counts memory here")
def test_peak_memory_is_what_a_step_takes(case):
    size = 64 * 2**20

    def step():
        a = torch.ones(size // 4)
        del a
        b = torch.ones(size // 4)
        return b + 1

    for _ in range(3):  # what an earlier step has freed hides nothing
        step()
        assert measure.peak_memory(step) == pytest.approx(2 * 64, abs=4)


def test_rows_survive_a_torn_line_and_the_later_counts(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    first = {"benchmark": "a", "case": "b", "provider": "c", "median_s": 1}
    rows.append(path, [first, first | {"case": "d"}])
    with open(path, "a") as file:
        file.write('{"benchmark": "a", "ca')
    rows.append(path, [first | {"median_s": 2}])
    assert rows.read(path) == [first | {"median_s": 2}, first | {"case": "d"}]
    path.write_text('{"machine_info": {}}\n')
    with pytest.raises(ValueError, match="line 1: not a row of measurements"):
        rows.read(path)


def run_suite(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_floors.py", *arguments]
    # Else it takes itself for a worker of pytest-xdist, where pytest-benchmark times nothing.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = outside | {"COLUMNS": "200"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_suite_writes_rows_goes_on_and_keeps_its_budget(tmp_path):
    path = tmp_path / "rows.jsonl"
    selection = ("-k", "copy")
    status, text = run_suite(*selection, "--budget", "0", "--rows", str(path))
    assert status == 0 and "the budget of 0 s is spent" in text and not path.exists(), text
    status, text = run_suite(*selection, "--rows", str(path))
    assert status == 0, text
    (row,) = rows.read(path)
    assert row["status"] == "timed" and row["sources"] == rows.sources()
    status, text = run_suite(*selection, "--rows", str(path), "--resume")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED, text
    rows.append(path, [row | {"sources": "another"}])  # measured by other code: again
    status, text = run_suite(*selection, "--rows", str(path), "--resume")
    assert status == 0 and "1 passed" in text, text
    rows.append(path, [row | {"status": "failed"}])  # it may end a run: not again
    status, text = run_suite(*selection, "--rows", str(path), "--resume")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED, text
    status, text = run_suite("--resume")
    assert status == pytest.ExitCode.USAGE_ERROR and "--resume: needs --rows" in text
