"""The latent model conditioned by adaLN: DiT's recording, the oracle, checkpoints, and training."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

import reference
from diffit_kernels import DiffiT, Diffit, from_pretrained
from diffit_kernels.block import CONDITIONINGS, DiffiTBlock
from diffit_kernels.cli import main
from tests.golden_files import recording
from tests.parity import assert_close
from tests.test_model import SMALL, Traffic

OPS = ("adaln", "linear", "time_projections", "window_attention", "mlp")
VARIANTS = list(itertools.product(CONDITIONINGS, (True, False)))


def random_model(conditioning, position_bias=True, **kwargs):
    """A small model whose modulations and output are not the zeros that training starts from."""
    torch.manual_seed(0)
    model = DiffiT(**SMALL | kwargs, conditioning=conditioning, position_bias=position_bias)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


def check_the_dit_recording(fused, device):
    golden = recording("dit_adaln_block")
    size, heads = golden.config["hidden_size"], golden.config["num_heads"]
    model = DiffiT(16, 2, 4, size, 1, heads, conditioning="adaln_zero", position_bias=False).to(
        device
    )
    model.use_fused_tmsa = fused
    state = {k.replace("block.", "blocks.0."): v for k, v in golden.under("state.").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any("block" in k or "final" in k for k in missing)
    x, c = (golden[f"input.{k}"].to(device, copy=True).requires_grad_() for k in "xc")
    out = model.final_layer(model.blocks[0](x, c), c)
    assert_close(out.cpu(), golden["output"], 2e-5)
    (out * golden["loss_weight"].to(device)).sum().backward()
    assert_close(x.grad.cpu(), golden["grad.input.x"], 2e-5, "gradient of x")
    assert_close(c.grad.cpu(), golden["grad.input.c"], 2e-5, "gradient of c")
    parameters = dict(model.named_parameters())
    for key, expected in golden.under("grad.param.").items():
        grad = parameters[key.replace("block.", "blocks.0.")].grad.cpu()
        assert_close(grad, expected, 2e-5, key)


def test_the_fused_block_agrees_with_the_dit_recording(backend, device):
    check_the_dit_recording(True, device)


def test_the_literal_block_agrees_with_the_dit_recording():
    check_the_dit_recording(False, "cpu")


def result_and_gradients(model, function, inputs, dtype):
    """The output, and the gradients of every parameter under its name, for one loss."""
    model.zero_grad()
    out = function(*inputs)
    generator = torch.Generator().manual_seed(7)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().backward()
    return {"output": out.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("conditioning, position_bias", VARIANTS)
def test_agrees_with_the_reference(conditioning, position_bias, fused, inputs):
    """Outputs and every gradient, in float64: what differs is the order of operations."""
    model = random_model(conditioning, position_bias).double()
    model.use_fused_tmsa = fused
    x, t, y = inputs
    x = x.double()

    def oracle(x, t, y):
        state = model.state_dict(keep_vars=True)
        return reference.latent_diffit(state, x, t, y, SMALL["num_heads"])

    expected = result_and_gradients(model, oracle, (x, t, y), torch.float64)
    actual = result_and_gradients(model, model, (x, t, y), torch.float64)
    assert actual.keys() == expected.keys()
    noise = "qkv_temb" if conditioning != "adaln_zero" else "qkv.bias"
    for name, value in expected.items():
        # the key parts' gradients are zero, and in the literal equations rounding noise
        tolerance = 1e-11 if noise in name else 1e-12
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_the_literal_model(conditioning, dtype, inputs):
    model = random_model(conditioning).to(dtype)
    x, t, y = inputs[0].to(dtype), *inputs[1:]
    with torch.no_grad():
        model.use_fused_tmsa = True
        fused = model(x, t, y)
        model.use_fused_tmsa = False
        literal = model(x, t, y)
        truth = model.double()(x.double(), t, y)
    largest = truth.abs().max()
    errors = [((out.double() - truth).abs().max() / largest).item() for out in (fused, literal)]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps


def test_gates_and_modulations_take_no_pass_of_their_own():
    """As often over memory as without: the gate goes with the residual, the rest with the norm."""
    model = random_model("adaln_zero", use_fused_tmsa=True, depth=3)
    x, temb = torch.randn(3, 16, 48), torch.randn(3, 48)
    with torch.no_grad(), Traffic(x.numel()) as alone:
        model.blocks[0](x, temb)
    assert (alone.reads, alone.writes) == (8, 5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_joined_blocks_compute_what_single_ones_do(conditioning, inputs):
    model = random_model(conditioning, use_fused_tmsa=True, depth=3)
    joined = model(*inputs)
    hook = model.blocks[1].register_forward_hook(lambda module, args, out: None)
    assert_close(model(*inputs), joined, 1e-6)
    hook.remove()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_block_with_gates_starts_as_the_identity(conditioning):
    model = DiffiT(**SMALL, conditioning=conditioning, use_fused_tmsa=True)
    x, temb = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[0](x, temb), x) == (conditioning != "tmsa")


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_compiles_whole(conditioning, inputs):
    model = random_model(conditioning, use_fused_tmsa=True)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(compiled(*inputs), model(*inputs), 1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_trains_with_the_same_losses(conditioning):
    """Ten steps of AdamW, fused and literal: the losses stay together, and fall."""
    losses = {}
    for fused in (False, True):
        model = random_model(conditioning, use_fused_tmsa=fused).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(2)
        x, target = torch.randn(8, 4, 8, 8), torch.randn(8, 8, 8, 8)
        t, y = torch.randint(1000, (8,)), torch.randint(5, (8,))
        losses[fused] = []
        for _ in range(10):
            loss = (model(x, t, y) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fused].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < losses[True][0]


def test_a_published_dit_checkpoint_loads(tmp_path, inputs):
    """DiT's names and shapes, wrapped in "ema" as its .pt files are; the heads by the width."""
    with torch.device("meta"):
        xl = Diffit(conditioning="adaln_zero", position_bias=False)
    assert sum(p.numel() for p in xl.parameters() if p.requires_grad) == 674_834_720
    expected = """pos_embed x_embedder.proj.{weight,bias} t_embedder.mlp.{0,2}.{weight,bias}
        y_embedder.embedding_table.weight blocks.{0,1}.attn.{qkv,proj}.{weight,bias}
        blocks.{0,1}.mlp.{fc1,fc2}.{weight,bias} blocks.{0,1}.adaLN_modulation.1.{weight,bias}
        final_layer.linear.{weight,bias} final_layer.adaLN_modulation.1.{weight,bias}"""
    sizes = {"hidden_size": 384, "num_heads": 6}
    model = random_model("adaln_zero", False, **sizes)
    assert set(model.state_dict()) == {key for word in expected.split() for key in expand(word)}
    torch.save({"ema": model.state_dict(), "opt": {}}, tmp_path / "DiT-S-4.pt")
    loaded = from_pretrained(tmp_path / "DiT-S-4.pt")
    assert (loaded.num_heads, loaded.conditioning) == (6, "adaln_zero")
    with torch.no_grad():
        assert_close(loaded(*inputs), model(*inputs), 2e-5)


def expand(word):
    """{a,b} in a word, as a shell would."""
    start, _, rest = word.partition("{")
    if not rest:
        return [word]
    choices, _, end = rest.partition("}")
    return [f"{start}{choice}{tail}" for choice in choices.split(",") for tail in expand(end)]


def test_a_dit_checkpoint_is_sampled_with_its_own_guidance(tmp_path):
    save_file(random_model("adaln_zero", False).state_dict(), tmp_path / "a.safetensors")
    command = ["sample", "--model_path", str(tmp_path), "--log_dir", str(tmp_path / "out")]
    sizes = ["--num_samples", "2", "--num_sampling_steps", "2", "--vae", "none"]
    assert main([*command, *sizes]) == 2  # no width of DiT's, and no table: no heads
    model = random_model("adaln_zero", False, hidden_size=384, num_heads=6)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert main([*command, *sizes]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (settings["cfg_scale"], settings["scale_pow"]) == (1.5, 0.0)


def test_checkpoints_of_another_conditioning_are_told_apart(tmp_path):
    for conditioning, position_bias in VARIANTS[:-1]:
        model = random_model(conditioning, position_bias, hidden_size=384, num_heads=6)
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        loaded = from_pretrained(tmp_path)
        assert loaded.conditioning == conditioning
        assert loaded.state_dict().keys() == model.state_dict().keys()
    state = random_model("tmsa").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*qkv_temb"):
        random_model("adaln_zero").load_state_dict(state)


def test_constant_guidance():
    """scale_pow 0 is the constant weight that DiT samples with."""
    weight = random_model("adaln_zero").guidance_weight(torch.tensor([0, 500, 999]), 4.0, 1000, 0)
    assert torch.equal(weight, torch.full((3,), 4.0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"conditioning must be one of .* got 'film'"):
        DiffiT(**SMALL, conditioning="film")
    with pytest.raises(ValueError, match=r"gelu must be one of .* got 'erf'"):
        DiffiTBlock(16, 2, 4, gelu="erf")
    with pytest.raises(TypeError, match="gradient_checkpointing must be a bool, got 1"):
        DiffiT(**SMALL).gradient_checkpointing = 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_checkpointing_changes_no_gradient(conditioning, fused, inputs):
    model = random_model(conditioning, use_fused_tmsa=fused)
    plain = result_and_gradients(model, model, inputs, torch.float32)
    model.gradient_checkpointing = True
    again = result_and_gradients(model, model, inputs, torch.float32)
    for name, value in plain.items():
        assert_close(again[name], value, 2e-6, name)
