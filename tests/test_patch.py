"""patch: the fused ops inside models we did not write, found by structure, undone exactly."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import diffit_kernels
from diffit_kernels import patch, unpatch
from tests import lookalike
from tests.golden_files import LATENT, recording
from tests.parity import assert_close
from tests.test_reference import without_key_third

TOKENS = (3, 16, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lookalike.Transformer()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(TOKENS), torch.randn(TOKENS[0], TOKENS[-1])


def fused_calls(model, *args):
    """Names of the fused ops that a call of ``model`` runs, in order."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("diffit::")
            if func.namespace == "diffit" and name != "linear":
                calls.append(name)
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        model(*args)
    return calls


BLOCK_CALLS = [
    "adaln",
    "time_projections",
    "window_attention",
    "adaln",
    "mlp",
]


def test_whole_blocks_run_through_the_fused_ops_and_agree(model, inputs):
    expected = model(*inputs)
    assert patch(model) is model
    assert fused_calls(model, *inputs) == 2 * BLOCK_CALLS
    assert_close(model(*inputs), expected, 2e-5)
    patch(model)
    assert fused_calls(model, *inputs) == 2 * BLOCK_CALLS, "patching twice"


def test_unpatch_restores_exactly(model, inputs):
    expected = model(*inputs)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    unpatch(patch(model))
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(*inputs), expected)
    assert fused_calls(model, *inputs) == []


@pytest.mark.parametrize("name", LATENT)
def test_lookalike_blocks_with_recorded_weights_agree_with_our_model(name):
    """A structure-alike of the whole recorded model, patched, against the recorded gradients."""
    golden = recording(name)
    config = golden.config
    ours = diffit_kernels.DiffiT(**config)
    side = config["input_size"] // config["patch_size"]
    for index in range(config["depth"]):
        ours.blocks[index] = lookalike.Layer(config["hidden_size"], config["num_heads"], side)
    ours.load_state_dict(golden.under("state."))
    patch(ours.eval())
    x = golden["input.x"].clone().requires_grad_()
    inputs = x.detach(), golden["input.t"], golden["input.y"]
    assert fused_calls(ours, *inputs) == config["depth"] * BLOCK_CALLS
    out = ours(x, golden["input.t"], golden["input.y"])
    assert_close(out, golden["output"], 2e-5)
    (out * golden["loss_weight"]).sum().backward()
    assert_close(x.grad, golden["grad.input.x"], 2e-5, "gradient of x")
    parameters = dict(ours.named_parameters())
    for key, expected in golden.under("grad.param.").items():
        assert_close(*without_key_third(key, parameters[key].grad, expected), 2e-5, key)
    with torch.no_grad():
        guided = ours.forward_with_cfg(golden["cfg.x"], golden["cfg.t"], golden["cfg.y"], 4.4)
    assert_close(guided, golden["cfg.output_scale4.4"], 2e-5, "guided")


def test_parameters_state_dict_and_optimiser_stay_the_same_objects(model, inputs):
    optimiser = torch.optim.AdamW(model.parameters())
    model(*inputs).sum().backward()
    optimiser.step()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    patch(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert isinstance(model.layers[0].attn, lookalike.Attention)
    assert len(optimiser.state) == len(parameters)
    before = model.layers[0].attn.relative_position_bias_table.detach().clone()
    model(*inputs).sum().backward()
    optimiser.step()
    assert not torch.equal(before, model.layers[0].attn.relative_position_bias_table)
    model.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "part",
    [
        *("attn", "attn.qkv", "attn.qkv_temb", "attn.attn_drop", "attn.proj_drop"),
        *("norm1", "norm2", "mlp", "mlp.act", "mlp.fc1", "mlp.drop1", "mlp.norm"),
    ],
)
def test_hooks_fire_and_count(model, inputs, part):
    seen = []
    layer = model.layers[0]
    handle = layer.get_submodule(part).register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape)) or output * 1.5
    )
    expected = model(*inputs)
    assert len(seen) == 1
    patch(model)
    assert len(seen) == 1, "patching must not fire hooks"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hook on an idle part keeps the module's own forward
        assert_close(model(*inputs), expected, 2e-5)
    assert len(seen) == 2
    handle.remove()
    assert fused_calls(model, *inputs) == 2 * BLOCK_CALLS


def test_adapters_in_place_of_linear_layers_are_used(model, inputs):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.delta(x)

    attn, mlp = model.layers[0].attn, model.layers[0].mlp
    attn.qkv, attn.qkv_temb, mlp.fc2 = Adapter(attn.qkv), Adapter(attn.qkv_temb), Adapter(mlp.fc2)
    expected = model(*inputs)
    patch(model)
    assert_close(model(*inputs), expected, 2e-5)
    assert "window_attention" in fused_calls(model, *inputs)


def test_deepcopy_is_independent(model, inputs):
    patch(model)
    expected = model(*inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs), expected)
    assert fused_calls(twin, *inputs) == 2 * BLOCK_CALLS
    assert type(unpatch(twin).layers[0].attn) is lookalike.Attention


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(model, inputs, protocol):
    patch(model)
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(twin(*inputs), model(*inputs))
    assert fused_calls(twin, *inputs) == 2 * BLOCK_CALLS


def test_torch_save_of_the_whole_module(model, inputs):
    file = io.BytesIO()
    torch.save(patch(model), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), model(*inputs))


def test_compiles_whole(model, inputs):
    expected = patch(model)(*inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), expected, 2e-5)
    compiled(*inputs).sum().backward()
    assert model.layers[0].attn.relative_position_bias_table.grad.abs().max() > 0


def test_attention_without_time_token_and_with_a_mask(model, inputs):
    attn = patch(model).layers[0].attn
    original = unpatch(copy.deepcopy(attn))
    assert_close(attn(inputs[0]), original(inputs[0]), 2e-5)
    mask = torch.randn(16, 16)
    with pytest.warns(RuntimeWarning, match="Attention runs its own forward.*further arguments"):
        masked = attn(inputs[0], inputs[1], mask)
    assert_close(masked, original(inputs[0], inputs[1], mask), 2e-5)


def test_dropout_keeps_the_own_forward_in_training_only(inputs):
    model = patch(lookalike.Transformer(dropout=0.25))
    with pytest.warns(RuntimeWarning, match=r"attention dropout 0\.25 is on"):
        assert "window_attention" not in fused_calls(model.train(), *inputs)
    assert "window_attention" in fused_calls(model.eval(), *inputs)


class RandomLayer(lookalike.Layer):
    """Drops in training, by itself and under no name that could be looked for."""

    def forward(self, x, c):
        x = x + nn.functional.dropout(self.attn(self.norm1(x), c), 0.5, self.training)
        return x + self.mlp(self.norm2(x))


class RandomAttention(lookalike.Attention):
    def forward(self, x, temb=None, mask=None):
        return nn.functional.dropout(super().forward(x, temb, mask), 0.5, self.training)


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_randomness_in_training_is_kept(kind, inputs):
    torch.manual_seed(0)
    model = lookalike.Transformer(layer=RandomLayer if kind == "layer" else lookalike.Layer)
    if kind == "attention":
        for layer in model.layers:
            layer.attn.__class__ = RandomAttention

    def train():
        torch.manual_seed(3)
        return model.train()(*inputs)

    expected = train()
    patch(model)
    with pytest.warns(RuntimeWarning, match="training drops something"):
        assert_close(train(), expected, 2e-5)
    assert fused_calls(model.eval(), *inputs) == 2 * BLOCK_CALLS


class ScaledAttention(lookalike.Attention):
    def forward(self, x, temb=None, mask=None):
        return super().forward(x, temb, mask) * self.factor


def test_buffers_and_functions_tell_modules_apart(inputs):
    """One of two modules of a class may be plain and the other not."""
    model = lookalike.Transformer()
    for layer, factor in zip(model.layers, (1.0, 0.5), strict=True):
        layer.attn.__class__ = ScaledAttention
        layer.attn.register_buffer("factor", torch.tensor(factor))
    expected = model(*inputs)
    patch(model)
    assert fused_calls(model, *inputs).count("window_attention") == 1
    assert_close(model(*inputs), expected, 2e-5)


def test_buffers_of_any_dtype(inputs):
    model = lookalike.Transformer()
    for layer in model.layers:
        layer.attn.register_buffer("seen", torch.ones((), dtype=torch.bfloat16))
    assert fused_calls(patch(model), *inputs) == 2 * BLOCK_CALLS


@pytest.mark.parametrize("part", ["norm1", "norm2", "mlp", "mlp.fc1", "attn.qkv", "attn.qkv_temb"])
def test_a_forward_set_on_an_instance_is_called(model, inputs, part):
    """As some libraries install their hooks."""
    module = patch(model).layers[0].get_submodule(part)
    own = module.forward
    module.forward = lambda x: 2 * own(x)
    ours = model(*inputs)
    assert_close(ours, unpatch(model)(*inputs), 2e-5)


def test_parametrized_attention(model):
    table = "relative_position_bias_table"
    nn.utils.parametrize.register_parametrization(model.layers[0].attn, table, nn.Tanh())
    with pytest.raises(ValueError, match="parametrized: remove that before patching"):
        patch(model.layers[0].attn)
    patch(model.layers[1])
    nn.utils.parametrize.register_parametrization(model.layers[1].attn, table, nn.Tanh())
    with pytest.raises(ValueError, match="was parametrized after patching"):
        unpatch(model)
    nn.utils.parametrize.remove_parametrizations(model.layers[1].attn, table)
    assert type(unpatch(model).layers[1].attn) is lookalike.Attention


def test_a_shared_time_token_takes_the_own_forward(model, inputs):
    expected = model(inputs[0], inputs[1][:1])
    with pytest.warns(RuntimeWarning, match=r"time token of shape \(1, 16\) is not one per sample"):
        assert_close(patch(model)(inputs[0], inputs[1][:1]), expected, 2e-5)


def test_a_block_that_computes_something_else_keeps_its_forward(inputs):
    torch.manual_seed(0)
    model = lookalike.Transformer(layer=lookalike.GatedLayer)
    expected = model(*inputs)
    assert fused_calls(patch(model), *inputs) == 2 * [
        "time_projections",
        "window_attention",
    ]
    assert_close(model(*inputs), expected, 2e-5)


def test_backend_is_passed_on(model, inputs, monkeypatch):
    monkeypatch.setattr("diffit_kernels.ops.triton_launch.INTERPRETED", False)
    patch(model, backend="triton")
    with pytest.raises(NotImplementedError, match=r"backend 'triton' cannot run this on cpu"):
        model(*inputs)
    patch(model, backend=None)
    assert fused_calls(model, *inputs) == 2 * BLOCK_CALLS, "blocks were tried on another backend"
