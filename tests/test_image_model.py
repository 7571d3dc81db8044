"""The image-space model: the recording, the reference, the flag, windows in place."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from diffit_kernels.checkpoint_image import THIRD_PARTY, infer_config, our_name
from diffit_kernels.image_model import ImageDiffiT, diffit_cifar10, diffit_ffhq64
from diffit_kernels.sampling.edm import edm_loss
from tests.golden_files import recording
from tests.parity import assert_close, relative_error, values_and_gradients
from tests.test_reference import without_key_third

OPS = ("group_norm_silu", "adaln", "linear", "time_projections", "window_attention", "mlp")
RECORDING = "image_unet_small"
BASE = {
    "image_size": 8,
    "channels": (8, 16),
    "num_cells": 1,
    "window_size": 2,
    "num_heads": 2,
    "num_groups": 4,
    "temb_size": 8,
}
CONFIGS = {
    "a window for each stage": {
        "image_size": 12,
        "channels": (16, 24),
        "num_cells": (2, 1),
        "window_size": (4, 3),
        "num_heads": (2, 3),
    },
    "added skips, no norm in the head": {"skip": "add", "head_norm": False, "gelu": "none"},
    "bare": {"temb_bias": False, "norm_affine": False, "in_channels": 1, "norm_eps": 1e-3},
    "classes": {"num_classes": 5, "mlp_ratio": 1.5},
    "one stage, whole windows": {"channels": (12,), "window_size": 8, "num_heads": 3},
    "shrinking channels, odd side": {
        "image_size": 20,
        "channels": (16, 8, 12),
        "window_size": (2, 10, 5),
    },
}


def small(**kwargs):
    """A small model with values of training's size everywhere, zero nowhere."""
    torch.manual_seed(0)
    model = ImageDiffiT(**BASE | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(model, batch=3):
    torch.manual_seed(1)
    x = torch.randn(batch, model.in_channels, model.image_size, model.image_size)
    inputs = [x, torch.linspace(-1.5, 1.1, batch)]
    return inputs if model.num_classes is None else [*inputs, torch.arange(batch) % 6]


def load_recorded(fused, dtype=torch.float32):
    golden = recording(RECORDING)
    state = golden.renamed("state.", our_name)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    config = infer_config(shapes, config=THIRD_PARTY | {"image_size": 16})
    model = ImageDiffiT(**config, use_fused_tmsa=fused)
    model.load_state_dict(state, strict=True)
    return golden, model.eval().to(dtype)


def check_against_recording(golden, model, tolerance, device="cpu"):
    dtype = model.head.weight.dtype
    x = golden["input.x"].to(device, dtype, copy=True).requires_grad_()
    out = model.to(device)(x, golden["input.temb_input"].to(x))
    assert_close(out.cpu(), golden["output"], tolerance)
    (out * golden["loss_weight"].to(device)).sum().backward()
    assert_close(x.grad.cpu(), golden["grad.input.x"], tolerance, "gradient of x")
    parameters = dict(model.named_parameters())
    for key, expected in golden.under("grad.param.").items():
        ours = our_name(key)
        grad = parameters[ours].grad.cpu()
        if "qkv_temb" in ours and model.use_fused_tmsa:
            assert torch.equal(grad.chunk(3)[1], torch.zeros_like(grad.chunk(3)[1]))
        assert_close(*without_key_third(ours, grad, expected), tolerance, key)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 5e-6)])
def test_agrees_with_the_recording(fused, dtype, tolerance):
    check_against_recording(*load_recorded(fused, dtype), tolerance)


def test_agrees_with_the_recording_on_each_backend(backend, device):
    check_against_recording(*load_recorded(fused=True), 2e-5, device)


def as_function(model):
    """The model as a function of its floating-point inputs and parameters, and these tensors."""
    names = [name for name, _ in model.named_parameters()]
    x, c_noise, *labels = inputs_of(model)

    def function(x, c_noise, *parameters):
        return functional_call(
            model, dict(zip(names, parameters, strict=True)), (x, c_noise, *labels)
        )

    return function, [x, c_noise, *model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_reference(config, fused):
    """Outputs and every gradient, in float64."""
    model = small(**CONFIGS[config], use_fused_tmsa=fused)
    names = [name for name, _ in model.named_parameters()]
    labels = inputs_of(model)[2:]
    form = {"num_groups": BASE["num_groups"], "eps": CONFIGS[config].get("norm_eps", 1e-5)}
    form["approximate"] = CONFIGS[config].get("gelu", "tanh")

    def literal(x, c_noise, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return reference.image_diffit(state, x, c_noise, *labels, **form)

    function, inputs = as_function(model)
    ours = values_and_gradients(function, inputs, torch.float64)
    expected = values_and_gradients(literal, inputs, torch.float64)
    results = ("output", "x", "c_noise", *names)
    for name, actual, truth in zip(results, ours, expected, strict=True):
        assert_close(actual, truth, 1e-11, name)
    assert min(truth.abs().max() for truth in expected) > 0, "every parameter matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_fused_against_literal(config, dtype):
    """In float32 to 2e-5, outputs and every gradient. In half precision, the output errs at most
    twice as much as the literal one, and gradients are finite."""
    model = small(**CONFIGS[config])
    function, inputs = as_function(model)
    inputs = [value.detach().to(dtype).double() for value in inputs]
    results = []
    for fused, precision in ((False, torch.float64), (False, dtype), (True, dtype)):
        model.use_fused_tmsa = fused
        results.append(values_and_gradients(function, inputs, precision))
    truth, literal, ours = results
    assert all(value.isfinite().all() and value.dtype == dtype for value in ours)
    if dtype == torch.float32:
        for i, (actual, expected) in enumerate(zip(ours, truth, strict=True)):
            assert_close(actual, expected, 2e-5, f"result {i}")
    else:
        error = relative_error(literal[0], truth[0])
        assert_close(ours[0], truth[0], 2 * error + torch.finfo(dtype).eps)


class Calls(TorchDispatchMode):
    """What runs: operators, what they take, and what they give."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        outputs = results if isinstance(results, tuple | list) else (results,)
        self.log.append((func, args, outputs))
        return results

    def fused(self):
        return [call for call in self.log if call[0].namespace == "diffit"]

    def copies(self, size):
        """The shapes of copies of at least ``size`` numbers."""
        names = ("aten::clone", "aten::copy_", "aten::_to_copy")
        return [
            tuple(outputs[0].shape)
            for func, _, outputs in self.log
            if func._schema.name in names and outputs[0].numel() >= size
        ]


@pytest.mark.parametrize("config", [{}, {"in_channels": 1}, {"skip": "add"}], ids=str)
def test_fused_cells_work_on_the_map_where_it_lies(config):
    """No feature map is copied, forward or backward: windows are index arithmetic in the op.

    The images are, once, to channels last; the gradients of weights are, to the weights' layout.
    """
    model = small(image_size=16, channels=(16, 32), window_size=4, use_fused_tmsa=True, **config)
    x, c_noise = inputs_of(model, batch=8)
    smallest = 8 * 32 * 8 * 8  # numbers of a feature map of the last stage
    assert max(p.numel() for p in model.parameters()) < smallest
    with Calls() as calls:
        out = model(x, c_noise)
        out.backward(torch.randn_like(out))
    names = [func._schema.name for func, *_ in calls.fused()]
    for name in ("window_attention", "group_norm_silu"):
        assert names.count(f"diffit::{name}") == names.count(f"diffit::{name}_backward") == 4
    for func, args, outputs in calls.fused():
        maps = [t for t in (*args, *outputs) if isinstance(t, torch.Tensor) and t.dim() > 2]
        assert all(t.is_contiguous() for t in maps), func
    grids = [
        args[0].shape[1:3] for func, args, _ in calls.fused() if "window_attention" in str(func)
    ][:4]
    assert grids == [(16, 16), (8, 8), (8, 8), (16, 16)], "the whole map, not its windows"
    assert calls.copies(smallest) == []

    model.use_fused_tmsa = False
    with Calls() as calls:
        model(x, c_noise)
    partitioned = [shape for shape in calls.copies(smallest) if 4 in shape]
    assert len(partitioned) >= 4, "the literal path partitions, or this test sees nothing"


def test_the_backend_reaches_every_op():
    model = small(use_fused_tmsa=True, backend="eager")
    with Calls() as calls:
        model(*inputs_of(model))
    assert {func._overloadname for func, *_ in calls.fused()} == {"eager"}
    assert {func._schema.name.removeprefix("diffit::") for func, *_ in calls.fused()} == set(OPS)


def test_toggling_changes_nothing_beyond_rounding():
    model = small()
    inputs = inputs_of(model)
    expected = model(*inputs)
    model.use_fused_tmsa = True
    assert model.use_fused_tmsa
    assert_close(model(*inputs), expected, 2e-5)
    assert_close(
        model(inputs[0].contiguous(memory_format=torch.channels_last), inputs[1]), expected, 2e-5
    )
    model.use_fused_tmsa = False
    assert torch.equal(model(*inputs), expected)


def test_strict_loading_both_ways(tmp_path):
    from safetensors.torch import load_file, save_file

    ours, other = (
        small(num_classes=5, use_fused_tmsa=True),
        small(num_classes=5, skip="concatenate"),
    )
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    with torch.device("meta"):
        empty = ImageDiffiT(**BASE, num_classes=5)
    empty.load_state_dict(ours.state_dict(), strict=True, assign=True)
    inputs = inputs_of(ours)
    assert torch.equal(empty.eval()(*inputs), other(*inputs))
    index = ours.state_dict()["encoder.1.0.block.attn.relative_position_index"]
    assert torch.equal(index, reference.relative_position_index((2, 2)))
    state = ours.state_dict()
    del state["decoder.0.0.conv.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"decoder\.0\.0\.conv\.weight"'):
        other.load_state_dict(state)


def test_deepcopy_and_pickle():
    model = small(use_fused_tmsa=True)
    inputs = inputs_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.use_fused_tmsa and torch.equal(twin(*inputs), model(*inputs))


def test_compiles_whole_for_any_batch():
    model = small(num_classes=5, use_fused_tmsa=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(model, batch=4)
    for value in inputs:
        torch._dynamo.mark_dynamic(value, 0)
    expected = model(*inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    out = compiled(*inputs)
    assert_close(out, expected, 2e-5)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert_close(*without_key_third(name, p.grad, gradients[name]), 2e-5, name)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 7):
            inputs = inputs_of(model, batch)
            assert_close(compiled(*inputs), model(*inputs), 2e-5)


PARTS = (
    *("norm", "conv", "shortcut", "block", "block.norm1", "block.attn", "block.attn.qkv"),
    *("block.attn.qkv_temb", "block.attn.proj", "block.norm2", "block.mlp", "block.mlp.fc1"),
)


@pytest.mark.parametrize("part", PARTS)
def test_hooks_fire_and_count(part):
    model = small()
    inputs = inputs_of(model)
    plain = model(*inputs)
    seen = []
    model.decoder[1][0].get_submodule(part).register_forward_hook(
        lambda module, args, output: seen.append(0) or 1.5 * output
    )
    expected = model(*inputs)
    assert relative_error(expected, plain) > 1e-4
    model.use_fused_tmsa = True
    assert_close(model(*inputs), expected, 2e-5)
    assert len(seen) == 2


def test_a_parametrized_or_replaced_norm_is_called():
    model = small()
    inputs = inputs_of(model)
    first, second = (model.encoder[stage][0].norm for stage in (0, 1))
    nn.utils.parametrize.register_parametrization(first, "weight", nn.Tanh())
    second.forward = lambda x: 2 * x
    expected = model(*inputs)
    model.use_fused_tmsa = True
    assert_close(model(*inputs), expected, 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_label_dropout(fused):
    model = small(num_classes=5, class_dropout_prob=1.0, use_fused_tmsa=fused).train()
    x, c_noise = inputs_of(model)[:2]
    null = model(x, c_noise, torch.full((3,), 5))
    assert torch.equal(model(x, c_noise, torch.tensor([0, 1, 2])), null)
    assert not torch.equal(model.eval()(x, c_noise, torch.tensor([0, 1, 2])), null)
    assert model.null_class == 5
    assert small(num_classes=5, class_dropout_prob=0.0).null_class is None
    assert small().null_class is None


def test_training_through_the_loss_is_the_same_either_way():
    def gradients(fused):
        model = small(num_classes=5, class_dropout_prob=0.5, use_fused_tmsa=fused).train()
        torch.manual_seed(5)
        images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        edm_loss(model, images, labels).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(False)
    for name, ours in gradients(True).items():
        assert_close(*without_key_third(name, ours, expected[name]), 2e-5, name)


def test_autocast_trains():
    model = small(use_fused_tmsa=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = edm_loss(model, torch.randn(2, 3, 8, 8))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def test_a_new_model_predicts_nothing():
    model = ImageDiffiT(**BASE)
    x, c_noise = inputs_of(model)
    assert torch.equal(model(x, c_noise), torch.zeros_like(x))


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_batch(fused):
    model = small(use_fused_tmsa=fused)
    x, c_noise = inputs_of(model, batch=0)
    out = model(x, c_noise)
    out.sum().backward()
    assert out.shape == (0, 3, 8, 8)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_checkpointing_changes_no_gradient(fused):
    model = small(use_fused_tmsa=fused)
    kept, results = [], []
    for value in (False, True):
        model.gradient_checkpointing = value
        model.zero_grad()
        sizes = []
        with saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            out = model(*inputs_of(model))
        out.square().mean().backward()
        kept.append(sum(sizes))
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert_close(again, plain, 2e-6)
    assert kept[1] < kept[0] / 4


def test_configurations_of_the_paper():
    with torch.device("meta"):
        cifar, ffhq = diffit_cifar10(), diffit_ffhq64(num_cells=(1, 2, 2, 2), num_heads=8)
    for model, channels, window in ((cifar, (128, 256, 256), 4), (ffhq, (128, *[256] * 3), 8)):
        assert tuple(cells[0].conv.out_channels for cells in model.encoder) == channels
        attentions = [cell.block.attn for cells in model.encoder for cell in cells]
        assert {attention.window_size for attention in attentions} == {(window, window)}
        assert model.t_embedder.temb_size == 512
    assert (cifar.image_size, ffhq.image_size) == (32, 64)
    assert [len(cells) for cells in ffhq.encoder] == [1, 2, 2, 2]
    assert [len(cells) for cells in ffhq.decoder] == [2, 2, 2, 1]
    assert ffhq.encoder[0][0].block.attn.num_heads == 8
