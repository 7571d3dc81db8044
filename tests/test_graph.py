"""Every op as PyTorch's compilers see it: opcheck, whole-graph compile, export, fake tensors."""

import os
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from diffit_kernels import DiffiT
from diffit_kernels.dispatch import BACKENDS, REGISTRY, use_backend
from diffit_kernels.ops import adaln
from tests.conftest import places
from tests.parity import assert_close


def random(*shape):
    return torch.randn(shape, requires_grad=True)


def strided(*shape):
    """Of the same shape, with the last two dimensions swapped in memory."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT.detach().requires_grad_()


CALLS = {
    "group_norm_silu": [
        lambda: (random(2, 3, 4, 8), random(8), random(8), 2, 1e-5),
        lambda: (random(2, 3, 4, 12), None, random(12), 4, 1e-5),
        lambda: (strided(2, 3, 4, 8), None, None, 8, 1e-5),
    ],
    "window_attention": [
        lambda: (random(2, 4, 6, 48), random(2, 32), random(15, 2), 2, [2, 3], 0.4),
        lambda: (random(2, 4, 6, 48), None, None, 2, [4, 6], 0.4),
        lambda: (strided(2, 4, 6, 48), strided(2, 32), strided(15, 2), 2, [2, 3], 0.4),
    ],
    "adaln": [
        lambda: (*(random(2, 3, 8) for _ in range(5)), random(8), random(8), 1e-6),
        lambda: (random(2, 3, 8), None, None, random(2, 1, 8), random(2, 1, 8), None, None, 1e-6),
        lambda: (random(2, 3, 8), random(2, 3, 8), None, None, None, None, None, 1e-6),
        lambda: (strided(2, 3, 8), strided(2, 3, 8), random(2, 1, 8), *[None] * 4, 1e-6),
    ],
    "time_projection": [
        lambda: (random(2, 3, 8), random(6, 8), random(6), random(2, 6)),
        lambda: (random(2, 3, 8), random(6, 8), None, random(2, 6)),
        lambda: (strided(2, 3, 8), strided(6, 8), None, strided(2, 6)),
    ],
    "time_projections": [
        lambda: (random(2, 8), [random(6, 8), random(6, 8)], [random(6), random(6)]),
        lambda: (random(2, 8), [random(6, 8)], []),
        lambda: (strided(2, 8), [strided(6, 8)], []),
    ],
    "linear": [
        lambda: (random(2, 3, 8), random(6, 8), random(6)),
        lambda: (strided(2, 3, 8), strided(6, 8), None),
    ],
    "mlp": [
        lambda: (
            random(2, 3, 8),
            random(16, 8),
            random(16),
            random(8, 16),
            random(8),
            "tanh",
            True,
        ),
        lambda: (random(2, 3, 8), random(16, 8), None, random(8, 16), None, "none", False),
        lambda: (strided(2, 3, 8), strided(16, 8), None, strided(8, 16), None, "tanh", True),
    ],
}


def moved(value, device):
    """Arguments with their tensors as leaves on ``device``, strides kept."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, torch.Tensor) and device != "cpu":
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return value


def test_every_op_is_covered():
    assert set(CALLS) == set(REGISTRY)


@pytest.mark.parametrize(
    "name, backend, case",
    [
        (name, backend, case)
        for name, cases in CALLS.items()
        for backend in BACKENDS
        if REGISTRY[name].is_built(backend)
        for case in range(len(cases))
    ],
)
def test_opcheck(name, backend, case):
    args = CALLS[name][case]()
    torch.library.opcheck(REGISTRY[name].overload(backend), moved(args, places(backend)[-1]))


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_an_error(name):
    args = CALLS[name][0]()
    leaf = next(value for value in args if isinstance(value, torch.Tensor))
    results = REGISTRY[name].overload("eager")(*args)
    out = results[0] if isinstance(results, (tuple, list)) else results
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} is differentiable once"):
        gradient.square().sum().backward()


def test_forward_mode_is_an_error():
    x = torch.randn(1, 2, 8)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        adaln(forward_ad.make_dual(x, torch.ones_like(x)))


def shipped():
    """The backends that have every op, for whole models."""
    return [name for name in BACKENDS if all(op.is_built(name) for op in REGISTRY.values())]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiffiT(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=5, use_fused_tmsa=True
    ).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    return model


@pytest.fixture
def inputs():
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)
def test_the_model_compiles_whole_with_gradients(model, inputs):
    """In float64, where the order of summation does not matter; and at t = 0, where the timestep's
    features, float32 by definition, are exact."""
    model.double()
    inputs = inputs[0].double(), torch.zeros(3), inputs[2]
    expected = model(*inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    out = torch.compile(model, fullgraph=True)(*inputs)
    assert_close(out, expected, 1e-12)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, gradients[name], 1e-11, name)


@pytest.mark.parametrize("backend", shipped())
def test_the_model_trains_in_one_graph_on_each_backend(backend, model, inputs):
    """Through autograd's own tracing, where fakes decide shapes and strides; in float32."""
    place = places(backend)[-1]
    model, inputs = model.to(place), [value.to(place) for value in inputs]
    expected = model(*inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with use_backend(backend):
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        assert_close(out, expected, 2e-5)
        out.square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, gradients[name], 1e-4, name)


def test_toggling_reaches_compiled_code(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(*inputs)
    model.use_fused_tmsa = False
    assert_close(compiled(*inputs), expected, 2e-5)


@pytest.mark.parametrize("backend", shipped())
def test_the_model_exports_and_keeps_the_fused_ops(backend, model, inputs):
    place = places(backend)[-1]
    model, inputs = model.to(place), tuple(value.to(place) for value in inputs)
    model.backend = backend
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch}, {0: batch})
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    ops = [str(node.target) for node in program.graph.nodes if "diffit" in str(node.target)]
    assert ops.count(f"diffit.window_attention.{backend}") == 2
    more = tuple(torch.cat((value, value)) for value in inputs)
    with torch.no_grad():
        assert_close(program.module()(*more), model(*more), 2e-5)


@pytest.mark.parametrize("backend", shipped())
def test_the_model_runs_on_fake_tensors(backend, model, inputs):
    place = places(backend)[-1]
    model, inputs = model.to(place), [value.to(place) for value in inputs]
    with use_backend(backend), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(*(mode.from_tensor(value) for value in inputs))
    assert out.shape == (3, 8, 8, 8)
