"""Samples compared with samples of the same seeds, and the files that hold them."""

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from diffit_kernels.cli import main
from diffit_kernels.sampling.compare import compare
from diffit_kernels.sampling.npz import ImageFile
from tests.image_files import images, written


def test_command_compares(tmp_path, capsys):
    ours, theirs = images(5, side=2), images(5, side=2)
    theirs[1, 0, 0, 0] ^= 1  # one of 12 bytes, by 1
    theirs[3, :, :, 0] = ours[3, :, :, 0] ^ 2
    labels = np.arange(5)
    a = written(tmp_path / "a.npz", ours, labels)
    b = written(tmp_path / "b.npz", theirs, labels)
    assert main(["evaluate", str(a), "--compare", str(b), "--batch_size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found == {
        "num_images": 5,
        "psnr_min": pytest.approx(10 * math.log10(255**2 * 12 / 16)),
        "psnr_median": "inf",
        "psnr_max": "inf",
        "largest_difference": 2,
        "equal_bytes": 55 / 60,
        "equal_images": 3,
        "differs_most": 3,
        "differing_labels": 0,
    }
    assert main(["evaluate", str(a), "--compare", str(b)]) == 0
    text = capsys.readouterr().out
    assert "median inf" in text and "index 3" in text and "labels              equal" in text


def test_compare_of_equal_and_of_opposite_images(tmp_path):
    same = ImageFile(written(tmp_path / "a.npz", images(3), save=np.savez_compressed))
    found = compare(same, same)
    assert found.psnr_min == math.inf and found.differs_most is None and found.equal_bytes == 1
    assert found.differing_labels is None
    black = ImageFile(written(tmp_path / "b.npz", np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)))
    white = ImageFile(written(tmp_path / "c.npz", np.full((2, 4, 4, 3), 255, np.uint8), np.ones(2)))
    found = compare(black, white)
    assert found.psnr_max == 0 and found.largest_difference == 255 and found.equal_bytes == 0
    assert found.differing_labels == 1


def test_compare_reads_what_sample_writes(tmp_path, capsys):
    """The same seeds, fused and by the published equations."""
    pytest.importorskip("diffusers", reason="the sample extra is not installed")
    command = ["sample", "--model_path", "digits", "--num_samples", "4"]
    command += ["--num_sampling_steps", "5", "--batch_size", "3"]
    for name in ("fused", "plain"):
        folder = tmp_path / name
        flag = str(name == "fused")
        assert main([*command, "--log_dir", str(folder), "--use_fused_tmsa", flag]) == 0
    capsys.readouterr()
    files = [str(tmp_path / name / "samples_4x8x8x3.npz") for name in ("fused", "plain")]
    assert main(["evaluate", files[0], "--compare", files[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["largest_difference"] <= 1 and found["differing_labels"] == 0


def test_compare_keeps_a_batch_in_memory(tmp_path):
    """Of 12 MB in each file."""
    a = ImageFile(written(tmp_path / "a.npz", images(4000, side=32)))
    b = ImageFile(written(tmp_path / "b.npz", images(4000, side=32, seed=1)))
    tracemalloc.start()
    try:
        assert compare(a, b, batch_size=8).num_images == 4000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_images_are_read_a_batch_at_a_time(tmp_path):
    whole = images(7)
    for save in (np.savez, np.savez_compressed):
        file = ImageFile(written(tmp_path / "a.npz", whole, save=save))
        parts = list(file.batches(3))
        assert [len(part) for part in parts] == [3, 3, 1] and file.shape == (7, 4, 4, 3)
        assert np.array_equal(np.concatenate(parts), whole) and file.labels is None


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: nowhere"):
        ImageFile(Path("nowhere"))
    text = tmp_path / "a.npz"
    text.write_text("no archive")
    with pytest.raises(ValueError, match=r"a\.npz is no .npz file"):
        ImageFile(text)
    with pytest.raises(ValueError, match=r"must be uint8 images, .* got float32 \(2, 4, 4, 3\)"):
        ImageFile(written(tmp_path / "b.npz", np.zeros((2, 4, 4, 3), np.float32)))
    pickled = written(tmp_path / "c.npz", images(2), np.array([{}, {}]))
    with pytest.raises(ValueError, match=r"c.npz cannot be read: .*allow_pickle"):
        _ = ImageFile(pickled).labels
    none = ImageFile(written(tmp_path / "d.npz", other=np.zeros(2)))
    with pytest.raises(ValueError, match=r"has no images \(arr_0\); it has \['other'\]"):
        next(none.batches(2))
    content = bytearray(written(tmp_path / "e.npz", images(20)).read_bytes())
    content[1000] ^= 255
    (tmp_path / "e.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.npz cannot be read: Bad CRC-32"):
        list(ImageFile(tmp_path / "e.npz").batches(20))


def test_compare_errors(tmp_path):
    file = ImageFile(written(tmp_path / "a.npz", images(3)))
    other = ImageFile(written(tmp_path / "b.npz", images(3, side=8)))
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4, 4, 3\) in .* and \(3, 8, 8, 3\)"):
        compare(file, other)
    with pytest.raises(ValueError, match=r"c\.npz has no images"):
        compare(file, ImageFile(written(tmp_path / "c.npz", other=np.zeros(2))))
    labelled = ImageFile(written(tmp_path / "d.npz", images(3), np.arange(2)))
    with pytest.raises(ValueError, match=r"one for each of 3 images, got shape \(2,\)"):
        compare(labelled, labelled)
