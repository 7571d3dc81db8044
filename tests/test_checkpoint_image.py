"""Image-space checkpoints: what shapes tell, translated names, saved configurations, refusals."""

import pytest
import torch
from safetensors.torch import save_file

from diffit_kernels import from_pretrained, save_pretrained
from diffit_kernels.checkpoint_image import (
    FREQUENCIES,
    UNTOLD,
    check_frequencies,
    infer_config,
    is_image_diffit,
    our_name,
)
from diffit_kernels.image_model import ImageDiffiT, noise_frequencies
from tests.golden_files import recording
from tests.parity import assert_close
from tests.test_image_model import BASE, CONFIGS, inputs_of, small

RECORDED = {"image_size": 16}
OURS = {"image_size": 8, "num_groups": 4, "norm_eps": 1e-5, "gelu": "tanh"}


@pytest.fixture
def recorded(tmp_path):
    """The recording's state dict as a file of its own, and the recording."""
    golden = recording("image_unet_small")
    path = tmp_path / "recorded.safetensors"
    save_file(golden.under("state."), path)
    return path, golden


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.safetensors"
    model = small(num_classes=5)
    save_file(model.state_dict(), path)
    return path, model


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_tell_the_configuration(config):
    with torch.device("meta"):
        model = ImageDiffiT(**BASE | CONFIGS[config])
        state = model.state_dict()
        given = {name: model.config[name] for name in UNTOLD}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        twin = ImageDiffiT(**infer_config(shapes, config=given))
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, twin)]
    assert shapes[0] == shapes[1]
    assert [cell.block.attn.num_heads for cell in twin._cells()] == [
        cell.block.attn.num_heads for cell in model._cells()
    ]
    assert (twin.skip, twin.num_classes) == (model.skip, model.num_classes)


@pytest.mark.parametrize("fused", [False, True])
def test_a_recorded_checkpoint_loads_and_predicts(recorded, fused):
    path, golden = recorded
    model = from_pretrained(path, config=RECORDED, use_fused_tmsa=fused)
    assert model.use_fused_tmsa == fused and not model.training
    with torch.no_grad():
        out = model(golden["input.x"], golden["input.temb_input"])
    assert_close(out, golden["output"], 2e-5)


def test_every_recorded_name_is_translated():
    golden = recording("image_unet_small")
    names = [name for name in golden.under("state.") if name != FREQUENCIES]
    translated = {our_name(name) for name in names}
    assert len(translated) == len(names)
    with torch.device("meta"):
        model = ImageDiffiT(16, channels=(16, 32, 32), num_cells=1, num_heads=2, temb_size=32)
    expected = {name for name in model.state_dict() if not name.endswith("qkv_temb.bias")}
    assert translated == {name for name in expected if not name.startswith("head_norm")}
    ours = model.state_dict()
    assert all(our_name(name) == name for name in ours), "ours stay what they are"
    assert is_image_diffit(ours) and is_image_diffit(names)
    assert not is_image_diffit(recording("latent_small").under("state."))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_model_needs_no_configuration(config, tmp_path):
    model = small(**CONFIGS[config]).to(memory_format=torch.channels_last)
    path = tmp_path / "model.safetensors"
    save_pretrained(model, path)
    twin = from_pretrained(path, use_fused_tmsa=False)
    inputs = inputs_of(model)
    assert_close(twin(*inputs), model(*inputs), 1e-6)
    given = {name: value for name, value in (BASE | CONFIGS[config]).items() if name in UNTOLD}
    assert {name: twin.config[name] for name in given} == given
    assert twin.config.keys() == model.config.keys()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_bare_state_dict_loads(suffix, tmp_path):
    model = small(num_classes=5, gelu="none")
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save({"ema": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        save_file(model.state_dict(), path)
    inputs = inputs_of(model)
    twin = from_pretrained(path, config=OURS | {"gelu": "none"}, use_fused_tmsa=False)
    assert torch.equal(twin(*inputs), model(*inputs))
    half = from_pretrained(path, config=OURS, dtype=torch.bfloat16, backend="eager")
    assert half.backend == "eager" and half.head.weight.dtype == torch.bfloat16
    assert all(p.requires_grad for p in half.parameters())


def test_config_overrules_the_file(ours, tmp_path):
    """Its shapes, as the label table's rows are classes alone where no label was dropped; and what
    was saved with it."""
    path, model = ours
    config = OURS | {"num_classes": 6, "class_dropout_prob": 0.0}
    assert from_pretrained(path, config=config).null_class is None
    assert from_pretrained(path, config=OURS).null_class == 5
    save_pretrained(model, tmp_path / "saved.safetensors")
    loaded = from_pretrained(tmp_path / "saved.safetensors", config={"gelu": "none"})
    assert loaded.config["gelu"] == "none" and loaded.null_class == 5


def test_dtype_is_the_file_s_own_or_float32_where_mixed(ours, tmp_path):
    _, model = ours
    for change, expected in (((), torch.float16), (("head.bias",), torch.float32)):
        state = {
            name: value.half() if value.is_floating_point() and name not in change else value
            for name, value in model.state_dict().items()
        }
        save_file(state, tmp_path / "half.safetensors")
        loaded = from_pretrained(tmp_path / "half.safetensors", config=OURS)
        assert {p.dtype for p in loaded.parameters()} == {expected}


def test_refusals(recorded, ours, tmp_path):
    path, _ = ours
    with pytest.raises(
        ValueError, match=r"shapes do not tell \['num_groups', 'norm_eps', 'gelu'\]"
    ):
        from_pretrained(path, config={"image_size": 8})
    with pytest.raises(ValueError, match=r"shapes do not tell \['image_size'\]"):
        from_pretrained(recorded[0], config={})
    with pytest.raises(ValueError, match=r"does not fit.*nothing was loaded.*misshapen: .*bias_ta"):
        from_pretrained(path, config=OURS | {"num_heads": 4})
    with pytest.raises(ValueError, match="window_size must divide the side of every stage"):
        from_pretrained(path, config=OURS | {"image_size": 10})
    with pytest.raises(TypeError, match=r"config has \['image_size'.*, which DiffiT has not"):
        from_pretrained("digits", config=OURS)
    with pytest.raises(TypeError, match=r"dtype must be one of .* got torch\.int8"):
        from_pretrained(path, config=OURS, dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        from_pretrained(tmp_path / "absent.safetensors", config=OURS)
    with pytest.raises(TypeError, match=r"config has \['depth'\], which ImageDiffiT has not"):
        from_pretrained(path, config=OURS | {"depth": 4})
    with pytest.raises(TypeError, match="model must be a DiffiT or an ImageDiffiT, got Sequential"):
        save_pretrained(torch.nn.Sequential(ours[1]), tmp_path / "wrapped.safetensors")
    save_file(ours[1].state_dict(), path, metadata={"config": "[1"})
    with pytest.raises(ValueError, match=r"config in its metadata is no JSON object: '\[1'"):
        from_pretrained(path, config=OURS)


def test_damaged_states_are_refused(tmp_path):
    golden = recording("image_unet_small")
    index = "enc_blocks.1.0.transformer.tmsa.rpb.index"
    path = tmp_path / "damaged.safetensors"
    for change, message in (
        (
            lambda s: s.update({index: s[index].T.contiguous()}),
            r"another window layout: encoder\.1",
        ),
        (lambda s: s.pop("dec_ups.1.bias"), r"missing: upsamples\.1\.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "unexpected: more"),
        (lambda s: s.update({FREQUENCIES: 1 / (1 + torch.arange(16.0))}), "must be 10000"),
    ):
        state = dict(golden.under("state."))
        change(state)
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            from_pretrained(path, config=RECORDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frequencies_of_half_precision_files_are_accepted(dtype):
    frequencies = noise_frequencies(512, torch.empty(0)).to(dtype)
    check_frequencies(frequencies, "file")
    with pytest.raises(ValueError, match="must be 10000"):
        check_frequencies(frequencies * 0.98, "file")
