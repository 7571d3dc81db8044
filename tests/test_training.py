"""Training with what PyTorch has for it: half precision, compilation, checkpointing, processes.

On the backend that is the default and on the eager one; test_backends.py has the others.
"""

import copy
import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffit_kernels import DiffiT
from tests import two_processes
from tests.conftest import DEVICES
from tests.parity import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = [None, "eager"]
HALVES = [torch.bfloat16, torch.float16]
needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)


def small(backend=None, fused=True, **changes):
    """A model whose output is not the zero that training starts from, and drops no labels."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = DiffiT(**sizes | changes, class_dropout_prob=0.0, use_fused_tmsa=fused, backend=backend)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def batch(size, seed=1, device="cpu"):
    """(x, t, y)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, 8, 8, generator=generator)
    t = torch.randint(1000, (size,), generator=generator)
    y = torch.randint(5, (size,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


def loss_of(model, inputs):
    """A sum, which an empty batch has too."""
    return (model(*inputs).float() - torch.cat((inputs[0], inputs[0]), 1)).square().sum()


def gradients(model, inputs):
    """The loss, and the gradients by parameter."""
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    trained = (pair for pair in model.named_parameters() if pair[1].requires_grad)
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained}


def assert_same_gradients(actual, expected, tolerance):
    assert_close(actual[0], expected[0], tolerance, "loss")
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if tolerance == 0:
            assert torch.equal(actual[1][name], gradient), name
        else:
            assert_close(actual[1][name], gradient, tolerance, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_trains_float32_weights(dtype, backend, device):
    """Ten steps on one batch, float16's gradients scaled: the loss falls as in float32."""

    def losses(dtype):
        model, inputs = small(backend).to(device), batch(4, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        scaler = torch.amp.GradScaler(device, 2.0**8, enabled=dtype == torch.float16)
        values = []
        for _ in range(10):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, inputs)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            values.append(loss.detach())
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name
        return torch.stack(values)

    expected, actual = losses(torch.float32), losses(dtype)
    assert expected[-1] < 0.7 * expected[0]
    assert_close(actual, expected, 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaler_skips_a_step_that_overflows(backend):
    model = small(backend)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model, batch(2))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def compiled_batches(model, compiled, tolerance, mark=False):
    """Batches of 2, 3, 5 and 7 through a compiled model give what they give without."""
    for size in (2, 3, 5, 7):
        x, _, y = batch(size, seed=size)
        # At t = 0 the timestep's features, float32 whatever the model's dtype, are exact.
        inputs = x.to(model.pos_embed.dtype), torch.zeros(size), y
        expected = gradients(model, inputs)
        if mark:
            for value in inputs:
                torch._dynamo.mark_dynamic(value, 0)
        assert_same_gradients(gradients(Compiled(model, compiled), inputs), expected, tolerance)


class Compiled:
    """The parameters of one, the forward of the other: compiling adds a prefix to the names."""

    def __init__(self, model, compiled):
        self.zero_grad, self.named_parameters = model.zero_grad, model.named_parameters
        self.compiled = compiled

    def __call__(self, *inputs):
        return self.compiled(*inputs)


@pytest.fixture
def graphs():
    """How many graphs were compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_one_graph_trains_all_batch_sizes(recomputed, how, backend, graphs):
    model, dynamic = small(backend), True if how == "dynamic=True" else None
    model.gradient_checkpointing = recomputed
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compiled_batches(model, compiled, 1e-5, mark=how == "mark_dynamic")
    assert graphs() == 1


@pytest.mark.slow
@needs_a_compiler
def test_inductor_trains_all_batch_sizes(graphs):
    """In float64, whose roundings hide no error."""
    model = small().double()
    compiled_batches(model, torch.compile(model, fullgraph=True, dynamic=True), 1e-10)
    assert graphs() == 1


def saved_bytes(function):
    """Bytes that autograd keeps for the backward, counted once for each memory."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


class Recomputed(torch.nn.Module):
    """A block that a user put under torch.utils.checkpoint."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, temb):
        return checkpoint(self.block, x, temb, use_reentrant=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["user", "model"])
def test_recomputed_blocks_give_the_same_and_keep_less(by, backend):
    model, inputs = small(backend, input_size=16, depth=4), batch(4)
    inputs = inputs[0].repeat(1, 1, 2, 2), *inputs[1:]
    expected = gradients(model, inputs)
    plain = saved_bytes(lambda: loss_of(model, inputs))
    if by == "model":
        model.gradient_checkpointing = True
        names, recomputed = expected[1], model
    else:
        names = {name.replace("blocks.0.", "blocks.0.block."): g for name, g in expected[1].items()}
        for index in range(1, 4):
            names = {
                name.replace(f"blocks.{index}.", f"blocks.{index}.block."): gradient
                for name, gradient in names.items()
            }
        recomputed = model
        for index, block in enumerate(model.blocks):
            model.blocks[index] = Recomputed(block)
    actual = gradients(recomputed, inputs)
    assert torch.equal(actual[0], expected[0])
    assert_same_gradients(actual, (expected[0], names), 1e-6)
    kept = saved_bytes(lambda: loss_of(recomputed, inputs))
    activation = 4 * 64 * 48 * 4  # bytes of (B, N, C) in float32
    # Checkpoints hold their inputs out of the hooks' sight: one activation and the time token each.
    assert kept + 4 * (activation + 4 * 48 * 4) < plain / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_blocks_drop_the_same_labels(backend):
    """And keep nothing where no gradient is asked for."""
    model, inputs = small(backend), batch(6)
    model.y_embedder = type(model.y_embedder)(5, 48, 0.5)
    results = []
    for recomputed in (False, True):
        model.gradient_checkpointing = recomputed
        torch.manual_seed(3)
        results.append(gradients(model, inputs))
    assert_same_gradients(results[1], results[0], 1e-6)
    with torch.no_grad():
        assert saved_bytes(lambda: model(*inputs)) == 0


@pytest.fixture(scope="module")
def single():
    """The steps of one process."""
    return two_processes.train(two_processes.make_model("cpu"), "cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return two_processes.run("cpu", tmp_path_factory.mktemp("gloo"))


def assert_same_steps(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("way", two_processes.WAYS)
def test_two_processes_make_the_steps_of_one(way, single, two):
    """DDP and FSDP2 on batches whose size changes: losses, gradients and parameters, gathered."""
    assert_same_steps(two[way], single, 0.05 if way == "bfloat16" else 1e-5)


def test_two_gpus_make_the_steps_of_one(single, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs two GPUs, there are {torch.cuda.device_count()}")
    for way, results in two_processes.run("cuda", tmp_path).items():
        assert_same_steps(results, single, 0.05 if way == "bfloat16" else 1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_deep_copy_shares_nothing(fused):
    """As an average of weights needs it: also of a model that has made a step."""
    model, inputs = small(fused=fused), batch(3)
    loss_of(model, inputs).backward()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    ours, theirs = model.state_dict(), average.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
        assert theirs[name].data_ptr() != value.data_ptr(), name
    assert torch.equal(average(*inputs), model(*inputs))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast + 1, 0.5)
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    assert not torch.equal(average(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_keys_time_part_has_no_gradient(backend, dtype):
    """reference/README.md, 1: exactly zero, where the literal equations have rounding noise."""
    model = small(backend)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = loss_of(model, batch(3))
    loss.backward()
    for block in model.blocks:
        for parameter in (block.attn.qkv_temb.weight, block.attn.qkv_temb.bias):
            q, k, v = parameter.grad.chunk(3)
            assert not k.any() and q.any() and v.any()
    literal = small(fused=False)
    loss_of(literal, batch(3)).backward()
    assert literal.blocks[0].attn.qkv_temb.weight.grad.chunk(3)[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_trains_other_parameters(backend):
    model, inputs = small(backend), batch(3)
    expected = gradients(model, inputs)
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    leaves = {name: others[name].requires_grad_() for name in expected[1]}
    loss = loss_of(lambda *args: torch.func.functional_call(model, others, args), inputs)
    found = torch.autograd.grad(loss, list(leaves.values()))
    assert_same_gradients((loss, dict(zip(leaves, found, strict=True))), expected, 0)


TRANSFORMS = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x),
    "vmap": lambda loss, x: torch.func.vmap(loss)(x[:, None]),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "vmap of grad": lambda loss, x: torch.func.vmap(torch.func.grad(loss))(x[:, None]),
}


@pytest.mark.parametrize(
    "compiled, error", [(False, NotImplementedError), (True, torch._dynamo.exc.Unsupported)]
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_an_error_that_says_what_to_do(name, compiled, error):
    model, (x, t, y) = small(), batch(2)

    def transformed(x):
        loss = lambda x: loss_of(model, (x, t[: len(x)], y[: len(x)]))  # noqa: E731
        return TRANSFORMS[name](loss, x)

    function = transformed
    if compiled:
        function = torch.compile(transformed, backend="eager", fullgraph=True)
    message = "has no rule for torch.func's grad and vmap; use backward.*use_fused_tmsa=False"
    with pytest.raises(error, match=message):
        function(x)
    model.use_fused_tmsa = False
    assert transformed(x) is not None


def test_forward_mode_is_an_error():
    model, (x, t, y) = small(), batch(2)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: model(x, t, y), (x,), (x,))


def test_functionalize_sees_no_fused_op():
    model, inputs = small(), batch(2)
    assert torch.equal(
        torch.func.functionalize(lambda *args: model(*args))(*inputs), model(*inputs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_may_change_from_step_to_step(backend):
    """Down to none, against the literal equations."""
    model, literal = small(backend), small(fused=False)
    for size in (4, 3, 1, 0, 4):
        inputs = batch(size, seed=size)
        assert_same_gradients(gradients(model, inputs), gradients(literal, inputs), 2e-5)
