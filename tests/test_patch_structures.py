"""patch: every structure that is served, by recordings where there are some, else in float64."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from diffit_kernels import patch, unpatch
from diffit_kernels.patch import trial
from tests import lookalike
from tests.golden_files import recording
from tests.lookalike import dit, image_unet, mdt, swin
from tests.parity import assert_close, relative_error
from tests.test_backends import PLACES
from tests.test_patch import BLOCK_CALLS, fused_calls
from tests.test_reference import without_key_third

DIT_CALLS = ["adaln", "window_attention", "adaln", "mlp"]
ATTENTION = ["window_attention"]


class WithoutBias(dit.Attention):
    """DiffiT's attention without its position bias, for any number of tokens."""

    def __init__(self, width: int, heads: int, temb_width: int):
        super().__init__(width, heads)
        self.qkv_temb = nn.Linear(temb_width, 3 * width)

    def forward(self, x, temb):
        q, k, v = (self.qkv(x) + self.qkv_temb(temb)[:, None]).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = (self.scale * q @ k.mT).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


STRUCTURES = {  # the module, the shapes of its inputs, and the fused ops it then runs
    "DiffiT": (lambda: lookalike.Layer(16, 2, 4), [(3, 16, 16), (3, 16)], BLOCK_CALLS),
    "DiT": (lambda: dit.DiT(16, 2, 8), [(3, 12, 16), (3, 16)], [*DIT_CALLS, "adaln"]),
    "DiT, prime": (
        lambda: dit.DiT(16, 2, 8, fused=False),
        [(3, 17, 16), (3, 16)],
        [*DIT_CALLS, "adaln"],
    ),
    "ViT": (lambda: dit.PlainBlock(16, 2), [(3, 17, 16)], DIT_CALLS),
    "image-space DiffiT": (
        lambda: image_unet.Cell(8, 16, 2, 4, 12),
        [(3, 8, 8, 8), (3, 12)],
        BLOCK_CALLS,
    ),
    "Swin": (lambda: swin.Block(16, 2, (14, 14), 7, 0), [(2, 14, 14, 16)], ATTENTION),
    "Swin, shifted": (lambda: swin.Block(16, 2, (14, 14), 7, 3), [(2, 14, 14, 16)], 9 * ATTENTION),
    "Swin, two stages": (lambda: swin.Swin(side=14), [(2, 14, 14, 16)], (2 + 9 + 4) * ATTENTION),
    "Swin, int window": (
        lambda: swin.Attention(16, 2, (3, 3), as_int=True),
        [(5, 9, 16)],
        ATTENTION,
    ),
    "Swin, oblong": (lambda: swin.Attention(16, 2, (2, 5)), [(5, 10, 16)], ATTENTION),
    "DiffiT without a bias": (
        lambda: WithoutBias(16, 2, 12),
        [(3, 10, 16), (3, 12)],
        ["time_projections", "window_attention"],
    ),
    "MDT": (lambda: mdt.Block(16, 2, 4), [(3, 16, 16), (3, 16)], DIT_CALLS),
    "MDT, no more rows": (lambda: mdt.Attention(16, 2, 4, more=0), [(3, 16, 16)], ATTENTION),
    "ViT with rel_pos": (
        lambda: mdt.Attention(16, 2, 4, more=0, name="rel_pos"),
        [(3, 16, 16)],
        ATTENTION,
    ),
}


ONE_OF_EACH = ("DiT", "image-space DiffiT", "Swin, shifted", "MDT")


def outputs_and_gradients(model, inputs, *others):
    """The output, and the gradients of all inputs and parameters, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad()
    out = model(*leaves, *others)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    (out * weights).sum().backward()
    results = {"output": out.detach()}
    results |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return results | {name: p.grad for name, p in model.named_parameters()}


def model_and_inputs(case, dtype=torch.float32):
    make, shapes, calls = STRUCTURES[case]
    model = make().to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, [torch.randn(shape).to(dtype) for shape in shapes], calls


@pytest.mark.parametrize("case", STRUCTURES)
def test_exact_in_float64(case):
    """Outputs and every gradient, through the fused ops."""
    model, inputs, calls = model_and_inputs(case, torch.float64)
    own = copy.deepcopy(model)
    assert fused_calls(patch(model), *inputs) == calls
    expected = outputs_and_gradients(own, inputs)
    for name, value in outputs_and_gradients(model, inputs).items():
        assert_close(value, expected[name], 1e-11, name)


def check_against_recording(model, golden, names, place):
    """Output and every recorded gradient, in float32."""
    inputs = [golden[f"input.{name}"].to(place, copy=True).requires_grad_() for name in names]
    out = model(*inputs)
    assert_close(out.cpu(), golden["output"], 2e-5)
    (out * golden["loss_weight"].to(place)).sum().backward()
    gradients = {f"param.{name}": p.grad.cpu() for name, p in model.named_parameters()}
    gradients |= {f"input.{name}": x.grad.cpu() for name, x in zip(names, inputs, strict=True)}
    for key, expected in golden.under("grad.").items():
        # Its key third is as that of the released model's time projection.
        kind = "qkv_temb" if ".qkv_t." in key else key
        assert_close(*without_key_third(kind, gradients[key], expected), 2e-5, key)


@pytest.mark.parametrize("backend, place", PLACES)
def test_dit_agrees_with_the_recording(backend, place):
    golden = recording("dit_adaln_block")
    config = golden.config
    out = config["out_channels"] * config["patch_size"] ** 2
    model = dit.DiT(config["hidden_size"], config["num_heads"], out)
    model.load_state_dict(golden.under("state."), strict=True)
    patch(model.to(place), backend=backend)
    inputs = golden["input.x"].to(place), golden["input.c"].to(place)
    assert fused_calls(model, *inputs) == [*DIT_CALLS, "adaln"]
    check_against_recording(model, golden, ("x", "c"), place)


@pytest.mark.parametrize("backend, place", PLACES)
def test_image_unet_agrees_with_the_recording(backend, place):
    golden = recording("image_unet_small")
    model = image_unet.UNet(**golden.config)
    model.load_state_dict(golden.under("state."), strict=True)
    patch(model.to(place), backend=backend)
    inputs = golden["input.x"].to(place), golden["input.temb_input"].to(place)
    assert fused_calls(model, *inputs) == 6 * BLOCK_CALLS
    check_against_recording(model, golden, ("x", "temb_input"), place)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_unpatch_restores_exactly(case):
    model, inputs, _ = model_and_inputs(case)
    expected, keys = model(*inputs), list(model.state_dict())
    before = [(type(module), set(vars(module))) for module in model.modules()]
    patch(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] != [kind for kind, _ in before]
    unpatch(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert torch.equal(model(*inputs), expected)
    assert fused_calls(model, *inputs) == []


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_copies_and_pickles(case):
    model, inputs, calls = model_and_inputs(case)
    expected = patch(model)(*inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs), expected)
        assert fused_calls(twin, *inputs) == calls


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_compiles_whole(case):
    """With the mask of shifted windows too, whose values no graph can hold: by the own forward."""
    model, inputs, _ = model_and_inputs(case)
    expected = outputs_and_gradients(patch(model), inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = outputs_and_gradients(compiled, inputs)
    for (name, value), other in zip(actual.items(), expected.values(), strict=True):
        assert_close(value, other, 2e-5, name)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_training_goes_on(case):
    """The same steps, patched or not."""
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model, inputs, _ = model_and_inputs(case, torch.float64)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        target = torch.randn_like(model(*inputs))
        losses.append([])
        for step in range(4):
            if patched and step == 2:
                patch(model)
            optimiser.zero_grad()
            loss = (model(*inputs) - target).square().mean()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.detach())
    assert_close(torch.stack(losses[1]), torch.stack(losses[0]), 1e-9, "losses")
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype):
    """At most twice the error of the module's own forward, whose buffers are of the dtype too."""
    model, inputs, calls = model_and_inputs(case, torch.float64)
    truth = model(*inputs)
    model, inputs = model.to(dtype), [x.to(dtype) for x in inputs]
    own = relative_error(model(*inputs), truth)
    assert fused_calls(patch(model), *inputs) == calls
    assert_close(model(*inputs), truth, 2 * own + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "part", ["q_norm", "norm", "qkv", "adaLN_modulation", "adaLN_modulation.1"]
)
def test_hooks_on_the_parts_of_a_dit_fire_once(part):
    model, inputs, _ = model_and_inputs("DiT")
    owner = model.block if part.startswith("ada") else model.block.attn
    seen = []
    owner.get_submodule(part).register_forward_hook(
        lambda module, args, output: seen.append(1) or 1.5 * output
    )
    expected = model(*inputs)
    patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hook on an idle part keeps the module's own forward
        assert_close(model(*inputs), expected, 2e-5)
    assert len(seen) == 2


def test_adapters_are_used_and_of_any_width():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    model, inputs, calls = model_and_inputs("image-space DiffiT")
    attention = model.transformer.tmsa
    attention.qkv_t, attention.proj = Adapter(attention.qkv_t), Adapter(attention.proj)
    expected = model(*inputs)
    assert_close(patch(model)(*inputs), expected, 2e-5)
    assert fused_calls(model, *inputs) == [call for call in calls if call != "time_projections"]


def test_one_trial_for_all_blocks_alike(monkeypatch):
    tried, real = [], trial._trial
    monkeypatch.setattr(trial, "_trial", lambda *args: tried.append(1) or real(*args))
    patch(nn.ModuleList(mdt.Block(16, 2, 4) for _ in range(5)))
    assert len(tried) == 2, "an attention and a block"


def test_parts_may_be_patched_and_given_back_alone():
    model, inputs, calls = model_and_inputs("DiT")
    expected = model(*inputs)
    patch(model.block.attn)
    assert fused_calls(model, *inputs) == ATTENTION
    patch(model)
    assert fused_calls(model, *inputs) == calls
    unpatch(model.block.attn)
    assert fused_calls(model, *inputs) == [call for call in calls if call not in ATTENTION]
    assert_close(model(*inputs), expected, 2e-5)
    patch(model)
    assert fused_calls(model, *inputs) == calls


@pytest.mark.parametrize("case", ["DiT", "Swin, shifted"])
def test_the_backend_is_passed_on(case, monkeypatch):
    monkeypatch.setattr("diffit_kernels.ops.triton_launch.INTERPRETED", False)
    model, inputs, calls = model_and_inputs(case)
    patch(model, backend="triton")
    with pytest.raises(NotImplementedError, match=r"backend 'triton' cannot run this on cpu"):
        model(*inputs)
    patch(model, backend="eager")
    assert fused_calls(model, *inputs) == calls
