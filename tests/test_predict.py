"""What sampling computes once instead of at every step: the same predictions, and what is left."""

import copy
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffit_kernels import DiffiT, Diffit, from_pretrained, fused
from diffit_kernels.block import DiffiTBlock
from diffit_kernels.sampling import denoise, initial_noise, respaced_timesteps, sample_generator
from diffit_kernels.sampling.predict import (
    ALL_SAVINGS,
    Predictor,
    Savings,
    guidance_steps,
    takes_time_parts,
    time_parts,
)
from tests.conftest import DEVICES
from tests.parity import assert_close, relative_error

OPS = ("adaln", "linear", "time_projections", "window_attention", "mlp")
NAMES = [field.name for field in fields(Savings)]
NONE = Savings(**dict.fromkeys(NAMES, False))
TIMESTEPS = [0, 300, 600, 999]
LABELS = torch.tensor([3, 1, 3])


def random_model(**kwargs):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = DiffiT(**sizes | kwargs, use_fused_tmsa=kwargs.get("use_fused_tmsa", True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.startswith("final_layer"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def latents_for(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (len(LABELS), model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape, generator=generator).to(dtype)


@torch.inference_mode()
def predictions(model, savings, dtype=torch.float32, cfg_scale=4.4, device="cpu", **kwargs):
    predict = Predictor(model, TIMESTEPS, cfg_scale, savings=savings, **kwargs)
    x = latents_for(model, dtype).to(device)
    return called(predict, x, LABELS.to(device))


def called(predict, x, labels):
    condition = predict.condition(labels)
    steps = range(len(predict.timesteps))
    steps = [(torch.tensor([i], device=x.device), i in predict.guided) for i in steps]
    return torch.stack([predict(x, condition, *step) for step in steps])


def test_guidance_steps_of_the_published_run():
    """Of 250 at 256 pixels; the last whose weight is 1 is t = 907."""
    model, timesteps = random_model(input_size=32), respaced_timesteps(250)
    left_out = {0.0: 24, 1e-6: 35, 1e-5: 45, 1e-4: 61, 1e-3: 81, 1e-2: 108}
    for eps, count in left_out.items():
        steps = guidance_steps(model, timesteps, 4.4, 4.0, eps)
        assert steps == list(range(250 - count)), eps
    assert timesteps[250 - 24] == 907
    weight = model.guidance_weight(torch.from_numpy(timesteps), 4.4)
    assert (weight[226:] == 1).all() and (weight[:226] > 1).all()


def test_guidance_steps_of_other_runs():
    wide = random_model(input_size=64, patch_size=8)
    assert guidance_steps(wide, TIMESTEPS, 1.49) == [0, 1, 2, 3], "a constant weight"
    assert guidance_steps(wide, TIMESTEPS, 1.0) == []
    assert guidance_steps(random_model(), TIMESTEPS, 0.5) == [0, 1, 2], "less than 1"
    for eps in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match=f"guidance_eps must be at least 0, got {eps}"):
            guidance_steps(wide, TIMESTEPS, 1.49, guidance_eps=eps)


DIGITS = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(scope="module", params=DIGITS, ids=str)
def digits_plain(request):
    pytest.importorskip("diffusers", reason="the sample extra is not installed")
    dtype = request.param
    backend = "eager" if dtype == torch.float64 else None
    model = from_pretrained("digits", use_fused_tmsa=True, dtype=dtype, backend=backend)
    return model, trajectory(model, dtype, NONE), dtype


def trajectory(model, dtype, savings):
    """Latents after 50 ancestral steps."""
    generators = [sample_generator(0, index) for index in range(len(LABELS))]
    noise = initial_noise(model, generators).to(dtype)
    kwargs = {"num_steps": 50, "cfg_scale": 3.0, "generators": generators, "savings": savings}
    return denoise(model, noise, LABELS, **kwargs)


@pytest.mark.parametrize("off", [None, *NAMES])
def test_a_whole_trajectory_is_the_plain_one(digits_plain, off):
    model, plain, dtype = digits_plain
    savings = ALL_SAVINGS if off is None else replace(ALL_SAVINGS, **{off: False})
    assert_close(trajectory(model, dtype, savings), plain, DIGITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_trajectory_of_the_released_size(device):
    """Ten published steps at 256 pixels, one of them without guidance; depth 28, random weights."""
    torch.manual_seed(0)
    model = Diffit(use_fused_tmsa=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.startswith("final_layer"):
            nn.init.normal_(parameter, std=0.02)
    model.to(device)
    labels = torch.tensor([207], device=device)

    def sampled(savings, dtype=torch.float32):
        generators = [sample_generator(0, 0)]
        noise = initial_noise(model, generators).to(dtype)
        fresh = [torch.randn(1, 4, 32, 32, generator=generators[0]) for _ in range(9)]
        with pytest.MonkeyPatch.context() as patch:  # the same numbers in every dtype
            patch.setattr("diffit_kernels.sampling.noise.step_noise", lambda *_: fresh.pop(0))
            return denoise(model, noise, labels, num_steps=10, cfg_scale=4.4, savings=savings)

    ours = sampled(ALL_SAVINGS)
    model.use_fused_tmsa = False
    literal = sampled(NONE)
    model.double()
    truth = sampled(NONE, torch.float64)
    floor = 4 * torch.finfo(torch.float32).eps
    assert relative_error(ours, truth) <= 2 * relative_error(literal, truth) + floor


@pytest.mark.parametrize("input_size", [32, 64])
def test_the_released_width(input_size):
    """Both rules of guidance: a weight that depends on t, and a constant one."""
    sizes = {"hidden_size": 1152, "num_heads": 16, "depth": 2, "patch_size": 8}
    model = random_model(input_size=input_size, **sizes)
    plain = predictions(model, NONE)
    for off in (None, *NAMES):
        savings = ALL_SAVINGS if off is None else replace(ALL_SAVINGS, **{off: False})
        assert_close(predictions(model, savings), plain, 1e-5, f"without {off}")


@pytest.mark.parametrize("cfg_scale", [None, 1.0, 2.0])
@pytest.mark.parametrize("off", [None, *NAMES])
def test_every_saving_in_float64(cfg_scale, off):
    """The fourth channel and the variance are the conditional half's own."""
    model = random_model().double()
    savings = ALL_SAVINGS if off is None else replace(ALL_SAVINGS, **{off: False})
    arguments = {"dtype": torch.float64, "cfg_scale": cfg_scale}
    assert_close(
        predictions(model, savings, **arguments), predictions(model, NONE, **arguments), 1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_the_literal_model(dtype):
    model = random_model().to(dtype)
    ours = predictions(model, ALL_SAVINGS, dtype)
    model.use_fused_tmsa = False
    literal = predictions(model, NONE, dtype)
    exact = copy.deepcopy(model).double()
    x = latents_for(model, dtype).double()
    with torch.inference_mode():
        truth = called(Predictor(exact, TIMESTEPS, 4.4, savings=NONE), x, LABELS)
    floor = 4 * torch.finfo(dtype).eps
    assert relative_error(ours, truth) <= 2 * relative_error(literal, truth) + floor


def test_every_backend(backend, device):
    model = random_model().to(device)
    ours = predictions(model, ALL_SAVINGS, device=device)
    model.use_fused_tmsa = False
    assert_close(ours, predictions(model, NONE, device=device), 2e-5)


def test_more_than_exact_skips_more():
    model = random_model()
    exact, rough = (predictions(model, ALL_SAVINGS, guidance_eps=eps) for eps in (0, 10))
    unguided = predictions(model, ALL_SAVINGS, cfg_scale=None)
    assert torch.equal(rough, unguided)
    assert relative_error(exact[0], unguided[0]) > 0.01
    assert_close(exact[3], unguided[3], 1e-6)


class Rows(TorchDispatchMode):
    """Calls of our ops, and the rows of every linear and attention."""

    def __init__(self):
        super().__init__()
        self.calls, self.rows = Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace == "diffit":
            self.calls[name] += 1
            self.rows.setdefault(name, []).append(args[0].shape[0])
        return func(*args, **kwargs or {})


def test_what_is_left_to_compute():
    """Two products of tables; the first qkv for one half; no null half where its weight is 0."""
    model, batch = random_model(backend="eager"), len(LABELS)
    with Rows() as counted:
        predictions(model, ALL_SAVINGS)  # three guided steps of four
    assert counted.calls["time_projections"] == 2
    assert counted.rows["time_projections"] == [len(TIMESTEPS), 3], "two classes and null"
    first, last = [batch] * 2 + [2 * batch] * 2, [batch] * 3
    assert counted.rows["window_attention"] == first * 3 + last
    products = counted.rows["linear"]  # qkv and projection of every block
    assert products == ([batch] + [2 * batch] * 5) * 3 + [batch] * 6

    with Rows() as counted:
        predictions(model, NONE)
    assert counted.calls["time_projections"] == len(TIMESTEPS) * 3
    assert set(counted.rows["linear"]) == {2 * batch}


def test_models_too_deep_for_one_call(monkeypatch):
    model = random_model().double()
    temb = torch.randn(4, 32, dtype=torch.float64)
    whole = time_parts(model, temb), time_parts(model, temb, bias=False)
    monkeypatch.setattr("diffit_kernels.sampling.predict.BLOCKS_A_CALL", 2)
    for parts, bias in zip(whole, (True, False), strict=True):
        assert torch.equal(time_parts(model, temb, bias), parts)
    biases = torch.stack([block.attn.qkv_temb.bias for block in model.blocks])
    biases = biases.unflatten(1, (3, -1))[:, ::2].flatten(1)
    assert_close(whole[0], whole[1] + biases[:, None], 1e-14)


class Adapted(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    model.blocks[1].register_forward_hook(lambda *_: None)


def adapted(model):
    model.blocks[1].attn.qkv_temb.__class__ = Adapted


def embedded_otherwise(model):
    model.t_embedder.forward = lambda t: t[:, None] * torch.ones(32)


def subclassed(model):
    model.__class__ = type("Changed", (DiffiT,), {})


def literal_in_part(model):
    model.blocks[2].attn.use_fused_tmsa = False


def in_training(model):
    model.y_embedder.dropout_prob = 0
    model.train()


def without_bias(model):
    model.blocks[2].attn.qkv_temb.bias = None


def in_two_layers(model):
    attention = model.blocks[0].attn
    attention.qkv_temb = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 96))


CHANGES = [
    hooked,
    adapted,
    embedded_otherwise,
    subclassed,
    literal_in_part,
    in_training,
    without_bias,
    in_two_layers,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_called(change):
    model = random_model(backend="eager")
    assert takes_time_parts(model)
    change(model)
    assert not takes_time_parts(model)
    assert_close(predictions(model, ALL_SAVINGS), predictions(model, NONE), 1e-6)


@pytest.mark.parametrize("kwargs", [{"conditioning": "adaln_zero"}, {"conditioning": "tmsa+adaln"}])
def test_other_conditionings_are_called(kwargs):
    model = random_model(**kwargs)
    assert not takes_time_parts(model)
    assert_close(predictions(model, ALL_SAVINGS), predictions(model, NONE), 1e-6)


def test_autocast_is_called():
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_time_parts(model)


def test_errors_are_the_models_own():
    model = random_model()
    x, timesteps = latents_for(model), [0, 999]
    for savings in (ALL_SAVINGS, NONE):
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.5"):
            called(Predictor(model, timesteps, 2.0, savings=savings), x, LABELS + 9)
        with pytest.raises(TypeError, match=r"x must be torch\.float32 like the model"):
            called(Predictor(model, timesteps, 2.0, savings=savings), x.double(), LABELS)
        no_null = random_model(class_dropout_prob=0.0)
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.4, got 1\.\.5"):
            called(Predictor(no_null, timesteps, 2.0, savings=savings), x, LABELS)
        called(Predictor(no_null, timesteps, savings=savings), x, LABELS)
    hooked(model)
    with pytest.raises(ValueError, match=r"must be a bare DiffiTBlock .* got DiffiTBlock at 1"):
        model.forward_with_time_parts(x, torch.zeros(3, 3, 64))


def test_an_empty_batch():
    model = random_model(backend="eager")
    x, labels = torch.zeros(0, 4, 8, 8), torch.zeros(0, dtype=torch.int64)
    out = called(Predictor(model, [999], 2.0), x, labels)
    assert out.shape == (1, 0, 8, 8, 8)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_tokens_with_several_time_tokens(runs):
    """fused.blocks with k time tokens a sample is k calls with one each, gradients included."""
    model = random_model(backend="eager").double()
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    temb = torch.randn(runs * 2, 32, dtype=torch.float64)
    out = fused.blocks(model.blocks, DiffiTBlock, x, None, time_parts(model, temb))
    expected = torch.cat(
        [fused.blocks(model.blocks, DiffiTBlock, x, part) for part in temb.split(2)]
    )
    assert_close(out, expected, 1e-13)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected)]
    assert_close(*grads, 1e-12)
