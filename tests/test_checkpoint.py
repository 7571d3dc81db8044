"""from_pretrained: every form users have, and one clear error for everything else."""

import builtins
import pickle

import pytest
import torch
from safetensors.torch import save_file

from diffit_kernels import DiffiT, from_pretrained
from diffit_kernels.checkpoint_files import open_checkpoint
from diffit_kernels.checkpoint_latent import infer_config
from tests.parity import assert_close

CONFIG = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.5,
    "num_classes": 7,
    "learn_sigma": True,
}
INPUTS = torch.ones(2, 4, 8, 8), torch.tensor([1, 900]), torch.tensor([3, 7])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiffiT(**CONFIG).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    return model


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "bare": lambda state: state,
    "ema": lambda state: {"ema": state, "model": {"x": torch.zeros(1)}, "step": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1e-4}},
    "state_dict": lambda state: {"state_dict": state},
    "nested": lambda state: {"state_dict": {"ema": state}},
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: {"model": prefixed(state, "_orig_mod.module.")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pt_files(form, zipped, model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(FORMS[form](model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    check_loaded(from_pretrained(path), model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "ema.", "model.module."])
@pytest.mark.parametrize("name", ["model.safetensors", "no_suffix"])
def test_safetensors_files(prefix, name, model, tmp_path):
    save_file(prefixed(model.state_dict(), prefix), tmp_path / name)
    check_loaded(from_pretrained(str(tmp_path / name)), model)


def check_loaded(loaded, model):
    assert loaded.use_fused_tmsa and not loaded.training
    assert not loaded.pos_embed.requires_grad
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert_close(loaded(*INPUTS), model(*INPUTS), 2e-5)
    loaded.train()(*INPUTS).sum().backward()


def test_arguments(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    loaded = from_pretrained(
        tmp_path, use_fused_tmsa=False, dtype=torch.bfloat16, device="cpu", backend="eager"
    )
    assert not loaded.use_fused_tmsa and loaded.backend == "eager"
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    save_file(prefixed(model.state_dict(), "module."), tmp_path / "b.safetensors")
    from_pretrained(tmp_path, "b.safetensors")
    with pytest.raises(ValueError, match=r"say which with filename=.*a\.safetensors.*b\.safeten"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'c\.safetensors'"):
        from_pretrained(tmp_path, "c.safetensors")
    with pytest.raises(ValueError, match="filename='c' has no use"):
        from_pretrained(tmp_path / "a.safetensors", "c")
    for dtype in (torch.int8, "float16"):
        with pytest.raises(TypeError, match="dtype must be one of"):
            from_pretrained(tmp_path, dtype=dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_the_files_dtype_is_kept(stored, model, tmp_path):
    save_file(model.to(stored).state_dict(), tmp_path / "a.safetensors")
    assert from_pretrained(tmp_path).x_embedder.proj.weight.dtype == stored


def test_mixed_dtypes_become_float32(model, tmp_path):
    model.blocks.bfloat16()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 6, "patch_size": 1},
        {"in_channels": 3, "learn_sigma": False},
        {"depth": 1, "num_heads": 6, "mlp_ratio": 49 / 48},
        {"num_classes": 1},
        {"conditioning": "adaln_zero"},
        {"conditioning": "tmsa+adaln"},
        {"conditioning": "adaln_zero", "position_bias": False, "hidden_size": 384, "num_heads": 6},
        {"position_bias": False, "hidden_size": 384, "num_heads": 6},
    ],
)
def test_configuration_is_inferred(change, tmp_path):
    config = CONFIG | {"conditioning": "tmsa", "position_bias": True} | change
    model = DiffiT(**config)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as tensors:
        inferred = infer_config(tensors.shapes)
    assert inferred.pop("mlp_ratio") == pytest.approx(config.pop("mlp_ratio"))
    assert inferred == config
    from_pretrained(tmp_path)


def test_heads_that_no_table_tells(model, tmp_path):
    path = tmp_path / "a.safetensors"
    bare = DiffiT(**CONFIG, conditioning="adaln_zero", position_bias=False)
    save_file(bare.state_dict(), path)
    with pytest.raises(ValueError, match=r"published width .* of 48: give config=\{\"num_heads\""):
        from_pretrained(path)
    assert from_pretrained(path, config={"num_heads": 4}).num_heads == 4
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads"):
        from_pretrained(path, config={"num_heads": 5})
    with pytest.raises(TypeError, match=r"config has \['heads'\], which DiffiT has not"):
        from_pretrained(path, config={"heads": 4})
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"misshapen: blocks.0.attn.relative_position_bias_table"):
        from_pretrained(path, config={"num_heads": 4})


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "legacy.pt"])
def test_truncated_files(keep, name, model, tmp_path):
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(
            model.state_dict(), path, _use_new_zipfile_serialization=not name.startswith("legacy")
        )
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{path.name} is (no intact|corrupt)"):
        from_pretrained(path)


def test_random_bytes(tmp_path):
    path = tmp_path / "noise.pt"
    path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes())
    with pytest.raises(ValueError, match=r"noise\.pt is (no intact|corrupt)"):
        from_pretrained(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("pickled code was executed",)


def test_pickled_code_is_never_executed(model, tmp_path):
    for name, content in (
        ("bomb.pt", {"model": model.state_dict(), "args": Bomb()}),
        ("m.pt", model),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="executing its pickled code, which is never done"):
            from_pretrained(tmp_path / name)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"never done|no intact"):
        from_pretrained(tmp_path / "raw.pt")


MISFITS = {
    r"missing: blocks\.1\.mlp\.fc1\.bias": lambda s: s.pop("blocks.1.mlp.fc1.bias"),
    "unexpected: blocks.0.norm1.weight": lambda s: s.update(
        {"blocks.0.norm1.weight": torch.ones(48)}
    ),
    r"misshapen: blocks\.0\.attn\.proj\.bias \(3,\) instead of \(48,\)": lambda s: s.update(
        {"blocks.0.attn.proj.bias": torch.ones(3)}
    ),
    r"missing: blocks\.0\.attn\.relative_position_index": lambda s: s.pop(
        "blocks.0.attn.relative_position_index"
    ),
    r"another window layout: blocks\.0\.attn\.relative_position_index": lambda s: s[
        "blocks.0.attn.relative_position_index"
    ].copy_(s["blocks.0.attn.relative_position_index"].T.clone()),
    "it lacks y_embedder.embedding_table.weight": lambda s: s.update(
        {"y_embedder.embedding_table.weight": torch.zeros(0, 48)}
    ),
    "is no latent DiffiT: it lacks pos_embed": lambda s: s.pop("pos_embed"),
    "pos_embed must have a square number of tokens, got 15": lambda s: s.update(
        {"pos_embed": torch.zeros(1, 15, 48)}
    ),
    "unexpected: .* and 2 more": lambda s: s.update({f"x{i}": torch.zeros(1) for i in range(10)}),
    "weights must be floating point, blocks.0.attn.proj.bias is torch.int8": lambda s: s.update(
        {"blocks.0.attn.proj.bias": torch.ones(48, dtype=torch.int8)}
    ),
}


@pytest.mark.parametrize("message", MISFITS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_misfits_are_named(message, suffix, model, tmp_path):
    state = model.state_dict()
    MISFITS[message](state)
    save = save_file if suffix == "safetensors" else torch.save
    save(state, tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_keys_that_collide_are_refused(model, tmp_path):
    state = model.state_dict()
    save_file(state | {"module.pos_embed": torch.zeros(1, 16, 48)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"keys twice, with and without .*: pos_embed"):
        from_pretrained(tmp_path)


def test_wrappers_without_tensors_are_passed_over(model, tmp_path):
    state = model.state_dict()
    for i, content in enumerate(
        (
            {"ema": {}, "model": state},
            {"ema": {"decay": 0.99}, "model": state},
            state | {5: INPUTS[0]},
        )
    ):
        torch.save(content, tmp_path / f"{i}.pt")
        check_loaded(from_pretrained(tmp_path / f"{i}.pt"), model)
    recursive = {}
    recursive["model"] = recursive
    torch.save(recursive, tmp_path / "recursive.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        from_pretrained(tmp_path / "recursive.pt")


def test_devices(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
        from_pretrained(tmp_path, device="nonsense")
    with pytest.raises(ValueError, match="device 'meta' holds no weights"):
        from_pretrained(tmp_path, device="meta")


@pytest.mark.parametrize("content", [[1, 2], {"loss": 3.0}, {"model": {}}, torch.ones(3)], ids=str)
def test_other_contents(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere\.safetensors"):
        from_pretrained(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_pretrained("folder/model.pt")
    with pytest.raises(ValueError, match="checkpoints in it: none"):
        from_pretrained(tmp_path)


def test_hub_ids(model, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="the hub extra is not installed"
    )
    save_file(model.state_dict(), tmp_path / "diffit_256.safetensors")
    files = ["README.md", "diffit_256.safetensors"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: tmp_path / name)
    check_loaded(from_pretrained("nvidia/DiffiT"), model)
    files.append("diffit_512.safetensors")
    with pytest.raises(ValueError, match=r"hub repository nvidia/DiffiT: say which.*diffit_512"):
        from_pretrained("nvidia/DiffiT")
    check_loaded(from_pretrained("nvidia/DiffiT", "diffit_256.safetensors"), model)

    def offline(repo):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(OSError, match=r"'nvidia/DiffiT' is no local path.*no network"):
        from_pretrained("nvidia/DiffiT")


def test_hub_ids_without_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(ImportError, match=r"pip install 'diffit-kernels\[hub\]'"):
        from_pretrained("nvidia/DiffiT")
