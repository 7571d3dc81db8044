"""Latents on disk, and the order in which examples/train_latents.py reads them."""

import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_data import Latents, batches, order


def shards(folder, sizes, dtype=torch.float32):
    folder.mkdir()
    latents, labels = torch.randn(sum(sizes), 4, 2, 2).to(dtype), torch.arange(sum(sizes)) % 3
    parts = zip(latents.split(sizes), labels.split(sizes), strict=True)
    for index, (some, theirs) in enumerate(parts):
        tensors = {"latents": some.contiguous(), "labels": theirs.contiguous()}
        save_file(tensors, folder / f"{index:04d}.safetensors")
    return latents, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_one_sequence(dtype, tmp_path):
    latents, labels = shards(tmp_path / "shards", [5, 1, 0, 7], dtype)
    data = Latents(tmp_path / "shards", scale=0.5)
    assert len(data) == 13 and data.shape == (4, 2, 2)
    for indices in (torch.randperm(13), torch.tensor([4, 5, 6]), torch.arange(0)):
        some, theirs = data.read(indices)
        assert some.dtype == torch.float32 and torch.equal(some, latents[indices].float() * 0.5)
        assert torch.equal(theirs, labels[indices])


def test_every_form_of_a_file_gives_the_same_latents(tmp_path):
    latents = np.random.default_rng(0).standard_normal((6, 4, 2, 2), np.float32)
    labels = np.arange(6, dtype=np.int32)
    np.savez(tmp_path / "plain.npz", latents=latents, labels=labels)
    np.savez_compressed(tmp_path / "small.npz", arr_0=latents, arr_1=labels)
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(latents), arr_1=labels)
    with zipfile.ZipFile(tmp_path / "old.npz", "w") as archive:
        for name, array in (("latents", latents), ("labels", labels)):
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, version=(2, 0))
    rows = torch.tensor([3, 0, 5])
    for name, mapped in (("plain", True), ("small", False), ("columns", False), ("old", True)):
        data = Latents(tmp_path / f"{name}.npz")
        assert isinstance(data._shards[0], np.memmap) == mapped, name
        some, theirs = data.read(rows)
        assert np.array_equal(some, latents[rows.numpy()]) and torch.equal(theirs, rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_files_are_mapped_and_not_read(form, tmp_path):
    """What the process owns grows by far less than the file's 64 MiB."""
    latents, labels = np.zeros((2**14, 4, 16, 16), np.float32), np.zeros(2**14, int)
    path = tmp_path / f"latents.{form}"
    if form == "npz":
        np.savez(path, latents=latents, labels=labels)
    else:
        save_file({"latents": torch.from_numpy(latents), "labels": torch.from_numpy(labels)}, path)
        path = tmp_path
    before = own_memory()
    data = Latents(path)
    data.read(torch.arange(0, 2**14, 1000))
    assert own_memory() - before < 8 * 2**20


def own_memory():
    """Bytes of this process that are no file's."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_order_is_shuffled_epochs_in_a_row():
    places = order(7, seed=1, begin=0, end=21)
    for epoch in places.split(7):
        assert epoch.sort().values.tolist() == list(range(7))
    assert not torch.equal(places[:7], places[7:14])
    assert not torch.equal(places, order(7, seed=2, begin=0, end=21))
    parts = [order(7, 1, begin, begin + 3) for begin in range(0, 21, 3)]
    assert torch.equal(torch.cat(parts), places)


def test_a_batch_larger_than_the_data(tmp_path):
    latents, _ = shards(tmp_path / "shards", [3])
    data = Latents(tmp_path / "shards")
    found = list(batches(data, 0, 8, range(2), slice(1, None, 2)))
    places = order(3, 0, 0, 16)
    expected = latents[torch.cat((places[1:8:2], places[9:16:2]))]
    assert torch.equal(torch.cat([batch[0] for batch in found]), expected)


BAD_DATA = {
    "no such file or folder": None,
    "cannot be read: File is not a zip file": b"PK\3\4 and no more",
    "it needs latents or arr_0, and has \\['x'\\]": {"x": np.zeros(3)},
    "it needs labels or arr_1": {"arr_0": np.zeros((2, 4, 4, 4), np.float32)},
    "latents must be \\(N, C, S, S\\), got \\(2, 8, 8, 3\\)": {
        "arr_0": np.zeros((2, 8, 8, 3), np.uint8),
        "arr_1": np.zeros(2, int),
    },
    "latents must be floating point, got torch.uint8": {
        "arr_0": np.zeros((2, 4, 8, 8), np.uint8),
        "arr_1": np.zeros(2, int),
    },
    "labels must be integers, got torch.float32": {
        "arr_0": np.zeros((2, 4, 4, 4), np.float32),
        "arr_1": np.zeros(2, np.float32),
    },
    "labels must be \\(2,\\), one per latent, got \\(3,\\)": {
        "arr_0": np.zeros((2, 4, 4, 4), np.float32),
        "arr_1": np.zeros(3, int),
    },
    "there are no latents in it": {
        "arr_0": np.zeros((0, 4, 4, 4), np.float32),
        "arr_1": np.zeros(0, int),
    },
    "cannot be read: Object arrays cannot be loaded": {
        "arr_0": np.array([None, {}]),
        "arr_1": np.zeros(2, int),
    },
    "cannot be read: can't convert np.ndarray of type numpy.str_": {
        "arr_0": np.array(["a", "b"]),
        "arr_1": np.zeros(2, int),
    },
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_files(message, tmp_path):
    path, content = tmp_path / "bad.npz", BAD_DATA[message]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"bad.npz.*{message}"):
        Latents(path)


def test_bad_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder has no \.safetensors files"):
        Latents(tmp_path)
    labels = torch.zeros(2, dtype=torch.int32)
    save_file({"latents": torch.zeros(2, 4, 4, 4), "labels": labels}, tmp_path / "a.safetensors")
    shard = tmp_path / "b.safetensors"
    save_file({"latents": torch.zeros(2, 4, 8, 8), "labels": labels}, shard)
    message = r"b.safetensors: latents must be \(4, 4, 4\) like those of a.safetensors, got \(4, 8"
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be read"):
        Latents(tmp_path)
    save_file({"latents": torch.zeros(2, 4, 4, 4)}, shard)
    with pytest.raises(ValueError, match=r"it needs labels or arr_1, and has \['latents'\]"):
        Latents(tmp_path)


def test_labels_out_of_range(tmp_path):
    shards(tmp_path / "shards", [5])
    data = Latents(tmp_path / "shards")
    data.check_labels(3)
    with pytest.raises(ValueError, match=r"shards: labels must be in 0\.\.1, got 0\.\.2"):
        data.check_labels(2)
