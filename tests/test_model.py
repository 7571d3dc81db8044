"""The drop-in model: recordings, state dict, the flag, memory, training, and bad inputs."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from diffit_kernels import DiffiT, Diffit, fused
from diffit_kernels.block import DiffiTBlock
from tests.conftest import DEVICES
from tests.golden_files import GOLDEN, LATENT, recording
from tests.parity import assert_close
from tests.test_reference import without_key_third

SMALL = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


def load(name, fused, dtype=torch.float32):
    golden = recording(name)
    model = DiffiT(**golden.config, use_fused_tmsa=fused)
    model.load_state_dict(golden.under("state."), strict=True)
    return golden, model.eval().to(dtype)


def small(**kwargs):
    """A small model whose output is not the zero that training starts from."""
    torch.manual_seed(0)
    model = DiffiT(**SMALL | kwargs)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 5e-6)])
def test_agrees_with_the_recording(name, fused, dtype, tolerance):
    golden, model = load(name, fused, dtype)
    x = golden["input.x"].to(dtype, copy=True).requires_grad_()
    out = model(x, golden["input.t"], golden["input.y"])
    assert_close(out, golden["output"], tolerance)
    (out * golden["loss_weight"]).sum().backward()
    assert_close(x.grad, golden["grad.input.x"], tolerance, "gradient of x")
    parameters = dict(model.named_parameters())
    for key, expected in golden.under("grad.param.").items():
        assert_close(*without_key_third(key, parameters[key].grad, expected), tolerance, key)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("scale", [None, 4.4])
def test_guidance_agrees_with_the_recording(name, fused, scale):
    golden, model = load(name, fused)
    with torch.no_grad():
        out = model.forward_with_cfg(golden["cfg.x"], golden["cfg.t"], golden["cfg.y"], scale)
    assert_close(out, golden["cfg.output_none" if scale is None else "cfg.output_scale4.4"], 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_agrees_with_the_reference(fused, inputs):
    model = small(use_fused_tmsa=fused).eval()
    expected = reference.latent_diffit(
        {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        inputs[0].double(),
        *inputs[1:],
        SMALL["num_heads"],
    )
    assert_close(model(*inputs), expected, 2e-5)


@pytest.mark.parametrize("size", [256, 512])
def test_state_dict_is_the_published_one(size):
    published = json.loads((GOLDEN / f"state_dict_keys_{size}.json").read_text())
    with torch.device("meta"):
        model = Diffit(input_size=size // 8, use_fused_tmsa=True)
    ours = model.state_dict()
    assert list(ours) == list(published) and len(ours) == 346
    for key, (shape, dtype) in published.items():
        assert (list(ours[key].shape), str(ours[key].dtype)) == (shape, f"torch.{dtype}"), key


def test_strict_loading_both_ways():
    ours, other = small(use_fused_tmsa=True), small(use_fused_tmsa=False)
    other.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(other.state_dict(), strict=True, assign=True)
    keys = ours.state_dict().keys()
    assert sum("relative_position_index" in key for key in keys) == SMALL["depth"]
    index = ours.state_dict()["blocks.0.attn.relative_position_index"]
    assert torch.equal(index, reference.relative_position_index((4, 4)))


def test_strict_loading_refuses():
    model = small()
    key = "blocks.1.attn.relative_position_index"
    for change, message in (
        (lambda state: state.pop(key), f'Missing key.*"{key}"'),
        (lambda state: state.update({key: state[key].T}), "not the index of a row-major"),
        (
            lambda state: state.update({key: state[key][:3]}),
            r"shape \(3, 16\), expected \(16, 16\)",
        ),
        (lambda state: state.update(more=torch.zeros(1)), 'Unexpected key.*"more"'),
    ):
        state = model.state_dict()
        change(state)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)


def test_state_dict_saves_as_safetensors(tmp_path):
    """Which refuses tensors that share memory, as one index for all blocks would."""
    from safetensors.torch import load_file, save_file

    model = small(use_fused_tmsa=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_the_fused_model_holds_nothing_quadratic(inputs):
    """Neither in its modules after a step, nor in what autograd saves for the backward."""
    model = small(use_fused_tmsa=True, input_size=16, depth=3)
    tokens = 64
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    def held():
        tensors = [*model.buffers(), *model.parameters()]
        for module in model.modules():
            tensors += [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
        return [tuple(t.shape) for t in tensors]

    def quadratic(shapes):
        return [s for s in shapes if len(s) >= 2 and s[-1] == s[-2] == tokens]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([1, 2]))
    out.sum().backward()
    assert saved and not quadratic(saved) and not quadratic(held())

    saved.clear()
    model.use_fused_tmsa = False
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([1, 2]))
    assert quadratic(saved), "the literal model does, or this test sees nothing"


def test_toggling_changes_nothing_beyond_rounding(inputs):
    model = small().eval()
    expected = model(*inputs)
    model.use_fused_tmsa = True
    assert model.use_fused_tmsa
    assert_close(model(*inputs), expected, 2e-5)
    model.use_fused_tmsa = False
    assert torch.equal(model(*inputs), expected)


def test_training_draws_the_same_labels_either_way(inputs):
    def step(fused):
        model = small(use_fused_tmsa=fused, class_dropout_prob=0.5).train()
        torch.manual_seed(5)
        out = model(*inputs)
        out.square().sum().backward()
        return out, model.blocks[0].attn.qkv.weight.grad

    for ours, expected in zip(step(True), step(False), strict=True):
        assert_close(ours, expected, 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_label_dropout(fused):
    model = small(use_fused_tmsa=fused, class_dropout_prob=1.0).train()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([1])
    null = model(x, t, torch.tensor([5]))
    assert torch.equal(model(x, t, torch.tensor([0])), null)
    assert not torch.equal(model.eval()(x, t, torch.tensor([0])), null)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_the_literal_model(dtype, inputs):
    model = small().eval()
    x, t, y = inputs
    with torch.no_grad():
        truth = model.double()(x.double(), t, y)
        model.to(dtype)
        literal = model(x.to(dtype), t, y)
        model.use_fused_tmsa = True
        fused = model(x.to(dtype), t, y)
    error = (literal.double() - truth).abs().max() / truth.abs().max()
    assert fused.dtype == dtype
    assert_close(fused, truth, 2 * error.item() + torch.finfo(dtype).eps)


def test_autocast_trains(inputs):
    model = small(use_fused_tmsa=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_deepcopy_and_float_timesteps(inputs):
    model = small(use_fused_tmsa=True).eval()
    x, t, y = inputs
    twin = copy.deepcopy(model)
    assert twin.use_fused_tmsa and torch.equal(twin(x, t.float(), y), model(x, t, y))


def test_position_embedding_is_constant_and_not_trained():
    model = small()
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0, 0], torch.tensor([0.0] * 12 + [1.0] * 12).repeat(2))


def test_the_released_configuration():
    with torch.device("meta"):
        model = Diffit()
        large = Diffit(input_size=64)
        default = DiffiT()
    trained = sum(p.numel() for p in model.parameters())
    assert round(trained / 1e6, 2) == 561.33
    assert round(sum(p.numel() for p in large.parameters()) / 1e6, 2) == 563.56
    assert len(default.blocks) == 30


def test_unused_published_arguments_are_accepted():
    small(mask_ratio=0.5, decode_layer=4)


BAD_INPUTS = {
    "x must have shape \\(B, 4, 8, 8\\), got \\(3, 4, 9, 9\\)": (
        ValueError,
        0,
        torch.zeros(3, 4, 9, 9),
    ),
    "x must have shape \\(B, 4, 8, 8\\), got \\(3, 3, 8, 8\\)": (
        ValueError,
        0,
        torch.zeros(3, 3, 8, 8),
    ),
    "x must be torch.float32 like the model, got torch.float64": (
        TypeError,
        0,
        torch.zeros(3, 4, 8, 8, dtype=torch.float64),
    ),
    "x must be a tensor, got list": (TypeError, 0, [1]),
    "x is on meta, the model on cpu": (ValueError, 0, torch.zeros(3, 4, 8, 8, device="meta")),
    "t must have shape \\(3,\\), one per sample of x, got \\(2,\\)": (
        ValueError,
        1,
        torch.zeros(2),
    ),
    "t must have shape \\(3,\\), one per sample of x, got \\(\\)": (ValueError, 1, torch.tensor(4)),
    "y must have shape \\(3,\\), one per sample of x, got \\(4,\\)": (
        ValueError,
        2,
        torch.zeros(4, dtype=torch.long),
    ),
    "y must be int64 or int32 class labels, got torch.float32": (TypeError, 2, torch.zeros(3)),
    "labels must be in 0..5, got -1..6": (ValueError, 2, torch.tensor([-1, 0, 6])),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs(message, fused, inputs):
    kind, position, value = BAD_INPUTS[message]
    arguments = list(inputs)
    arguments[position] = value
    with pytest.raises(kind, match=message):
        small(use_fused_tmsa=fused)(*arguments)


def test_bad_arguments(inputs):
    with pytest.raises(ValueError, match="input_size must be a multiple of patch_size"):
        small(input_size=9)
    for name in ("input_size", "patch_size", "depth", "num_heads", "num_classes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            small(**{name: 0})
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads"):
        small(num_heads=5)
    with pytest.raises(ValueError, match=r"class_dropout_prob must be in \[0, 1\]"):
        small(class_dropout_prob=2)
    with pytest.raises(ValueError, match="backend must be one of"):
        small(backend="gpu")
    with pytest.raises(TypeError, match="use_fused_tmsa must be a bool, got 'yes'"):
        small().use_fused_tmsa = "yes"
    with pytest.raises(ValueError, match=r"batch must be even.*got 3 samples"):
        small().forward_with_cfg(*inputs, cfg_scale=2.0)
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this on cpu"):
        double = small(use_fused_tmsa=True, backend="triton").double()
        double(inputs[0].double(), *inputs[1:])
    small(use_fused_tmsa=False, backend="triton")(*inputs)
    with pytest.raises(ValueError, match="x must have 16 tokens, a 4 x 4 grid, got 9"):
        small(use_fused_tmsa=True).blocks[0].attn(torch.zeros(1, 9, 48), torch.zeros(1, 48))


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_full_size_checkpoint_in_the_published_format(size, tmp_path):
    from safetensors.torch import save_file

    from diffit_kernels import from_pretrained

    torch.manual_seed(0)
    model = Diffit(input_size=size // 8)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    path = tmp_path / f"diffit_{size}.safetensors"
    save_file(model.state_dict(), path)
    del model

    x = torch.randn(2, 4, size // 8, size // 8)
    t, y = torch.tensor([10, 900]), torch.tensor([207, 1000])
    model = from_pretrained(path, use_fused_tmsa=True)
    with torch.no_grad():
        fused = model(x, t, y)
        model.use_fused_tmsa = False
        literal = model(x, t, y)
    assert fused.shape == (2, 8, size // 8, size // 8)
    assert_close(fused, literal, 2e-5)


class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Reads and writes of activations by everything but products, in units of one activation."""

    def __init__(self, size):
        super().__init__()
        self.size, self.reads, self.writes = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        products = ("diffit::mlp", "diffit::linear")
        if (func.namespace == "diffit" and name not in products) or name == "aten::add":
            outputs = results if isinstance(results, tuple) else (results,)
            self.reads += sum(self.units(value) for value in args)
            self.writes += sum(self.units(value) for value in outputs)
        return results

    def units(self, value):
        return value.numel() // self.size if isinstance(value, torch.Tensor) else 0


def test_blocks_pass_over_memory_as_often_as_they_say(inputs):
    """The counts in the docstrings of fused.blocks and fused.block."""
    model = small(use_fused_tmsa=True, depth=3)
    x, temb = torch.randn(3, 16, 48), torch.randn(3, 48)
    with torch.no_grad(), Traffic(x.numel()) as alone:
        model.blocks[0](x, temb)
    assert (alone.reads, alone.writes) == (8, 5)
    with torch.no_grad(), Traffic(x.numel()) as joined:
        out = fused.blocks(model.blocks, DiffiTBlock, x, temb)
    first_has_no_sum, last_sum = (-1, -1), (2, 1)
    assert joined.reads == 3 * 7 + first_has_no_sum[0] + last_sum[0]
    assert joined.writes == 3 * 5 + first_has_no_sum[1] + last_sum[1]
    one_by_one = x
    for block in model.blocks:
        one_by_one = block(one_by_one, temb)
    assert torch.equal(out, one_by_one)


def test_a_hooked_block_is_called(inputs):
    """Joining blocks must not pass over what hangs on one of them."""
    model = small(use_fused_tmsa=True, depth=3).eval()
    expected = model(*inputs)
    seen = []
    hook = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close(model(*inputs), expected, 1e-6)
    assert len(seen) == 1 and seen[0].shape == (3, 16, 48)
    hook.remove()
    model.blocks[1].compile(backend="eager")
    assert_close(model(*inputs), expected, 1e-6)


def hooked():
    layer = nn.Conv2d(4, 32, 2, stride=2)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


@pytest.mark.parametrize(
    "layer, joined",
    [
        (lambda: nn.Conv2d(4, 32, 2, stride=2), True),
        (lambda: nn.Conv2d(4, 32, (2, 4), stride=(2, 4), bias=False), True),
        (lambda: nn.Conv2d(4, 32, 1), True),
        (lambda: nn.Conv2d(4, 32, 3, stride=3), False),  # which leaves the last two out
        (lambda: nn.Conv2d(4, 32, 3, stride=2, padding=1), False),
        (lambda: nn.Conv2d(4, 32, 2, stride=2, dilation=2), False),
        (lambda: nn.Conv2d(4, 32, 2, stride=2, groups=2), False),
        (hooked, False),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_patches_are_one_product(layer, joined, device):
    """Where they are patches; values and gradients are the convolution's, in float64."""
    torch.manual_seed(0)
    layer = layer().to(device, torch.float64)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, device=device, requires_grad=True)
    names, results = [], []
    for function in (fused.patch_tokens, lambda m, x: m(x).flatten(2).transpose(1, 2)):
        with Names() as called:
            out = function(layer, x)
        names.append(called.names)
        leaves = [x, *layer.parameters()]
        weights = torch.arange(out.numel(), dtype=out.dtype, device=device).view(out.shape).cos()
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    assert ("convolution" in names[0]) != joined and "convolution" in names[1]
    assert results[0][0].is_contiguous() or not joined
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-13)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **kwargs or {})
