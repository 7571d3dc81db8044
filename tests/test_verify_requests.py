"""The command verify: bad requests, interruption, and the file that it writes."""

import pytest
import torch

from diffit_kernels import from_pretrained
from diffit_kernels.commands import verify as command
from diffit_kernels.sampling import predict as predicting
from tests.test_verify import QUICK, run

pytest.importorskip("diffusers", reason="the sample extra is not installed")


def test_a_file_is_there_whole_or_as_it_was(capsys, tmp_path, monkeypatch):
    out = tmp_path / "numbers.json"
    out.write_text('"before"')
    arguments = ["--model_path", "digits", *QUICK]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(predicting, "guide", interrupted)
        status, text, numbers = run(capsys, tmp_path, *arguments)
        assert status == 130 and numbers == "before" and "interrupted" in text
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", interrupted)
        assert run(capsys, tmp_path, *arguments)[0] == 130 and out.read_text() == '"before"'
    assert run(capsys, tmp_path, *arguments)[2]["passed"] is True
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model_path", "nowhere"], "no such file or folder: nowhere"),
        (["--model_path", __file__], "is corrupt, or holds more than tensors"),
        (["--model_path", "digits", "--seed", -1], "--seed must be >= 0, got -1"),
        (["--model_path", "digits", "--num_sampling_steps", 1001], "in 1..1000, got 1001"),
        (["--model_path", "digits", "--image_size", 8], "this one is latent: 8"),
        (["--model_path", "image_digits", "--image_size", 9], "images have 8"),
        (["--model_path", "image_digits", "--scale_pow", 1], "--scale_pow is for latent"),
        (["--model_path", "digits", "--out", "/nowhere/a.json"], "no folder /nowhere"),
    ],
)
def test_bad_requests(arguments, message, capsys, tmp_path):
    status, text, numbers = run(capsys, tmp_path, *arguments)
    assert status == 2 and message in text and numbers is None


def test_arguments_that_are_none(capsys, tmp_path):
    for bad in (["--repeat", "0"], ["--cfg_scale", "nan"], ["--check", "maybe"]):
        with pytest.raises(SystemExit, match="2"):
            run(capsys, tmp_path, "--model_path", "digits", *bad)


def test_no_memory_for_float64_is_said_early(capsys, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        if kwargs["dtype"] == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(command, "from_pretrained", load)
    status, text, _ = run(capsys, tmp_path, "--model_path", "digits", *QUICK)
    assert status == 2 and "--check False does without" in text
