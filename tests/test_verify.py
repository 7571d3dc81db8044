"""The command verify: its numbers by hand, its verdict on ops that are wrong, and its errors."""

import contextlib
import gc
import io
import json
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffit_kernels import cell, from_pretrained, save_pretrained, verification
from diffit_kernels.cli import main
from diffit_kernels.commands import verify as command
from diffit_kernels.precision import PRECISIONS, products, refusal
from diffit_kernels.sampling import (
    denoise,
    denoised,
    guidance_steps,
    initial_noise,
    sample_generator,
    sigma_schedule,
)
from diffit_kernels.sampling import predict as predicting
from diffit_kernels.sampling.predict import Predictor
from diffit_kernels.verification import (
    FLOOR,
    LITERAL,
    Option,
    Row,
    Verification,
    options,
    relative_error,
    timing,
)
from diffit_kernels.verification.states import NO_SAVINGS
from tests import test_conditioning, test_model
from tests.conftest import DEVICES

pytest.importorskip("diffusers", reason="the sample extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = DEVICES[-1]
BATCH, STEPS, SEED = 3, 10, 5
QUICK = ["--num_sampling_steps", "2", "--batch_size", "2", "--repeat", "1"]
FUSED = "fused, float32"


@pytest.fixture(scope="module", autouse=True)
def fast_collections():
    """All that is imported is left out of them, which would take most of these tests' time."""
    gc.freeze()
    yield
    gc.unfreeze()


def run(capsys, tmp_path, *arguments):
    """(exit status, what was printed, the numbers or None)."""
    out = tmp_path / "numbers.json"
    given = [str(a) for a in arguments]
    status = main(["verify", "--device", DEVICE, "--out", str(out), *given])
    numbers = json.loads(out.read_text(), parse_constant=pytest.fail) if out.exists() else None
    captured = capsys.readouterr()
    return status, (captured.out if status < 2 else captured.err), numbers


def row(numbers, name):
    return next(row for row in numbers["rows"] if row["option"]["name"] == name)


@pytest.fixture(scope="module", params=["digits", "image_digits"])
def found(request, tmp_path_factory):
    """A whole run: (name, exit status, text, numbers)."""
    steps, out = (STEPS if request.param == "digits" else 2), io.StringIO()
    arguments = ["--model_path", request.param, "--batch_size", BATCH, "--seed", SEED]
    arguments += ["--num_sampling_steps", steps, "--repeat", 1, "--cfg_scale", 3]
    capture = SimpleNamespace(readouterr=lambda: SimpleNamespace(out=out.getvalue()))
    with contextlib.redirect_stdout(out):
        return request.param, *run(capture, tmp_path_factory.mktemp("verify"), *arguments)


def test_every_option_has_a_row_or_a_reason(found):
    name, status, text, numbers = found
    assert status == 0 and numbers["passed"] is True
    names = [row["option"]["name"] for row in numbers["rows"]]
    expected = [LITERAL.name, FUSED, *(f"fused, {p}" for p in PRECISIONS if p != "float32")]
    expected += ["fused, float32, guidance_eps 1e-3"] * (name == "digits")
    assert set(expected) <= set(names)
    words = " ".join(text.split())
    for row in numbers["rows"]:
        precision, reason = row["option"]["precision"], row["refused"]
        assert reason == refusal(precision, DEVICE)
        shown = f"{row['option']['name']} not run: {reason}" if reason else row["option"]["name"]
        assert shown in words
        if reason is None:
            steps = len(numbers["times"])
            assert len(row["errors"]) == len(row["milliseconds"]) == len(row["largest"]) == steps
            assert_the_line(row, numbers, text)
    assert numbers["rows"][0]["errors"] == [0] * len(numbers["times"])
    assert max(len(line) for line in text.splitlines()) <= 100
    assert f"torch {torch.__version__}" in words and "batch 3, seed 5" in words
    assert "exact, fused, float32: yes, at worst" in text


def assert_the_line(row, numbers, text):
    """An option's printed values are the largest and mean ones of its numbers."""
    line = next(line for line in text.splitlines() if line.startswith(row["option"]["name"] + "  "))
    cells, errors = line[34:].split(), row["errors"]
    if row["option"]["fused"]:
        worst = max(errors)
        at = f"{numbers['times'][errors.index(worst)]:.4g}"
        largest = max(row["largest"])
        values = [f"{worst:.2e}", at, f"{np.mean(errors):.2e}", f"{largest:.2e}"]
    else:
        values = ["0", "0", "0"]
    took, base = np.mean(row["milliseconds"]), np.mean(numbers["rows"][0]["milliseconds"])
    values += [f"{took:.2f}" if took < 1000 else f"{took:.0f}", f"{base / took:.2f}×"]
    assert cells[: len(values)] == values


def drawn(model):
    """The noise and classes of samples 0, 1 and 2 of this seed."""
    generators = [sample_generator(SEED, index) for index in range(BATCH)]
    labels = [int(torch.randint(10, (1,), generator=generator)) for generator in generators]
    return initial_noise(model, generators), torch.tensor(labels, device=DEVICE), generators


def assert_the_errors(row, index, ours, literal):
    ours, literal = (x.double().cpu().numpy() for x in (ours, literal))
    rms = np.sqrt(np.mean((ours - literal) ** 2)) / np.sqrt(np.mean(literal**2))
    assert row["errors"][index] == pytest.approx(rms, rel=1e-9) and rms > 0
    assert row["largest"][index] == pytest.approx(np.abs(ours - literal).max(), rel=1e-9)


@torch.inference_mode()
def latents_by_hand():
    literal = from_pretrained("digits", use_fused_tmsa=False, device=DEVICE)
    noise, labels, generators = drawn(literal)
    after = []
    process = {"num_steps": STEPS, "cfg_scale": 3.0, "savings": NO_SAVINGS}
    denoise(literal, noise, labels, generators=generators, on_step_end=after.append, **process)
    x, t, null = after[-2], torch.zeros_like(labels), torch.full_like(labels, 10)
    pair = torch.cat((x, x)), torch.cat((t, t)), torch.cat((labels, null))
    expected = literal.forward_with_cfg(*pair, cfg_scale=3.0)[:BATCH, :4]
    model = from_pretrained("digits", dtype=torch.bfloat16, device=DEVICE)
    predictor = Predictor(model, range(0, 1000, 111), 3.0)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ours = predictor(x.bfloat16(), predictor.condition(labels), step, True)[:, :4]
    return -1, ours, expected


@torch.inference_mode()
def images_by_hand():
    literal = from_pretrained("image_digits", use_fused_tmsa=False, device=DEVICE)
    noise, labels, _ = drawn(literal)

    def guided(model, x, sigma):
        both = torch.cat((labels, torch.full_like(labels, 10)))
        pair = denoised(model, torch.cat((x, x)), x.new_full((2 * BATCH,), sigma), both)
        return pair[BATCH:] + 3 * (pair[:BATCH] - pair[BATCH:])

    first, second, _ = sigma_schedule(2).tolist()
    x = first * noise.double()
    x = x + (second - first) * (x - guided(literal, x, first)) / first
    model = from_pretrained("image_digits", dtype=torch.bfloat16, device=DEVICE)
    return 1, guided(model, x, second), guided(literal, x, second)


def test_errors_are_those_by_hand(found):
    name, _, _, numbers = found
    with products("float32"):
        index, *tensors = {"digits": latents_by_hand, "image_digits": images_by_hand}[name]()
    assert_the_errors(row(numbers, "fused, bfloat16"), index, *tensors)


def test_guidance_eps_changes_its_steps_alone(found):
    name, _, _, numbers = found
    if name == "image_digits":
        assert "guidance_eps" not in str([row["option"]["name"] for row in numbers["rows"]])
        return
    plain, skipping = (row(numbers, FUSED + more) for more in ("", ", guidance_eps 1e-3"))
    times, model = numbers["times"], from_pretrained(name)
    exact, skipped = (set(guidance_steps(model, times, 3.0, 4.0, eps)) for eps in (0, 1e-3))
    pairs = enumerate(zip(plain["errors"], skipping["errors"], strict=True))
    assert {i for i, (a, b) in pairs if a != b} == exact - skipped != set()


def test_relative_error():
    ours, literal = torch.tensor([3.0, -1.0]), torch.tensor([3.0, 4.0])
    assert relative_error(ours, literal) == pytest.approx(1.0, rel=1e-15)
    assert relative_error(literal, literal) == 0 == relative_error(0 * ours, 0 * ours)
    assert relative_error(ours, 0 * ours) == math.inf
    assert math.isnan(relative_error(ours * math.nan, ours))
    tiny = torch.tensor([1e-30, 1e-30])
    assert relative_error(3 * tiny, tiny) == pytest.approx(2, rel=1e-6), "squares would vanish"


@pytest.mark.parametrize("factor, exact", [(1.0, True), (1 + 1e-9, False), (math.nan, False)])
def test_one_step_decides_the_verdict(factor, exact):
    literal = Row(LITERAL, errors_of_float64=[1e-7, 0.0])
    ours = Row(Option("x", "x", exact=True), errors_of_float64=[3e-8, FLOOR * factor])
    verdict = Verification("eps", "t", "ddpm", [999, 0], None, None, True, [literal, ours])
    assert verdict.bounds == [2e-7 + FLOOR, FLOOR]
    assert verdict.passed is exact is verdict.is_exact(ours)
    good = replace(ours, errors_of_float64=[0.0, 0.0])
    assert replace(verdict, rows=[literal, good, ours]).passed is exact, "every one must be"
    refused = replace(verdict, rows=[literal, Row(ours.option, refused="no kernel")])
    assert not refused.passed and replace(refused, checked=False).passed


def wrong_guidance(monkeypatch, factor=1.001):
    """The fused path's guidance alone; the literal model has its own."""
    right = predicting.guide
    monkeypatch.setattr(predicting, "guide", lambda out, weight: right(out, weight * factor))


def wrong_norm(monkeypatch):
    right = cell.group_norm_silu
    monkeypatch.setattr(cell, "group_norm_silu", lambda *a, **k: right(*a, **k) * 1.00001)


@pytest.mark.parametrize("name, breaks", [("digits", wrong_guidance), ("image_digits", wrong_norm)])
def test_a_wrong_op_is_found(name, breaks, capsys, tmp_path, monkeypatch):
    breaks(monkeypatch)
    status, text, numbers = run(capsys, tmp_path, "--model_path", name, *QUICK)
    assert status == 1 and numbers["passed"] is False
    assert row(numbers, FUSED)["is_exact"] is False
    verdict = text[text.index("exact, fused, float32: NO, ") :]
    assert f"at {numbers['time']} = " in verdict
    status, text, numbers = run(capsys, tmp_path, "--model_path", name, *QUICK, "--check", "no")
    assert status == 0 and "exact: not checked (--check False)" in text
    assert row(numbers, FUSED)["errors_of_float64"] is None


def test_what_is_not_finite_is_named(capsys, tmp_path, monkeypatch):
    wrong_guidance(monkeypatch, math.nan)
    status, text, numbers = run(capsys, tmp_path, "--model_path", "digits", *QUICK)
    assert status == 1
    assert "\nfused, float32: NaN or infinite at t = 0\n" in text, "at 999 there is no guidance"
    assert row(numbers, FUSED)["errors"][1] == "nan" and row(numbers, FUSED)["errors"][0] < 1e-5


def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model.safetensors")
    return ["--model_path", tmp_path / "model.safetensors", *QUICK]


def test_float16_that_overflows(capsys, tmp_path):
    model = test_model.small(learn_sigma=False)  # or its noise would overflow in float32
    model.final_layer.linear.weight.data *= 1e6
    status, text, numbers = run(capsys, tmp_path, *saved(model, tmp_path))
    assert status == 0 and "fused, float16: NaN or infinite at t = 999, 0\n" in text
    assert all(isinstance(error, str) for error in row(numbers, "fused, float16")["errors"])
    assert all(error < 1 for error in row(numbers, "fused, bfloat16")["errors"])


@pytest.mark.parametrize(
    "model, sampler, guidance",
    [
        (lambda: test_conditioning.random_model("adaln_zero"), "ddpm", (1.5, 0)),
        (lambda: test_conditioning.random_model("tmsa+adaln"), "ddpm", (4.4, 4)),
        (lambda: test_model.small(learn_sigma=False), "ddim", (4.4, 4)),
        (lambda: test_model.small(input_size=64, patch_size=8), "ddpm", (1.49, 4)),
    ],
    ids=["DiT", "both", "without variances", "512 pixels"],
)
def test_other_models(model, sampler, guidance, capsys, tmp_path):
    status, _, numbers = run(capsys, tmp_path, *saved(model().eval(), tmp_path))
    assert status == 0 and row(numbers, FUSED)["is_exact"] is True
    assert (numbers["sampler"], numbers["cfg_scale"], numbers["scale_pow"]) == (sampler, *guidance)
    assert min(row(numbers, "fused, bfloat16")["errors"]) > 0


def test_fp8_where_the_device_has_it(capsys, tmp_path, monkeypatch):
    """A CPU computes it too, with its refusal taken away."""
    monkeypatch.setattr("diffit_kernels.precision.refusal", lambda *_: None)
    monkeypatch.setattr(verification, "refusal", lambda *_: None)
    _, text, numbers = run(capsys, tmp_path, "--model_path", "digits", *QUICK)
    fp8, bfloat16 = (row(numbers, f"fused, {name}")["errors"] for name in ("fp8", "bfloat16"))
    assert all(a > b for a, b in zip(fp8, bfloat16, strict=True)) and "not run" not in text


def refuse(*args, **kwargs):
    raise NotImplementedError("no kernel for this.\nBackends that can: none")


def test_an_exact_option_that_does_not_run_is_no_success(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "time_parts", refuse)
    status, text, numbers = run(capsys, tmp_path, "--model_path", "digits", *QUICK)
    assert status == 1 and "exact, fused, float32: NOT CHECKED, it did not run" in text
    assert row(numbers, "fused, bfloat16")["refused"] == "no kernel for this."
    assert row(numbers, FUSED)["errors"] is None and "    no kernel for this.\n" in text
    unchecked = ["--model_path", "digits", *QUICK, "--check", "False"]
    assert run(capsys, tmp_path, *unchecked)[0] == 0


def test_one_model_is_in_memory_at_a_time(capsys, tmp_path, monkeypatch):
    loaded = []

    def load(*args, **kwargs):
        assert not any(model() for _, model in loaded), loaded
        model = from_pretrained(*args, **kwargs)
        loaded.append((kwargs["dtype"], weakref.ref(model)))
        return model

    monkeypatch.setattr(command, "from_pretrained", load)
    assert run(capsys, tmp_path, "--model_path", "digits", *QUICK)[0] == 0
    dtypes = [dtype for dtype, _ in loaded]
    assert dtypes[:3] == [torch.float32, torch.float64, torch.float32]


def test_products_are_those_of_the_precision(capsys, tmp_path, monkeypatch):
    """And TF32 is off in what is compared with."""
    made, right = [], products
    for module in (timing, verification):
        monkeypatch.setattr(module, "products", lambda name: made.append(name) or right(name))
    monkeypatch.setattr("diffit_kernels.precision.refusal", lambda *_: None)
    monkeypatch.setattr(verification, "refusal", lambda *_: None)
    run(capsys, tmp_path, "--model_path", "image_digits", *QUICK)
    of_trajectory_and_literal_models = ["float32"] * 3
    assert made == [*of_trajectory_and_literal_models, *PRECISIONS]


class Ticking:
    """States, and their evaluation, that takes so many seconds of a clock that it moves itself."""

    times, note, now = [9, 0], None, 0.0
    seconds = iter((100, 1, 10, 7, 30, 2, 20))  # of the warm-up, and three times over both states

    def evaluation(self, *_):
        return self

    def run(self):
        self.now += next(self.seconds)
        return torch.zeros(1)

    warm_up = run

    def place(self, index):
        self.now += 1000


def test_a_step_takes_the_median_of_its_repetitions(monkeypatch):
    ticking, calls = Ticking(), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: ticking.now)
    models = timing.Models(lambda precision: torch.nn.Linear(1, 1))
    found = timing.measured(models, ticking, LITERAL, 3, lambda: calls.append(1))
    assert found.milliseconds == [2000, 20000] and len(calls) == 6


def test_steps_that_are_captured(capsys, tmp_path, monkeypatch):
    """As on CUDA: what is replayed is what runs, and a failure is said."""
    command = ["--model_path", "digits", *QUICK]
    plain = run(capsys, tmp_path, *command)[2]
    captures = []

    def capture_for(predictor, *_):
        return (
            (lambda runs: captures.append(runs) or (runs, 0))
            if predictor.savings.step_graph
            else None
        )

    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", capture_for)
    captured = run(capsys, tmp_path, *command)[2]
    measured = [r for r in captured["rows"] if r["refused"] is None]
    assert len(captures) == sum(r["option"]["savings"]["step_graph"] for r in measured) > 1
    assert [r["errors"] for r in captured["rows"]] == [r["errors"] for r in plain["rows"]]

    def fail(runs):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", lambda *_: fail)
    status, text, numbers = run(capsys, tmp_path, *command)
    assert status == 0 and "    without a step graph: operation not permitted\n" in text
    assert [r["errors"] for r in numbers["rows"]] == [r["errors"] for r in plain["rows"]]


def test_a_page_of_a_gpu_fits(capsys, tmp_path, monkeypatch):
    """All columns there can be: every option, and memory."""
    names = [option.name for option in options(torch.device("cuda"), True)]
    assert names.index("fused, float32, no step graph") == 1

    def verify(load, settings, on_evaluation):
        rows = [
            Row(option, None, [1.0], [1.0], [123456.7], [1e-3], 123456.7)
            for option in (LITERAL, *options(torch.device("cuda"), True))
        ]
        return Verification("denoised image", "sigma", "heun", [0.1234567], 1, None, True, rows)

    monkeypatch.setattr(command, "verify", verify)
    status, text, _ = run(capsys, tmp_path, "--model_path", "digits")
    assert status == 0 and max(len(line) for line in text.splitlines()) <= 100
    assert "no graph" in text and "  MiB\n" in text
    assert text.count("\nexact, fused, float32") == 2


def test_a_model_that_was_never_trained(capsys, tmp_path):
    model = test_model.small()
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    status, text, _ = run(capsys, tmp_path, *saved(model, tmp_path))
    assert status == 2 and "every epsilon of the checkpoint is zero" in text
