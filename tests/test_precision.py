"""Precisions of a model: what is replaced, who can, which products, and the command line."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from diffit_kernels import DiffiT, from_pretrained, fused, precision
from diffit_kernels.block import DiffiTBlock
from diffit_kernels.cli import main
from diffit_kernels.fp8_linear import Fp8Linear
from diffit_kernels.ops import triton_launch
from diffit_kernels.precision import (
    PRECISIONS,
    apply_precision,
    dtype_of,
    products,
    refusal,
)
from tests import test_image_model, test_model
from tests.parity import assert_close
from tests.test_fp8_linear import assert_emulated
from tests.test_patch import fused_calls

ON_ANYTHING = [name for name in PRECISIONS if name not in ("tf32", "fp8")]
LARGE = ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]


@pytest.fixture
def anywhere(monkeypatch):
    """As if every device had every product; the CPU computes those of 8 bits too."""
    monkeypatch.setattr(precision, "refusal", lambda *_: None)


def digits():
    torch.manual_seed(0)
    inputs = torch.randn(6, 4, 4, 4), torch.arange(6) * 190, torch.arange(6)
    return from_pretrained("digits"), inputs


def test_dtypes():
    expected = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    assert [dtype_of(name) for name in PRECISIONS] == expected


def test_unknown_precisions_are_refused():
    model = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"precision must be one of .*'fp8'\), got 'float8'"):
        dtype_of("float8")
    for function in (
        lambda: refusal("fp16", "cpu"),
        lambda: apply_precision(model, "fp16"),
        lambda: products("fp16").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"precision must be one of .* got 'fp16'"):
            function()


@pytest.mark.parametrize(
    "capability, served",
    [((7, 5), []), ((8, 0), ["tf32"]), ((8, 6), ["tf32"]), ((8, 9), ["tf32", "fp8"])]
    + [((major, 0), ["tf32", "fp8"]) for major in (9, 10, 12)],
)
def test_which_gpus_can(capability, served, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    for name in ON_ANYTHING:
        assert refusal(name, "cuda") is None
    for name, needed in (("tf32", "8.0"), ("fp8", "8.9")):
        reason = refusal(name, "cuda:1")
        found = "{}.{}".format(*capability)
        expected = (
            f"{name} needs an NVIDIA GPU of compute capability {needed} or more, "
            f"got cuda:1 of {found}"
        )
        assert reason == (None if name in served else expected)
    assert asked == [torch.device("cuda:1")] * 2
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert refusal("fp8", "cuda").endswith("got cuda of ROCm")


def test_cpus_cannot_and_leave_the_model_alone():
    model = test_model.small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("tf32", "fp8"):
        with pytest.raises(ValueError, match=rf"{name} needs an NVIDIA GPU .*, got cpu"):
            apply_precision(model, name)
        assert "NVIDIA GPU" in refusal(name, torch.device("mps"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ON_ANYTHING)
def test_precisions_that_are_dtypes(name):
    model = test_model.small(use_fused_tmsa=True).eval()
    assert refusal(name, "cpu") is None
    assert apply_precision(model, name) is model
    assert {p.dtype for p in model.parameters()} == {dtype_of(name)}
    assert not any(isinstance(part, Fp8Linear) for part in model.modules())


def replaced_in(block):
    return sorted(name for name, part in block.named_modules() if isinstance(part, Fp8Linear))


@pytest.mark.parametrize("of", ["latent", "tmsa+adaln", "image"])
def test_the_large_layers_of_blocks_are_replaced_and_nothing_else(of, anywhere):
    if of == "image":
        model = test_image_model.small(channels=(16, 32), image_size=8, num_heads=2)
    else:
        model = test_model.small(conditioning="tmsa" if of == "latent" else of).eval()
    classes = {name: type(part) for name, part in model.named_modules()}
    assert apply_precision(model, "fp8") is model
    blocks = [part for part in model.modules() if isinstance(part, DiffiTBlock)]
    assert len(blocks) > 1
    for block in blocks:
        assert replaced_in(block) == LARGE
    changed = [name for name, part in model.named_modules() if type(part) is not classes[name]]
    assert len(changed) == 4 * len(blocks)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def hooked_layers(model):
    seen = []
    for part in model.modules():
        if isinstance(part, Fp8Linear):
            part.register_forward_hook(lambda layer, args, y: seen.append((layer, args[0], y)))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_every_layer_within_the_model_agrees_with_the_emulation(fused, dtype, anywhere):
    """In float32, to which the rest of the model goes back, to roundings of float32."""
    model, (x, t, y) = digits()
    weights = [getattr(b, n).weight.detach().clone() for b, n in large_layers(model)]
    model = apply_precision(model, "fp8").to(dtype)
    model.use_fused_tmsa = fused
    seen = hooked_layers(model)
    with torch.no_grad():
        out = model(x.to(dtype), t, y)
    assert out.dtype == dtype and out.isfinite().all()
    layers = [getattr(b, n) for b, n in large_layers(model)]
    assert [layer for layer, *_ in seen] == layers
    for weight, (layer, tokens, result) in zip(weights, seen, strict=True):
        assert_emulated(result, tokens, weight, layer.bias, str(layer))


def large_layers(model):
    """(owner, name) of each, in the order in which they are called."""
    for block in model.blocks:
        for owner, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
            yield from ((owner, name) for name in names)


def test_the_rest_of_a_block_stays_fused(anywhere):
    """All but the mlp op, which reads both weights."""
    model, inputs = digits()
    assert "mlp" in fused_calls(model, *inputs)
    expected = [name for name in fused_calls(model, *inputs) if name != "mlp"]
    apply_precision(model, "fp8")
    assert fused_calls(model, inputs[0].bfloat16(), *inputs[1:]) == expected
    with pytest.raises(RuntimeError, match="is for inference and has no gradient"):
        model(inputs[0].bfloat16(), *inputs[1:])


def test_image_models_run(anywhere):
    model = from_pretrained("image_digits")
    x, t, y = test_image_model.inputs_of(model)
    with torch.no_grad():
        before = model(x, t, y)
        after = apply_precision(model, "fp8")(x.bfloat16(), t, y)
        model.use_fused_tmsa = False
        literal = model(x.bfloat16(), t, y)
    assert after.dtype == torch.bfloat16 and after.isfinite().all()
    assert not torch.equal(after.float(), before)
    assert literal.shape == after.shape and literal.isfinite().all()


def test_layers_that_cannot_stay_and_models_that_cannot_are_refused(anywhere):
    model = test_model.small(mlp_ratio=1.5).eval()
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: None)
    apply_precision(model, "fp8")
    assert replaced_in(model.blocks[0]) == ["attn.qkv"], "fc1 and fc2 have 72 channels"
    assert replaced_in(model.blocks[1]) == ["attn.proj", "attn.qkv"]
    for name in ("fp8", "float32"):
        with pytest.raises(ValueError, match=f"{name}: layers of the model are fp8 already"):
            apply_precision(model, name)
    narrow = test_model.small(hidden_size=40, mlp_ratio=1.0)
    with pytest.raises(ValueError, match="model in training mode; call eval"):
        apply_precision(narrow, "fp8")
    with pytest.raises(ValueError, match="multiples of 16, got none in 2 blocks of DiffiT"):
        apply_precision(narrow.eval(), "fp8")
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}


def test_copies_and_states_of_a_model(anywhere):
    model, (x, t, y) = digits()
    apply_precision(model, "fp8")
    fresh = apply_precision(DiffiT(**digits_config(model)).eval(), "fp8")
    fresh.load_state_dict(model.state_dict(), strict=True)
    fresh.use_fused_tmsa = True
    with torch.no_grad():
        expected = model(x.bfloat16(), t, y)
        for other in (copy.deepcopy(model), fresh):
            assert torch.equal(other(x.bfloat16(), t, y), expected)


def digits_config(model):
    sizes = {"hidden_size": model.pos_embed.shape[-1], "depth": len(model.blocks)}
    sizes |= {"num_heads": model.blocks[0].attn.num_heads, "patch_size": 1}
    return sizes | {"input_size": model.input_size, "num_classes": model.num_classes}


NEWER = {
    "matmul": torch.backends.cuda.matmul,
    "conv": torch.backends.cudnn.conv,
    "rnn": torch.backends.cudnn.rnn,
    "of CPUs": torch.backends.mkldnn.matmul,
}


def setting():
    """All that says whether products are TF32, by newer and older names; None where these raise."""
    found = {name: part.fp32_precision for name, part in NEWER.items()}
    for name, older in (
        ("older matmul", torch.get_float32_matmul_precision),
        ("oldest matmul", lambda: torch.backends.cuda.matmul.allow_tf32),
        ("older cudnn", lambda: torch.backends.cudnn.allow_tf32),
    ):
        try:
            found[name] = older()
        except RuntimeError:
            found[name] = None
    return found


def set_newer(matmul=None, conv=None):
    torch.backends.cuda.matmul.fp32_precision = matmul or NEWER["matmul"].fp32_precision
    torch.backends.cudnn.conv.fp32_precision = conv or NEWER["conv"].fp32_precision


def allow(matmul, cudnn):
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


BEFORE = {
    "torch's default": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older names, on": lambda: allow(True, True),
    "older names, off": lambda: allow(False, False),
    "newer names, on": lambda: set_newer("tf32", "tf32"),
    "newer names, off": lambda: set_newer("ieee", "ieee"),
    "newer names, mixed": lambda: set_newer("tf32", "ieee"),
}


@pytest.fixture(params=BEFORE)
def start(request):
    """torch's settings as somebody has left them, and afterwards those of the test process."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    before = [part.fp32_precision for part in NEWER.values()]
    BEFORE[request.param]()
    yield request.param
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for part, value in zip(NEWER.values(), before, strict=True):
        part.fp32_precision = value


@pytest.mark.parametrize("name", PRECISIONS)
def test_products_are_as_asked_and_restored(name, start):
    before = setting()
    with products(name):
        within = setting()
        dot = triton_launch.dot_precision(torch.float32)
    assert setting() == before
    if name not in ("float32", "tf32"):
        assert within == before
        return
    wanted = "tf32" if name == "tf32" else "ieee"
    assert dot == wanted and [within[n] for n in ("matmul", "conv", "rnn")] == [wanted] * 3
    assert within["of CPUs"] == (before["of CPUs"] if name == "tf32" else "ieee")
    if not start.startswith("newer"):
        assert within["oldest matmul"] == within["older cudnn"] == (name == "tf32")
        assert (within["older matmul"] == "highest") == (name == "float32")
        assert within["older matmul"] is not None
    with pytest.raises(KeyError), products(name):
        raise KeyError
    assert setting() == before
    with products("float32"):
        with products("tf32"):
            assert triton_launch.dot_precision(torch.float32) == "tf32"
        assert triton_launch.dot_precision(torch.float32) == "ieee"
    assert setting() == before


SAMPLE = ["sample", "--model_path", "digits", "--num_samples", "3", "--num_sampling_steps", "3"]


@pytest.mark.parametrize("name", ["tf32", "fp8"])
def test_command_line_refuses_what_the_device_cannot(name, tmp_path, capsys):
    arguments = [*SAMPLE, "--device", "cpu", "--log_dir", str(tmp_path / "out")]
    assert main([*arguments, "--dtype", name]) == 2
    error = capsys.readouterr().err
    assert f"diffit-kernels: error: {name} needs an NVIDIA GPU of compute capability" in error
    assert "got cpu" in error and not (tmp_path / "out").exists()


def test_command_line_rejects_other_names(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*SAMPLE, "--dtype", "float8"])
    error = capsys.readouterr().err
    assert "invalid choice: 'float8'" in error and all(name in error for name in PRECISIONS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_command_line_samples_in_every_precision(name, tmp_path, monkeypatch, anywhere):
    pytest.importorskip("diffusers", reason="the sample extra is not installed")
    seen, called = set(), DiffiTBlock.parts

    def parts(block, *args, **kwargs):
        dot = triton_launch.dot_precision(torch.float32)
        seen.add((type(block.attn.qkv), block.attn.qkv.bias.dtype, dot))
        return called(block, *args, **kwargs)

    monkeypatch.setattr(DiffiTBlock, "parts", parts)
    folder = tmp_path / "out"
    arguments = [*SAMPLE, "--device", "cpu", "--log_dir", str(folder), "--dtype", name]
    before = setting()
    assert main(arguments) == 0
    assert setting() == before
    layer = Fp8Linear if name == "fp8" else nn.Linear
    assert seen == {(layer, dtype_of(name), "tf32" if name == "tf32" else "ieee")}
    assert json.loads((folder / "run.json").read_text())["dtype"] == name
    with np.load(folder / "samples_3x8x8x3.npz") as file:
        assert file["arr_0"].std() > 0
    other = "bfloat16" if name != "bfloat16" else "float32"
    assert main([*arguments[:-1], other]) == 2, "a run goes on in the precision it was begun in"


class Halved(Tensor):
    """A weight in numbers of its own, as libraries quantize: twice what ``F.linear`` multiplies by.

    Whatever else reads it fails, for it has no memory.
    """

    @staticmethod
    def __new__(cls, twice):
        return Tensor._make_wrapper_subclass(cls, twice.shape, dtype=twice.dtype)

    def __init__(self, twice):
        self.twice = twice

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.twice / 2, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.detach.default:
            return cls(args[0].twice)
        raise NotImplementedError(f"{operator} reads what is no plain tensor")


def with_weights(model, names, make):
    """Of every layer whose name ends in one of ``names`` the weight is ``make`` of what it was."""
    for name, layer in model.named_modules():
        if name.endswith(names):
            layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("names", [*LARGE, "attn.qkv_temb", (*LARGE, "qkv_temb")], ids=str)
def test_layers_with_weights_of_another_kind_are_called(names, fused):
    model, inputs = digits()
    with torch.no_grad():
        expected = model(*inputs)
        with_weights(model, names, lambda weight: Halved(2 * weight))
        model.use_fused_tmsa = fused
        assert_close(model(*inputs), expected, 2e-5)


def test_plain_weights_are_read():
    """Parameters, tensors in their place, those of a compiler, and shards."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    layer = nn.Linear(16, 16)
    assert not fused.is_touched(layer)
    layer._parameters["weight"] = layer.weight.detach()
    assert not fused.is_touched(layer) and type(layer.weight) is Tensor
    with FakeTensorMode():
        imagined = nn.Linear(16, 16)
    assert type(imagined.weight) not in (Tensor, nn.Parameter) and not fused.is_touched(imagined)
    assert fused.is_touched(with_weights(nn.Sequential(layer), "0", Halved)[0])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_module(nn.Linear(16, 16), init_device_mesh("cpu", (1,)))
        assert type(sharded.weight.data) is not Tensor and not fused.is_touched(sharded)
    finally:
        distributed.destroy_process_group()
