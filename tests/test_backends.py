"""Whole models on every backend that has all ops: recordings, training, patched modules, sampling.

Where a backend runs is in conftest.py: Triton's on a GPU if there is one, else interpreted.
"""

import pytest
import torch

from diffit_kernels import DiffiT, from_pretrained, patch, use_backend
from diffit_kernels.dispatch import BACKENDS, REGISTRY
from tests import lookalike
from tests.conftest import places
from tests.golden_files import LATENT, recording
from tests.parity import assert_close
from tests.test_reference import without_key_third

PLACES = [
    (backend, place)
    for backend in BACKENDS
    if all(op.is_built(backend) for op in REGISTRY.values())
    for place in places(backend)
]


@pytest.mark.parametrize("backend, place", PLACES)
@pytest.mark.parametrize("name", LATENT)
def test_the_drop_in_model_agrees_with_the_recording(name, backend, place):
    """Outputs and every gradient, in float32."""
    golden = recording(name)
    model = DiffiT(**golden.config, use_fused_tmsa=True, backend=backend)
    model.load_state_dict(golden.under("state."), strict=True)
    check_against_recording(model.eval().to(place), golden, place)


@pytest.mark.parametrize("backend, place", PLACES)
def test_a_patched_model_agrees_with_the_recording(backend, place):
    golden = recording("latent_small")
    model = DiffiT(**(config := golden.config))
    side = config["input_size"] // config["patch_size"]
    for index in range(config["depth"]):
        model.blocks[index] = lookalike.Layer(config["hidden_size"], config["num_heads"], side)
    model.load_state_dict(golden.under("state."))
    patch(model.eval().to(place), backend=backend)
    check_against_recording(model, golden, place)


def check_against_recording(model, golden, place):
    x = golden["input.x"].to(place, copy=True).requires_grad_()
    out = model(x, golden["input.t"].to(place), golden["input.y"].to(place))
    assert_close(out.cpu(), golden["output"], 2e-5)
    (out * golden["loss_weight"].to(place)).sum().backward()
    assert_close(x.grad.cpu(), golden["grad.input.x"], 2e-5, "gradient of x")
    parameters = dict(model.named_parameters())
    for key, expected in golden.under("grad.param.").items():
        grad = parameters[key].grad.cpu()
        assert_close(*without_key_third(key, grad, expected), 2e-5, key)


@pytest.mark.parametrize("backend, place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_trains_under_autocast(dtype, backend, place):
    """Finite gradients in float32 for every parameter, near the ones without autocast."""
    torch.manual_seed(0)
    model = DiffiT(8, hidden_size=48, depth=2, num_heads=2, num_classes=5, backend=backend)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    model = model.to(place)
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    inputs = [t.to(place) for t in inputs]

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast(place, dtype, enabled=enabled):
            model.eval()(*inputs).float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(False)
    for name, grad in gradients(True).items():
        assert grad.dtype == torch.float32, name
        assert_close(grad, expected[name], 0.1, name)


@pytest.mark.parametrize("backend, place", PLACES)
def test_the_packaged_model_predicts_the_same_noise(backend, place):
    model = from_pretrained("digits").to(place)
    inputs = [
        torch.randn(4, 4, 4, 4),
        torch.tensor([999, 500, 100, 0]),
        torch.tensor([3, 7, 10, 0]),
    ]
    inputs = [t.to(place) for t in inputs]
    with torch.no_grad():
        expected = model(*inputs)
        with use_backend(backend):
            assert_close(model(*inputs), expected, 2e-5)
